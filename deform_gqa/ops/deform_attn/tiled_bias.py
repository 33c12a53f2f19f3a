"""The interpolated relative position bias of a tile as a product of small matrices.

Bilinear interpolation is separable: for one key s the bias of a tile of query rows
and columns is ``A_s T_s C_s^T``, where T_s is the window of the table that the tile
can reach and A_s, C_s hold the two tap weights of each row and column. The windows
are small because queries span few table cells, so the products cost little. Tiles below
each other share ``T_s C_s^T``, which is made once for a band of them. The other product
of the forward, whose result has the size of the tile, is an embedding bag: it reads the
two rows that count instead of multiplying all of them.
"""

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.constants import LN2, LOG2E


def pad_table(rpb_table: Tensor, dtype: torch.dtype) -> Tensor:
    """(Hq, Th, Tw) -> (Hq, Th + 2, Tw + 2) times LOG2E: zeros are read outside it."""
    return F.pad(rpb_table.to(dtype) * LOG2E, (1, 1, 1, 1))


@dataclasses.dataclass
class AxisTaps:
    """Where the queries of a tile read the padded table along one axis.

    X counts pairs of batch and head.

    Attributes:
        start: (X, S) first table index of each key's window, int64.
        size: Number m of cells in a window.
        lower: (X, S, n) lower tap of each of n queries, from the window's start; the
            upper tap is the next cell.
        weights: (X, S, n, m) tap weights.
        with_slopes: (X, S, n, 2 m), the weights and beside them their derivatives by
            the key's position; None if they were not asked for.
    """

    start: Tensor
    size: int
    lower: Tensor
    weights: Tensor
    with_slopes: Tensor | None


def axis_taps(
    pos: Tensor, span: slice, size: int, table_size: int, with_slopes: bool
) -> AxisTaps:
    """Taps of some queries of an axis that has ``size`` queries.

    Args:
        pos: (X, S) key positions along the axis in [-1, 1] (others are allowed; for a
            NaN all queries read zeros).
        span: The n queries.
        table_size: Length of the unpadded table along the axis.
        with_slopes: Whether to compute the derivatives too.
    """
    half = (table_size - 1) / 2
    if size == 1:
        query = pos.new_full((1,), half / 2)
    else:
        index = torch.arange(span.start, span.stop, dtype=pos.dtype, device=pos.device)
        query = index * (half / (size - 1))
    t = query + (half / 2 * (1 - pos)).unsqueeze(-1)
    # One cell of zeros lies before and behind the table; farther out all is zero.
    tap = (t + 1).nan_to_num_(nan=0).clamp_(0, table_size + 1)
    window = window_size(span.stop - span.start, size, table_size)
    start = tap[..., 0].floor().clamp(max=table_size + 2 - window)
    tap = (tap - start.unsqueeze(-1)).unsqueeze(-1)
    lower = tap.floor().clamp_(max=window - 2)
    cells = torch.arange(window, dtype=pos.dtype, device=pos.device)
    weights = (tap - cells).abs_().neg_().add_(1).clamp_(min=0)
    taps = AxisTaps(start.long(), window, lower[..., 0].long(), weights, None)
    if with_slopes:
        # +1 on the upper tap, -1 on the lower one, none where t is clamped
        upper = cells - lower
        slopes = (upper == 1).to(pos.dtype).sub_((upper == 0).to(pos.dtype))
        inside = ((t >= -1) & (t < table_size)).unsqueeze(-1)
        slopes.mul_(inside * (-half / 2))
        taps.with_slopes = torch.cat([weights, slopes], dim=-1)
    return taps


def table_step(size: int, table_size: int) -> float:
    """Table cells from one query to the next along an axis of ``size`` queries."""
    return (table_size - 1) / 2 / max(size - 1, 1)


def window_size(num_queries: int, size: int, table_size: int) -> int:
    """Cells of the padded table that neighbouring queries of an axis can reach."""
    reach = math.floor(table_step(size, table_size) * (num_queries - 1))
    return min(reach + 3, table_size + 2)


class BandBias:
    """Bias of a band of query rows along the columns of a tile.

    Shapes: X pairs, S keys, m table rows that the band reaches, c query columns.

    Args:
        table: (Hq, Th + 2, Tw + 2) from :func:`pad_table`.
        heads: (X,) head of each pair, int64.
        start: (X, S) first table row of each key, int64.
        size: m.
        cols: Taps of the columns; with slopes if gradients are asked for.
    """

    def __init__(
        self, table: Tensor, heads: Tensor, start: Tensor, size: int, cols: AxisTaps
    ):
        self.table, self.cols = table, cols
        # (X, S) where the row and the columns of each key start in the table.
        self.corner = heads[:, None] * table[0].numel() + cols.start
        window = self.cells(self.index(start, size), size)
        self.along_x = (window @ cols.weights.transpose(2, 3)).flatten(0, 2)

    def index(self, start: Tensor, size: int) -> Tensor:
        """(X S m mx,) flat indices of ``size`` rows from ``start`` (X, S) on."""
        width = self.table.shape[2]
        row = torch.arange(size, device=start.device) * width
        cell = row[:, None] + torch.arange(self.cols.size, device=start.device)
        corner = self.corner + start * width
        return (corner[..., None, None] + cell).flatten()

    def cells(self, index: Tensor, size: int) -> Tensor:
        """(X, S, m, mx) of the table."""
        cells = self.table.reshape(-1).index_select(0, index)
        return cells.view(*self.corner.shape, size, self.cols.size)


@dataclasses.dataclass
class BandRows:
    """Rows of a band's ``along_x`` that the queries of a tile read.

    Attributes:
        taps: Of the tile's rows of queries.
        bags: (X S n, 2), the two of each row of queries.
        weights: (X S n, 2), what they count.
        window: (X S m,), all in the window of ``taps``.
    """

    taps: AxisTaps
    bags: Tensor
    weights: Tensor
    window: Tensor

    @classmethod
    def of(cls, taps: AxisTaps, start: Tensor, size: int) -> 'BandRows':
        """Those in a band whose table rows are ``size`` from ``start`` (X, S) on."""
        keys = torch.arange(start.numel(), device=start.device).view_as(start)
        first = (keys * size + (taps.start - start)).unsqueeze(-1)
        pair = torch.stack([taps.lower, taps.lower + 1], dim=-1)
        return cls(
            taps,
            (first.unsqueeze(-1) + pair).view(-1, 2),
            taps.weights.gather(-1, pair).view(-1, 2),
            (first + torch.arange(taps.size, device=start.device)).flatten(),
        )


@dataclasses.dataclass
class TileBias:
    """Bias of one tile for some (batch, head) pairs, and its gradients.

    Shapes: X pairs, S keys, r query rows, c query columns.
    """

    band: BandBias
    rows: BandRows

    def value(self) -> Tensor:
        """(X, S, r * c) in units of ln 2."""
        bias = F.embedding_bag(
            self.rows.bags,
            self.band.along_x,
            per_sample_weights=self.rows.weights,
            mode='sum',
        )
        return bias.view(*self.rows.taps.start.shape, -1)

    def backward(self, grad: Tensor, table_grad: Tensor) -> tuple[Tensor, Tensor]:
        """Adds to ``table_grad`` (Hq * (Th + 2) * (Tw + 2),) in place.

        Taps must have slopes: one product gives the gradient of the table's cells and,
        beside it, what summed up with the cells is that of the position.

        Args:
            grad: (X, S, r * c) gradient of the bias in natural units.

        Returns:
            Gradients of the key positions along y and x, each (X, S).
        """
        rows, cols = self.rows.taps, self.band.cols
        grad = grad.unflatten(2, (rows.weights.shape[2], -1))
        grad_rows = rows.with_slopes.transpose(2, 3) @ grad
        grad_along_x, slope_y = grad_rows.split(rows.size, dim=2)
        grad_cells = grad_along_x @ cols.with_slopes
        grad_window, slope_x = grad_cells.split(cols.size, dim=3)
        index = self.band.index(rows.start, rows.size)
        table_grad.index_add_(0, index, grad_window.flatten())
        along_x = self.band.along_x.index_select(0, self.rows.window)
        grad_y = (slope_y * along_x.view_as(slope_y)).sum((2, 3))
        grad_x = (slope_x * self.band.cells(index, rows.size)).sum((2, 3))
        return grad_y.mul_(LN2), grad_x.mul_(LN2)
