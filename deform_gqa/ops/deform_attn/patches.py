"""Which patches of queries the programs of a kernel work on (host side, pure)."""

import dataclasses
import math

# Instructions per (query, key) pair of the compiled forward kernel, fitted to a few
# patch shapes: a constant, a share of the column weights and one of the row loads.
COST, COST_COLUMNS, COST_ROWS, COST_TILE = 12.0, 8.0, 10.0, 600.0
MIN_WINDOW, MAX_WINDOW, MAX_SUMMED_WINDOW = 8, 64, 32
# A patch that costs so much more than the cheapest is taken if more maps share it: each
# shape is a kernel that Triton compiles.
TOLERANCE = 1.05


@dataclasses.dataclass(frozen=True)
class TableAxis:
    """t = base + index * step + (1 - pos) * half, in cells of the table."""

    step: float
    half: float
    base: float


def axis_of(size: int, table_size: int) -> TableAxis:
    """The affine map of DESIGN 4.1 along one axis."""
    half = (table_size - 1) / 4
    if size == 1:
        return TableAxis(0.0, half, half)
    return TableAxis(2 * half / (size - 1), half, 0.0)


@dataclasses.dataclass(frozen=True)
class Patch:
    """rows x cols queries; they reach ``window`` table columns from one key."""

    rows: int
    cols: int
    window: int


def window_of(step: float, count: int) -> int:
    """Cells reached by ``count`` neighboring queries: a power of two, at least 8."""
    cells = math.ceil(step * (count - 1) - 1e-6) + 2
    return max(MIN_WINDOW, 1 << (cells - 1).bit_length())


def choose_patch(most: int, height: int, width: int, step_x: float) -> Patch:
    """The cheapest patch of at most ``most`` queries: padding counts, tiles too.

    Args:
        height: Rows of the map, times the heads that are stacked.
    """

    def cost(patch: Patch) -> float:
        queries = patch.rows * patch.cols
        padded = (
            math.ceil(height / patch.rows) * math.ceil(width / patch.cols) * queries
        )
        return padded * (
            COST
            + COST_COLUMNS * patch.window / patch.rows
            + COST_ROWS * patch.window / patch.cols
            + COST_TILE / queries
        )

    candidates = [
        Patch(rows, cols, window_of(step_x, cols))
        for rows in (8, 16, 32)
        for cols in (1, 2, 4, 8, 16, 32, 64)
        if 16 <= rows * cols <= most
    ]
    candidates = [p for p in candidates if p.window <= MAX_WINDOW]
    # Large and square ones first.
    candidates.sort(key=lambda p: (-p.rows * p.cols, abs(p.rows - p.cols)))
    costs = [cost(p) for p in candidates]
    affordable = TOLERANCE * min(costs)
    return next(p for p, c in zip(candidates, costs, strict=True) if c <= affordable)


def choose_backward_patch(most: int, height: int, width: int, step_x: float) -> Patch:
    """As choose_patch, among shapes whose sums over columns are tensor-core products.

    Where the table is so fine that 16 columns reach too far, patches are one column
    wide and need no sum.
    """
    window = window_of(step_x, 16)
    if window > MAX_SUMMED_WINDOW:
        return Patch(16, 1, window_of(step_x, 1))
    shapes = [(rows, 16) for rows in (16, 8) if rows * 16 <= most]
    rows, cols = min(
        shapes or [(4, 16)],
        key=lambda shape: math.ceil(height / shape[0]) * (shape[0] + 4),
    )
    return Patch(rows, cols, window)


def rows_window(step_y: float, rows: int) -> int:
    """Table rows reached by the rows of a patch (a power of two), 0 if not summed.

    The sum is a product over at least 16 rows and pays if they share table rows.
    """
    if rows < 16 or step_y > 0.75:
        return 0
    return window_of(step_y, rows)


def flat_patch(most: int, num_queries: int) -> Patch:
    """Without a bias the map is one column of all queries."""
    return Patch(min(most, max(16, 1 << (num_queries - 1).bit_length())), 1, 0)
