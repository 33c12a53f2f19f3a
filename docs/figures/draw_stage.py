"""Draws docs/figures/stage.png: how a deformable block with grouped heads works.

    python docs/figures/draw_stage.py

A schematic, not the offsets of a trained model. Needs numpy and matplotlib.
"""

import itertools
import pathlib

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch, FancyBboxPatch, Rectangle

matplotlib.use('Agg')

OUT = pathlib.Path(__file__).with_name('stage.png')
HEIGHT, WIDTH = 18, 20  # the map, in pixels
GRID = (4, 4)  # reference points
# Okabe and Ito's colours, which colour-blind people tell apart; markers differ too.
GROUPS = (('#0072B2', 'o'), ('#D55E00', '^'))
QUERY_COLOR = '#111111'
GREY = '#767676'
QUERIES = ((2, 2), (15, 15))  # (row, column) of the two that are shown


def inside_fish(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Where the object is: an ellipse and a tail."""
    body = ((x - 8.4) / 5.6) ** 2 + ((y - 9.2) / 3.7) ** 2 < 1
    tail = (x > 12.6) & (x < 17.6) & (abs(y - 9.2) < 0.75 * (x - 11.9))
    return body | tail


def object_map() -> np.ndarray:
    """(HEIGHT, WIDTH) coverage of each pixel by the object, 0 to 1."""
    fine = 8
    y, x = np.mgrid[: HEIGHT * fine, : WIDTH * fine] / fine + 0.5 / fine - 0.5
    image = inside_fish(y, x).astype(float)
    return image.reshape(HEIGHT, fine, WIDTH, fine).mean(axis=(1, 3))


def reference_points() -> np.ndarray:
    """(S, 2) centres, in (y, x), of the cells of the coarse grid."""
    rows = (np.arange(GRID[0]) + 0.5) * HEIGHT / GRID[0] - 0.5
    cols = (np.arange(GRID[1]) + 0.5) * WIDTH / GRID[1] - 0.5
    return np.stack(np.meshgrid(rows, cols, indexing='ij'), axis=-1).reshape(-1, 2)


def sampled_points(group: int) -> np.ndarray:
    """(S, 2) reference points moved towards a part of the object: body or tail."""
    points = reference_points()
    center = np.array([(9.2, 7.4), (9.2, 13.2)][group])
    toward = center - points
    distance = np.linalg.norm(toward, axis=1, keepdims=True)
    step = np.minimum(0.58 * distance, 4.4)
    noise = np.random.default_rng(group + 3).normal(0, 0.4, points.shape)
    return points + toward / np.maximum(distance, 1e-6) * step + noise


def draw_map(ax: Axes, strength: float) -> None:
    """The feature map, grey where the object is."""
    ax.imshow(object_map() * strength, cmap='Greys', vmin=0, vmax=1, zorder=0)
    lines = dict(color='#DDDDDD', linewidth=0.5, zorder=1)
    ax.hlines(np.arange(HEIGHT + 1) - 0.5, -0.5, WIDTH - 0.5, **lines)
    ax.vlines(np.arange(WIDTH + 1) - 0.5, -0.5, HEIGHT - 0.5, **lines)
    ax.set_xlim(-0.7, WIDTH - 0.3)
    ax.set_ylim(HEIGHT - 0.3, -0.7)
    ax.axis('off')


def draw_queries(ax: Axes) -> None:
    for y, x in QUERIES:
        ax.add_patch(
            Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=QUERY_COLOR, zorder=5)
        )


def draw_samples(ax: Axes, group: int, **style) -> None:
    color, marker = GROUPS[group]
    points = sampled_points(group)
    ax.scatter(
        points[:, 1],
        points[:, 0],
        s=30,
        marker=marker,
        color=color,
        edgecolor='white',
        linewidth=0.6,
        zorder=4,
        **style,
    )


def queries_panel(ax: Axes) -> None:
    draw_map(ax, 0.55)
    draw_queries(ax)
    names = (('a query', 'left', 0.9), ('another query', 'right', -0.9))
    for (y, x), (name, side, shift) in zip(QUERIES, names, strict=True):
        ax.text(x + shift, y + 0.05, name, fontsize=11, ha=side, va='center')


def offsets_panel(ax: Axes) -> None:
    draw_map(ax, 0.35)
    start = reference_points()
    ax.scatter(
        start[:, 1],
        start[:, 0],
        s=26,
        facecolor='white',
        edgecolor=GREY,
        linewidth=1.1,
        zorder=3,
    )
    for group, (color, _) in enumerate(GROUPS):
        for begin, end in zip(start, sampled_points(group), strict=True):
            ax.annotate(
                '',
                xy=end[::-1],
                xytext=begin[::-1],
                arrowprops=dict(
                    arrowstyle='-|>',
                    color=color,
                    linewidth=1.3,
                    mutation_scale=8,
                    shrinkA=2.5,
                    shrinkB=0,
                ),
                zorder=4,
            )


def samples_panel(ax: Axes) -> None:
    draw_map(ax, 0.35)
    for y, x in QUERIES:
        for group, (color, _) in enumerate(GROUPS):
            for sample_y, sample_x in sampled_points(group):
                ax.plot(
                    (x, sample_x),
                    (y, sample_y),
                    color=color,
                    linewidth=0.7,
                    alpha=0.4,
                    zorder=2,
                )
    for group in range(len(GROUPS)):
        draw_samples(ax, group)
    draw_queries(ax)


def box(ax: Axes, x: float, y: float, width: float, label: str, color: str) -> None:
    ax.add_patch(
        FancyBboxPatch(
            (x - width / 2, y - 0.42),
            width,
            0.84,
            boxstyle='round,pad=0,rounding_size=0.16',
            facecolor=color,
            edgecolor='none',
            zorder=3,
        )
    )
    ax.text(
        x,
        y - 0.02,
        label,
        color='white',
        fontsize=11,
        fontweight='bold',
        ha='center',
        va='center',
        zorder=4,
    )


def heads_panel(ax: Axes) -> None:
    """Four query heads, two kv heads."""
    ax.set_xlim(0, 8)
    ax.set_ylim(0, 7.2)
    ax.axis('off')
    ax.text(4, 6.85, '4 query heads', fontsize=11, ha='center', va='center')
    for head in range(4):
        x, kv_x = 1.15 + 1.9 * head, 2.1 + 3.8 * (head // 2)
        ax.plot((x, kv_x), (5.6, 3.9), color=GREY, linewidth=2, zorder=1)
        box(ax, x, 6.0, 1.35, f'q{head + 1}', QUERY_COLOR)
    for kv_head in range(2):
        x = 2.1 + 3.8 * kv_head
        box(ax, x, 3.5, 2.5, f'k{kv_head + 1}, v{kv_head + 1}', GREY)
        ax.annotate(
            '',
            xy=(x, 2.98),
            xytext=(x, 1.62),
            arrowprops=dict(arrowstyle='-|>', color=GREY, linewidth=2),
        )
    ax.text(4, 2.4, '2 key/value\nheads', fontsize=11, ha='center', va='center')
    draw_tokens(ax, 0.95)
    ax.text(4, 0.45, 'samples of both groups', fontsize=11, ha='center', va='center')


def draw_tokens(ax: Axes, y: float) -> None:
    """Samples: each has channels of every group."""
    for i in range(8):
        x = 0.5 + 0.93 * i
        for part, (color, _) in enumerate(GROUPS):
            place = (x + 0.25 * part, y)
            ax.add_patch(Rectangle(place, 0.25, 0.6, facecolor=color))


PANELS = (
    ('1  Queries', 'every pixel of the\nmap is a query', queries_panel),
    ('2  Offsets', 'a small network moves\na coarse grid of points', offsets_panel),
    (
        '3  Shared samples',
        'all queries attend to the\nsame sampled points',
        samples_panel,
    ),
    ('4  Grouped heads', 'several query heads share\none key/value head', heads_panel),
)


def join(fig: Figure, left: Axes, right: Axes) -> None:
    fig.add_artist(
        ConnectionPatch(
            (1.0, 0.5),
            (0.0, 0.5),
            'axes fraction',
            'axes fraction',
            axesA=left,
            axesB=right,
            arrowstyle='-|>',
            mutation_scale=14,
            color=GREY,
            linewidth=1.6,
            shrinkA=2,
            shrinkB=2,
        )
    )


def legend(fig: Figure) -> None:
    def mark(label, marker, color, face=None):
        return plt.Line2D(
            [],
            [],
            linestyle='none',
            marker=marker,
            markersize=7,
            color=color,
            markerfacecolor=face or color,
            label=label,
        )

    marks = [
        mark('query', 's', QUERY_COLOR),
        mark('reference point', 'o', GREY, 'white'),
        *(
            mark(f'sample of offset group {i + 1}', marker, color)
            for i, (color, marker) in enumerate(GROUPS)
        ),
    ]
    fig.legend(
        handles=marks,
        loc='lower center',
        ncols=len(marks),
        frameon=False,
        fontsize=11,
        handletextpad=0.1,
        columnspacing=2,
    )


def main() -> None:
    plt.rcParams['font.family'] = 'DejaVu Sans'
    fig, axes = plt.subplots(1, 4, figsize=(11, 3.9), dpi=180)
    fig.subplots_adjust(left=0.01, right=0.99, top=0.91, bottom=0.24, wspace=0.16)
    for ax, (title, caption, draw) in zip(axes, PANELS, strict=True):
        draw(ax)
        place = ax.get_position()
        middle = (place.x0 + place.x1) / 2
        fig.text(
            middle, 0.985, title, ha='center', va='top', fontsize=14, weight='bold'
        )
        fig.text(middle, 0.225, caption, ha='center', va='top', fontsize=11)
    for left, right in itertools.pairwise(axes):
        join(fig, left, right)
    legend(fig)
    fig.savefig(OUT, facecolor='white')


if __name__ == '__main__':
    main()
