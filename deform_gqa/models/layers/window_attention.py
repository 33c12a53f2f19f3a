"""Block letters L and S: window attention and shifted-window attention."""

import math

import torch
import torch.nn.functional as F
from mmdet.registry import MODELS
from mmengine.model.weight_init import trunc_normal_
from mmengine.utils import to_2tuple
from torch import Tensor, nn

from deform_gqa.ops.naive import repeat_kv

from .heads import check_heads

# What the official code adds to the logits of pairs from different image regions.
MASKED_LOGIT = -100.0


def relative_position_index(window_size: tuple[int, int]) -> Tensor:
    """(h * w, h * w) index of each pair into a table of (2h - 1) * (2w - 1) rows."""
    height, width = window_size
    y = torch.arange(height).repeat_interleave(width)
    x = torch.arange(width).repeat(height)
    offset_y = y[:, None] - y[None, :] + height - 1
    offset_x = x[:, None] - x[None, :] + width - 1
    return offset_y * (2 * width - 1) + offset_x


@MODELS.register_module()
class WindowAttention(nn.Module):
    """Attention within windows, with a learnt bias: (B, C, H, W) -> (B, C, H, W).

    Maps that windows do not divide are padded with zeros on the right and at the
    bottom, as in the official detection code.

    Args:
        dim: Number of channels C.
        num_heads: Query heads.
        num_kv_heads: Key/value heads; None for ``num_heads``.
        window_size: Side of the windows, or (height, width).
        attn_drop: Dropout of the attention weights, in [0, 1).
        proj_drop: Dropout of the output, in [0, 1).

    Raises:
        ValueError: For head counts that do not divide or a ``window_size`` below 1.

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
        super().__init__()
        self.num_heads = num_heads
        self.num_kv_heads = check_heads(dim, num_heads, num_kv_heads)
        self.window_size = to_2tuple(window_size)
        if min(self.window_size) < 1:
            raise ValueError(f'window_size must be at least 1, got {window_size}')
        head_dim = dim // num_heads
        self.proj_qkv = nn.Linear(dim, dim + 2 * head_dim * self.num_kv_heads)
        self.proj_out = nn.Linear(dim, dim)
        self.attn_drop = attn_drop
        self.proj_drop = nn.Dropout(proj_drop)
        height, width = self.window_size
        self.relative_position_bias_table = nn.Parameter(
            torch.zeros((2 * height - 1) * (2 * width - 1), num_heads)
        )
        trunc_normal_(self.relative_position_bias_table, std=0.01)
        # Official checkpoints hold this index too; it follows from the window size.
        self.register_buffer(
            'relative_position_index',
            relative_position_index(self.window_size),
            persistent=False,
        )

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        x = self._pad(x)
        return self._attend(x, mask=None)[..., :height, :width]

    def _pad(self, x: Tensor) -> Tensor:
        pad_h, pad_w = (
            -side % w for side, w in zip(x.shape[2:], self.window_size, strict=True)
        )
        return F.pad(x, (0, pad_w, 0, pad_h)) if pad_h or pad_w else x

    def _attend(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x (B, C, H, W) of whole windows; mask (windows, h * w, h * w) or None."""
        batch, channels, height, width = x.shape
        win_h, win_w = self.window_size
        rows, cols = height // win_h, width // win_w
        windows = x.reshape(batch, channels, rows, win_h, cols, win_w)
        # (B, windows, h * w, C)
        windows = windows.permute(0, 2, 4, 3, 5, 1).reshape(
            batch, rows * cols, win_h * win_w, channels
        )
        q, k, v = (
            self.proj_qkv(windows)
            .unflatten(3, (self.num_heads + 2 * self.num_kv_heads, -1))
            .transpose(2, 3)
            .split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=2)
        )
        k, v = (repeat_kv(t.flatten(0, 1), self.num_heads) for t in (k, v))
        out = F.scaled_dot_product_attention(
            q,
            k.unflatten(0, q.shape[:2]),
            v.unflatten(0, q.shape[:2]),
            attn_mask=self._bias(mask).to(q.dtype),
            dropout_p=self.attn_drop if self.training else 0.0,
        )
        out = self.proj_drop(self.proj_out(out.transpose(2, 3).flatten(3)))
        out = out.reshape(batch, rows, cols, win_h, win_w, channels)
        return out.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, height, width)

    def _bias(self, mask: Tensor | None) -> Tensor:
        """(heads, h * w, h * w), or (windows, heads, h * w, h * w) with a mask."""
        table = self.relative_position_bias_table
        bias = table[self.relative_position_index].permute(2, 0, 1)
        return bias if mask is None else bias + mask.unsqueeze(1)


@MODELS.register_module()
class ShiftedWindowAttention(WindowAttention):
    """Window attention on the map shifted by half a window; right for any map size.

    Args: as in :class:`WindowAttention`.

    Raises:
        ValueError: As :class:`WindowAttention`, and for a ``window_size`` below 2.

    Source: Liu et al. (arXiv 2103.14030); ``ShiftWindowAttention`` of LeapLabTHU/DAT,
    whose classification version is right for the training size alone and whose
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

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        x = self._pad(x)
        mask = self._region_mask(x)
        x = torch.roll(x, tuple(-s for s in self.shift), dims=(2, 3))
        x = torch.roll(self._attend(x, mask), self.shift, dims=(2, 3))
        return x[..., :height, :width]

    def _region_mask(self, x: Tensor) -> Tensor:
        """(windows, h * w, h * w): 0 within a region of the map, else masked."""
        regions = [
            self._region(side, window, shift, x)
            for side, window, shift in zip(
                x.shape[2:], self.window_size, self.shift, strict=True
            )
        ]
        win_h, win_w = self.window_size
        region = 3 * regions[0][:, None] + regions[1]
        region = region.unflatten(1, (-1, win_w)).unflatten(0, (-1, win_h))
        region = region.transpose(1, 2).flatten(2).flatten(0, 1)
        same = region.unsqueeze(1) == region.unsqueeze(2)
        return torch.zeros_like(same, dtype=x.dtype).masked_fill_(~same, MASKED_LOGIT)

    @staticmethod
    def _region(side: int, window: int, shift: int, x: Tensor) -> Tensor:
        """Region of each row (or column) of the shifted map: 0, 1 or 2."""
        index = torch.arange(side, device=x.device)
        return (index >= side - window).long() + (index >= side - shift).long()
