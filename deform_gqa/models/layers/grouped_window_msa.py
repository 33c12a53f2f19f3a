"""The window attention of MMDetection's Swin, with grouped queries."""

import torch
import torch.nn.functional as F
from mmdet.registry import MODELS
from mmengine.model import BaseModule
from mmengine.model.weight_init import trunc_normal_
from torch import Tensor, nn

from deform_gqa.checks import check_number, check_rate, check_size
from deform_gqa.ops.common.heads import repeat_kv

from .base_attention import resolve_kv_heads
from .heads import split_qkv
from .window_attention import relative_position_index


@MODELS.register_module()
class GroupedWindowMSA(BaseModule):
    """``WindowMSA`` of mmdet's Swin, with fewer key/value heads than query heads.

    Call, results, initialisation and names of parameters are those of the original,
    and with as many kv heads its checkpoints load. ``qkv.weight`` is (C + 2 Hkv D, C).

    Args:
        embed_dims: Channels C.
        num_heads: Query heads Hq; divides ``embed_dims``.
        window_size: (height, width) of the windows.
        num_kv_heads: Key/value heads Hkv; divides ``num_heads``. None for
            ``num_heads``.
        qkv_bias: Whether queries, keys and values have a bias.
        qk_scale: Scale of the logits; None for 1 / sqrt(C / Hq).
        attn_drop_rate: Dropout of the attention weights, in [0, 1).
        proj_drop_rate: Dropout of the output, in [0, 1).
        init_cfg: See ``mmengine.model.BaseModule``.

    Raises:
        TypeError: For an option of the wrong type.
        ValueError: For counts that do not divide, or a rate out of range.

    Source: Liu et al. (arXiv 2103.14030); ``mmdet.models.backbones.swin``.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        window_size: int | tuple[int, int],
        num_kv_heads: int | None = None,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        init_cfg: dict | None = None,
    ):
        super().__init__(init_cfg)
        self.num_kv_heads = resolve_kv_heads(embed_dims, num_heads, num_kv_heads)
        check_rate('attn_drop_rate', attn_drop_rate)
        check_rate('proj_drop_rate', proj_drop_rate)
        self.embed_dims, self.num_heads = embed_dims, num_heads
        self.window_size = check_size('window_size', window_size)
        self.head_dim = embed_dims // num_heads
        self.scale = self.head_dim**-0.5
        if qk_scale is not None:
            check_number('qk_scale', qk_scale)
            self.scale = qk_scale
        height, width = self.window_size
        self.relative_position_bias_table = nn.Parameter(
            torch.zeros((2 * height - 1) * (2 * width - 1), num_heads)
        )
        # Stored, as in the original.
        self.register_buffer(
            'relative_position_index', relative_position_index(self.window_size)
        )
        kv_dim = self.num_kv_heads * self.head_dim
        self.qkv = nn.Linear(embed_dims, embed_dims + 2 * kv_dim, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop_rate)
        self.proj = nn.Linear(embed_dims, embed_dims)
        self.proj_drop = nn.Dropout(proj_drop_rate)

    @classmethod
    def from_module(
        cls, module: nn.Module, num_kv_heads: int | None = None
    ) -> 'GroupedWindowMSA':
        """A new module with the options of mmdet's; its weights are not copied."""
        new = cls(
            module.embed_dims,
            module.num_heads,
            module.window_size,
            num_kv_heads,
            qkv_bias=module.qkv.bias is not None,
            qk_scale=module.scale,
            attn_drop_rate=module.attn_drop.p,
            proj_drop_rate=module.proj_drop.p,
            init_cfg=module.init_cfg,
        )
        weight = module.qkv.weight
        return new.to(weight.device, weight.dtype).train(module.training)

    def init_weights(self) -> None:
        """As in the original."""
        trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attention within each window.

        Args:
            x: (windows * B, N, C) with N pixels of a window.
            mask: (windows, N, N), added to the logits, or None.

        Returns:
            (windows * B, N, C).
        """
        q, k, v = split_qkv(self.qkv(x), self.num_heads, self.num_kv_heads)
        out = F.scaled_dot_product_attention(
            q,
            repeat_kv(k, self.num_heads),
            repeat_kv(v, self.num_heads),
            attn_mask=self._bias(mask, x.shape[0]).to(q.dtype),
            dropout_p=self.attn_drop.p if self.training else 0.0,
            scale=self.scale,
        )
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))

    def _bias(self, mask: Tensor | None, batch: int) -> Tensor:
        """(windows * B or 1, Hq, N, N)."""
        bias = self.relative_position_bias_table[self.relative_position_index]
        bias = bias.permute(2, 0, 1).unsqueeze(0)
        if mask is None:
            return bias
        bias = bias + mask.unsqueeze(1)
        return bias.repeat(batch // mask.shape[0], 1, 1, 1)
