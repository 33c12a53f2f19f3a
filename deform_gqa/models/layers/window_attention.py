"""Block letters L and S: window attention and shifted-window attention."""

import math

import torch
import torch.nn.functional as F
from mmdet.registry import MODELS
from mmengine.model.weight_init import trunc_normal_
from torch import Tensor, nn

from deform_gqa.checks import check_size
from deform_gqa.ops.common.heads import repeat_kv

from .base_attention import BaseAttention
from .heads import split_qkv
from .window_grid import WindowGrid

# What the official code adds to the logits of pairs from different image regions.
MASKED_LOGIT = -100.0
BIAS_ALIGNMENT = 8  # elements


def relative_position_index(window_size: tuple[int, int]) -> Tensor:
    """(h * w, h * w) index of each pair into a table of (2h - 1) * (2w - 1) rows."""
    height, width = window_size
    y = torch.arange(height).repeat_interleave(width)
    x = torch.arange(width).repeat(height)
    offset_y = y[:, None] - y[None, :] + height - 1
    offset_x = x[:, None] - x[None, :] + width - 1
    return offset_y * (2 * width - 1) + offset_x


@MODELS.register_module()
class WindowAttention(BaseAttention):
    """Attention within windows, with a learnt bias: (B, C, H, W) -> (B, C, H, W).

    Maps whose sides are not multiples of the window's are padded with zeros on the
    right and at the bottom, as in the official detection code.

    Args:
        dim: Number of channels C.
        num_heads: Query heads.
        num_kv_heads: Key/value heads; None for ``num_heads``.
        window_size: Side of the windows, or (height, width).
        attn_drop: Dropout of the attention weights, in [0, 1).
        proj_drop: Dropout of the output, in [0, 1).

    Raises:
        TypeError: For an option of the wrong type.
        ValueError: For head counts that do not divide, a ``window_size`` below 1, or a
            rate out of range.

    Source: Liu et al., "Swin Transformer" (arXiv 2103.14030); ``LocalAttention`` of
    LeapLabTHU/DAT.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        window_size: int | tuple[int, int] = 7,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ):
        super().__init__(dim, num_heads, num_kv_heads, attn_drop, proj_drop)
        self.window_size = check_size('window_size', window_size)
        self.shift = (0, 0)
        # None, or (kinds, h * w, h * w): what is added to the logits by kind of window
        self.register_buffer('masks', None, persistent=False)
        self.proj_qkv = nn.Linear(dim, dim + 2 * self.kv_dim)
        self.proj_out = nn.Linear(dim, dim)
        height, width = self.window_size
        self.relative_position_bias_table = nn.Parameter(
            torch.zeros((2 * height - 1) * (2 * width - 1), num_heads)
        )
        trunc_normal_(self.relative_position_bias_table, std=0.01)
        # Not stored, unlike in official checkpoints: the window size determines it.
        self.register_buffer(
            'relative_position_index',
            relative_position_index(self.window_size),
            persistent=False,
        )

    def forward(self, x: Tensor) -> Tensor:
        grid = WindowGrid(
            x.shape[0], x.shape[2:], self.window_size, self.shift, x.device
        )
        qkv = self.proj_qkv(grid.gather(x.permute(0, 2, 3, 1)))
        outs = [
            self._attend(windows, bias)
            for windows, bias in zip(
                qkv.split(grid.counts), self._biases(), strict=True
            )
            if windows.shape[0] > 0 or grid.batch == 0
        ]
        out = grid.scatter(torch.cat(outs) if len(outs) > 1 else outs[0])
        return self.proj_drop(self.proj_out(out)).permute(0, 3, 1, 2)

    def _attend(self, qkv: Tensor, bias: Tensor) -> Tensor:
        """(windows, h * w, C + 2 Ckv) -> (windows, h * w, C)."""
        q, k, v = split_qkv(qkv, self.num_heads, self.num_kv_heads)
        out = F.scaled_dot_product_attention(
            q,
            repeat_kv(k, self.num_heads),
            repeat_kv(v, self.num_heads),
            attn_mask=bias.to(q.dtype).unsqueeze(0),
            dropout_p=self.dropout_p,
        )
        return out.transpose(1, 2).flatten(2)

    def _biases(self) -> tuple[Tensor, ...]:
        """(heads, h * w, h * w) for each kind of window."""
        table, index = self.relative_position_bias_table, self.relative_position_index
        bias = table[index].permute(2, 0, 1).unsqueeze(0)
        if self.masks is not None:
            bias = bias + self.masks.unsqueeze(1)
        # Fused kernels would copy a bias whose rows are not aligned.
        padded = F.pad(bias, (0, -len(index) % BIAS_ALIGNMENT))
        return padded[..., : len(index)].unbind(0)


@MODELS.register_module()
class ShiftedWindowAttention(WindowAttention):
    """Window attention on the map shifted by half a window; correct for any map size.

    Args: As in :class:`WindowAttention`.

    Raises:
        TypeError: As :class:`WindowAttention`.
        ValueError: As :class:`WindowAttention`, and for a ``window_size`` below 2.

    Source: Liu et al. (arXiv 2103.14030); ``ShiftWindowAttention`` of LeapLabTHU/DAT,
    whose classification version is correct for the training size only and whose
    detection version does not run.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        window_size: int | tuple[int, int] = 7,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ):
        super().__init__(
            dim, num_heads, num_kv_heads, window_size, attn_drop, proj_drop
        )
        if min(self.window_size) < 2:
            raise ValueError(f'window_size must be at least 2, got {self.window_size}')
        self.shift = tuple(math.ceil(side / 2) for side in self.window_size)
        self.masks = self._region_masks()

    def _region_masks(self) -> Tensor:
        """(4, h * w, h * w) for each kind of window: MASKED_LOGIT between regions."""
        # In the last row and column of windows, the pixels that the shift brought in
        # from the opposite border are a region of their own.
        row, col = (
            torch.arange(side) >= side - shift
            for side, shift in zip(self.window_size, self.shift, strict=True)
        )
        rows = row.repeat_interleave(len(col))
        cols = col.repeat(len(row))
        whole = torch.zeros_like(rows)
        regions = torch.stack([whole, cols, rows, rows + 2 * cols.int()])
        apart = regions.unsqueeze(1) != regions.unsqueeze(2)
        return torch.zeros(apart.shape).masked_fill_(apart, MASKED_LOGIT)
