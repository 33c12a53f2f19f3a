"""Block letter N: neighborhood attention."""

import torch
import torch.nn.functional as F
from mmdet.registry import MODELS
from mmengine.model.weight_init import trunc_normal_
from torch import Tensor, nn

from deform_gqa.checks import check_int
from deform_gqa.ops import neighborhood_attn

from .base_attention import BaseAttention
from .heads import split_qkv


@MODELS.register_module()
class NeighborhoodAttention(BaseAttention):
    """Attention of each pixel to the K x K pixels around it, with a learnt bias.

    (B, C, H, W) -> (B, C, H, W). Maps smaller than the window are padded with zeros
    on the right and at the bottom, as in the official code.

    Args:
        dim: Number of channels C.
        num_heads: Query heads.
        num_kv_heads: Key/value heads; None for ``num_heads``.
        kernel_size: Odd side K of the window, at least 3.
        dilation: Step between the pixels of a window.
        attn_drop: Dropout of the attention weights, in [0, 1).
        proj_drop: Dropout of the output, in [0, 1).
        backend: Backend of :func:`deform_gqa.ops.neighborhood_attn`.

    Raises:
        TypeError: For an option of the wrong type.
        ValueError: For head counts that do not divide, a ``kernel_size`` that is even
            or below 3, a ``dilation`` below 1, a rate out of range, an unknown backend.

    Source: Hassani et al. (arXiv 2204.07143); ``NeighborhoodAttention2D`` of
    LeapLabTHU/DAT on NATTEN 0.14.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        kernel_size: int = 7,
        dilation: int = 1,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        backend: str = 'auto',
    ):
        super().__init__(dim, num_heads, num_kv_heads, attn_drop, proj_drop, backend)
        check_int('kernel_size', kernel_size, 1)
        if kernel_size < 3 or kernel_size % 2 == 0:
            raise ValueError(
                f'kernel_size must be odd and at least 3, got {kernel_size}'
            )
        check_int('dilation', dilation, 1)
        self.kernel_size = kernel_size
        self.dilation = dilation
        self.qkv = nn.Linear(dim, dim + 2 * self.kv_dim)
        side = 2 * kernel_size - 1
        self.rpb = nn.Parameter(torch.zeros(num_heads, side, side))
        trunc_normal_(self.rpb, std=0.02)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        window = self.kernel_size * self.dilation
        x = x.permute(0, 2, 3, 1)
        pad_h, pad_w = max(0, window - height), max(0, window - width)
        if pad_h or pad_w:
            x = F.pad(x, (0, 0, 0, pad_w, 0, pad_h))
        grid_size = x.shape[1:3]
        tokens = self.qkv(x).flatten(1, 2)
        q, k, v = split_qkv(tokens, self.num_heads, self.num_kv_heads)
        out = neighborhood_attn(
            q,
            k,
            v,
            self.rpb,
            grid_size=tuple(grid_size),
            kernel_size=self.kernel_size,
            dilation=self.dilation,
            dropout_p=self.dropout_p,
            backend=self.backend,
        )
        out = out.transpose(1, 2).flatten(2).unflatten(1, grid_size)
        out = self.proj(out[:, :height, :width])
        return self.proj_drop(out).permute(0, 3, 1, 2)
