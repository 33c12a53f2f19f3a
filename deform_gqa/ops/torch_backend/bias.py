"""The interpolated relative position bias of a tile as a product of small matrices.

Bilinear interpolation is separable: for one key s the bias of a tile of query rows
and columns is ``A_s T_s C_s^T``, where T_s is the window of the table that the tile
can reach and A_s, C_s hold the two tap weights of each row and column. The windows
are small because a tile spans few table cells, so the products cost little.
"""

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor


def pad_table(rpb_table: Tensor, dtype: torch.dtype) -> Tensor:
    """(Hq, Th, Tw) -> (Hq, Th + 2, Tw + 2): the zeros read outside the table."""
    return F.pad(rpb_table.to(dtype), (1, 1, 1, 1))


@dataclasses.dataclass
class AxisTaps:
    """Where the queries of a tile read the padded table along one axis.

    Attributes:
        start: (X, S) first table index of each key's window, int64.
        weights: (X, S, n, m) tap weights of n queries over the m window cells.
        slopes: (X, S, n, m) their derivative by the key's position.
    """

    start: Tensor
    weights: Tensor
    slopes: Tensor | None


def axis_taps(
    pos: Tensor,
    first: int,
    count: int,
    size: int,
    table_size: int,
    with_slopes: bool,
) -> AxisTaps:
    """Taps of the queries first .. first + count of an axis of ``size`` queries.

    Args:
        pos: (X, S) key positions along the axis in [-1, 1] (others are allowed).
        table_size: Length of the unpadded table along the axis.
        with_slopes: Whether to compute the derivative too.
    """
    half = (table_size - 1) / 2
    if size == 1:
        query = pos.new_full((count,), half / 2)
    else:
        index = torch.arange(first, first + count, dtype=pos.dtype, device=pos.device)
        query = index * (half / (size - 1))
    t = query + (half / 2 * (1 - pos)).unsqueeze(-1)
    # One cell of zeros lies before and behind the table; farther out all is zero.
    tap = (t + 1).clamp(0, table_size + 1)
    step = half / max(size - 1, 1)
    window = min(math.floor(step * (count - 1)) + 3, table_size + 2)
    start = tap[..., 0].floor().clamp(max=table_size + 2 - window)
    tap = (tap - start.unsqueeze(-1)).unsqueeze(-1)
    cells = torch.arange(window, dtype=pos.dtype, device=pos.device)
    distance = tap - cells
    slopes = None
    if with_slopes:
        # +1 on the upper tap, -1 on the lower one, none where t is clamped
        cell = tap.floor()
        slopes = (cells == cell + 1).to(pos.dtype) - (cells == cell).to(pos.dtype)
        inside = ((t >= -1) & (t < table_size)).unsqueeze(-1)
        slopes.mul_(inside * (-half / 2))
    weights = distance.abs_().neg_().add_(1).clamp_(min=0)
    return AxisTaps(start.long(), weights, slopes)


class TileBias:
    """Bias of one tile for some (batch, offset group) pairs, and its gradients.

    Shapes: X pairs, h heads a pair, S keys, r query rows, c query columns.

    Args:
        table: (Hq, Th + 2, Tw + 2) padded table.
        heads: (X, h) table index of each head, int64.
        rows: Taps of the tile's query rows.
        cols: Taps of its columns.
    """

    def __init__(self, table: Tensor, heads: Tensor, rows: AxisTaps, cols: AxisTaps):
        self.rows, self.cols = rows, cols
        table_h, table_w = table.shape[1:]
        num_rows, num_cols = rows.weights.shape[-1], cols.weights.shape[-1]
        corner = rows.start * table_w + cols.start
        cell = torch.arange(num_rows, device=table.device)[
            :, None
        ] * table_w + torch.arange(num_cols, device=table.device)
        # (X, S, h, my, mx) flat indices into the table
        self.index = (
            (heads * (table_h * table_w))[:, None, :, None, None]
            + corner[:, :, None, None, None]
            + cell
        )
        self.window = table.reshape(-1)[self.index]
        # (X, S, h * my, mx) (X, S, mx, c) -> (X, h, S, my, c)
        along_x = self.window.flatten(2, 3) @ cols.weights.transpose(2, 3)
        along_x = along_x.unflatten(2, self.window.shape[2:4])
        self.along_x = along_x.transpose(1, 2).contiguous()

    def value(self) -> Tensor:
        """(X * h, S, r * c)."""
        bias = self.rows.weights.unsqueeze(1) @ self.along_x
        return bias.flatten(3, 4).flatten(0, 1)

    def backward(self, grad: Tensor, table_grad: Tensor) -> tuple[Tensor, Tensor]:
        """Adds to ``table_grad`` (Hq * (Th + 2) * (Tw + 2),) in place.

        Args:
            grad: (X * h, S, r * c) gradient of the bias.

        Returns:
            Gradients of the key positions along y and x, each (X, S).
        """
        pairs, heads, keys, _, num_cols = self.along_x.shape
        grad = grad.view(pairs, heads, keys, -1, num_cols)
        grad_rows = (grad @ self.along_x.transpose(3, 4)).sum(1)
        grad_y = (grad_rows * self.rows.slopes).sum((2, 3))
        # (X, h, S, my, c) -> (X, S, h * my, c)
        grad_along_x = self.rows.weights.unsqueeze(1).transpose(3, 4) @ grad
        grad_along_x = grad_along_x.transpose(1, 2).flatten(2, 3)
        grad_cols = grad_along_x.transpose(2, 3) @ self.window.flatten(2, 3)
        grad_x = (grad_cols * self.cols.slopes).sum((2, 3))
        grad_window = grad_along_x @ self.cols.weights
        table_grad.index_add_(0, self.index.flatten(), grad_window.flatten())
        return grad_y, grad_x
