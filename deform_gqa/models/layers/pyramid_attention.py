"""Block letter P: attention to a spatially reduced map."""

import torch.nn.functional as F
from mmdet.registry import MODELS
from torch import Tensor, nn

from deform_gqa.checks import check_int
from deform_gqa.ops.common.heads import repeat_kv

from .base_attention import BaseAttention
from .heads import merge_heads, split_heads
from .norm import ChannelLayerNorm


@MODELS.register_module()
class PyramidAttention(BaseAttention):
    """Spatial-reduction attention, (B, C, H, W) -> (B, C, H, W).

    Args:
        dim: Number of channels C.
        num_heads: Query heads.
        num_kv_heads: Key/value heads; None for ``num_heads``.
        sr_ratio: Stride and kernel size of the convolution that reduces the map of the
            keys; 1 for no reduction.
        attn_drop: Dropout of the attention weights, in [0, 1).
        proj_drop: Dropout of the output, in [0, 1).

    Raises:
        TypeError: For an option of the wrong type.
        ValueError: For head counts that do not divide, ``sr_ratio`` below 1, or a rate
            out of range.

    Source: Wang et al., "Pyramid Vision Transformer" (arXiv 2102.12122);
    ``PyramidAttention`` of LeapLabTHU/DAT.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        sr_ratio: int = 1,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ):
        super().__init__(dim, num_heads, num_kv_heads, attn_drop, proj_drop)
        check_int('sr_ratio', sr_ratio, 1)
        self.sr_ratio = sr_ratio
        self.q = nn.Conv2d(dim, dim, 1)
        self.kv = nn.Conv2d(dim, 2 * self.kv_dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)
        if sr_ratio > 1:
            self.proj_ds = nn.Sequential(
                nn.Conv2d(dim, dim, sr_ratio, sr_ratio), ChannelLayerNorm(dim)
            )

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        q = split_heads(self.q(x), self.num_heads)
        kv = split_heads(self.kv(self._reduce(x)), 2 * self.num_kv_heads)
        k, v = (repeat_kv(t, self.num_heads) for t in kv.chunk(2, dim=1))
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout_p)
        return self.proj_drop(self.proj(merge_heads(out, (height, width))))

    def _reduce(self, x: Tensor) -> Tensor:
        if self.sr_ratio == 1:
            return x
        # A map smaller than one cell of the reduction still gives one key.
        pad = [max(0, self.sr_ratio - side) for side in x.shape[2:]]
        if any(pad):  # F.pad would copy the map even if it adds nothing
            x = F.pad(x, (0, pad[1], 0, pad[0]))
        return self.proj_ds(x)
