"""Pictures of recorded attention: the sampled points over the image."""

from collections.abc import Sequence

import numpy as np

from .record import RecordedAttention, SharedSamples

# The colour-blind-safe palette of Okabe and Ito, without black.
GROUP_COLOURS = (
    '#E69F00',
    '#56B4E9',
    '#009E73',
    '#F0E442',
    '#0072B2',
    '#D55E00',
    '#CC79A7',
)
WEIGHT_COLOURS = 'plasma'  # readable without red and green
MAX_HEADS = 8
_PANEL_INCHES = 3.2
_DPI = 110
_LARGEST_POINT = 90.0  # square points of the heaviest sample
_SHADE = 0.55  # of the image beneath


def draw_attention(
    image: np.ndarray,
    record: RecordedAttention,
    queries: Sequence[int],
    *,
    index: int = 0,
    area: tuple[float, float] = (1.0, 1.0),
    heads: Sequence[int] | None = None,
):
    """Sampled points and attention weights of some queries, over the image.

    A deformable block of DAT gets a row for its offset groups: the reference grid, and
    an arrow from each of its points to where the map was sampled. Then each query has a
    row with a panel for each head; the heavier a sample, the larger and lighter it is.

    Args:
        image: (h, w, 3), RGB, uint8.
        record: Of :func:`record_attention`.
        queries: Indices of queries; ``record.nearest_query`` finds one.
        index: Of the image in the batch.
        area: How far the image reaches in the map, (x, y): less than 1 where the batch
            is padded.
        heads: Query heads to draw; None for the first eight.

    Returns:
        A matplotlib Figure.

    Raises:
        ValueError: For a query or head that does not exist.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    heads = _check_heads(heads, record.num_heads)
    _check_queries(queries, record.query_points.shape[1])
    rows = [] if not isinstance(record, SharedSamples) else [record.sampled[index]]
    columns = max([len(heads), *map(len, rows)])
    lines = len(rows) + len(queries)
    height, width = image.shape[:2]
    panel = _PANEL_INCHES * min(1.5, max(0.5, height / width))
    size = _PANEL_INCHES * columns, (panel + 0.3) * lines
    figure = Figure(size, dpi=_DPI, layout='constrained')
    FigureCanvasAgg(figure)
    figure.suptitle(record.name)
    scale = np.array([width / area[0], height / area[1]])
    panels = figure.subplots(lines, columns, squeeze=False)
    for axes in panels.flat:
        axes.set_axis_off()
    for line in range(len(rows)):
        for group in range(len(rows[line])):
            axes = _show(panels[line, group], image, f'offset group {group}')
            _draw_offsets(axes, record, index, group, scale)
    for line, query in enumerate(queries, len(rows)):
        points, weights = record.samples(index, query)
        points, weights = _numpy(points) * scale, _numpy(weights)
        place = _numpy(record.query_points[index, query]) * scale
        largest = weights[list(heads)].max()
        for column, head in enumerate(heads):
            axes = _show(panels[line, column], image, f'head {head}')
            mark = _draw_samples(axes, points[head], weights[head], largest, place)
        figure.colorbar(mark, ax=list(panels[line]), label='attention weight')
    return figure


def figure_to_image(figure) -> np.ndarray:
    """(h, w, 3), RGB, uint8, as mmengine's visualizers take it."""
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()


def _check_heads(heads: Sequence[int] | None, num_heads: int) -> Sequence[int]:
    if heads is None:
        return range(min(num_heads, MAX_HEADS))
    for head in heads:
        if not 0 <= head < num_heads:
            raise ValueError(f'heads must be from 0 to {num_heads - 1}, got {head}')
    return heads


def _check_queries(queries: Sequence[int], num_queries: int) -> None:
    if not queries:
        raise ValueError('queries must name at least one query, got none')
    for query in queries:
        if not 0 <= query < num_queries:
            raise ValueError(
                f'queries must be from 0 to {num_queries - 1}, got {query}'
            )


def _numpy(x) -> np.ndarray:
    return x.detach().float().cpu().numpy()


def _show(axes, image: np.ndarray, title: str):
    """The image, shaded so that marks stand out."""
    height, width = image.shape[:2]
    axes.imshow(
        (image * _SHADE).astype(np.uint8), extent=(0, width, height, 0), zorder=0
    )
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.set_title(title, fontsize=9)
    return axes


def _draw_offsets(
    axes, record: SharedSamples, index: int, group: int, scale: np.ndarray
) -> None:
    start = _numpy(record.reference) * scale
    end = _numpy(record.sampled[index, group]) * scale
    colour = GROUP_COLOURS[group % len(GROUP_COLOURS)]
    axes.scatter(*start.T, s=4, color='white', linewidths=0, zorder=1)
    options = dict(angles='xy', scale_units='xy', scale=1, width=0.004, zorder=2)
    axes.quiver(*start.T, *(end - start).T, color=colour, **options)


def _draw_samples(
    axes, points: np.ndarray, weights: np.ndarray, largest: float, query: np.ndarray
):
    """The mark of the samples; those of ``largest`` weight have the largest points."""
    order = np.argsort(weights)  # the heaviest on top
    points, weights = points[order], weights[order]
    mark = axes.scatter(
        *points.T,
        s=2 + _LARGEST_POINT * weights / largest,
        c=weights,
        cmap=WEIGHT_COLOURS,
        vmin=0,
        vmax=largest,
        linewidths=0.4,
        edgecolors='black',
        zorder=2,
    )
    axes.scatter(
        *query[:, None],
        s=130,
        marker='*',
        color='white',
        edgecolors='black',
        zorder=3,
    )
    return mark
