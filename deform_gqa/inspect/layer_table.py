"""Prints, saves and compares the reports of ``layers.py``."""

import dataclasses
import json
import pathlib
from collections.abc import Iterable

import torch

from . import pipes
from .layers import BATCH, IMAGES, LaunchReport, Layer, reports

# Of which more is worse, in a comparison.
COSTS = ('registers', 'spill_bytes', 'instructions')
ASSUMPTIONS = (
    f'Clocks of an SM for 1,000 pairs of a tile by pipe; bounds at batch {BATCH} for '
    f'{pipes.H100.multiprocessors} SMs at {pipes.H100.clock_ghz} GHz (H100 SXM), by '
    'the SM with the most programs\nand its busiest pipe, all else hidden behind it, '
    'no bank conflicts. Instructions are those that a usual tile executes.'
)
HEADER = (
    f'{"stage":>5} {"kernel":6} {"tile":>9} {"registers":>9} {"spills_B":>8} '
    f'{"shared_KiB":>10} {"warps/SM":>8} {"barriers":>8} {"C7515":>5} {"programs":>8} '
    f'{"waves":>5} {"per pair":>8} '
    + ' '.join(f'{pipe:>6}' for pipe in pipes.PIPES)
    + f' {"bound_us":>8}  binds'
)


def describe(layer: Layer, x: LaunchReport) -> str:
    """A line below HEADER."""
    clocks = ' '.join(f'{x.clocks[pipe]:6.0f}' for pipe in pipes.PIPES)
    return (
        f'{layer.stage:5} {x.name:6} {x.tile:>9} {x.registers:9} {x.spill_bytes:8} '
        f'{x.shared_bytes / 1024:10.1f} {x.warps_at_once:8} {x.barriers:8} '
        f'{"yes" if x.serialised else "-":>5} {x.programs:8} {x.waves:5.1f} '
        f'{x.instructions:8.2f} {clocks} {x.bound_us:8.1f}  {x.binds}'
    )


def totals_us(rows: Iterable[tuple[Layer, LaunchReport]]) -> dict[str, float]:
    """Bound of all D layers, by kernel."""
    totals = {}
    for layer, x in rows:
        totals[x.name] = totals.get(x.name, 0.0) + layer.count * x.bound_us
    return totals


def as_entries(
    rows: Iterable[tuple[Layer, LaunchReport]], arch: int, dtype: torch.dtype
) -> dict[str, dict]:
    """What is saved: reports by a key that says of what."""
    entries = {}
    for layer, x in rows:
        height, width = layer.image
        kind = str(dtype).removeprefix('torch.')
        key = f'{height}x{width}/stage {layer.stage}/D {x.head_dim}/{kind}'
        entries[f'{key}/sm_{arch}/{x.name}'] = dataclasses.asdict(x)
    return entries


def print_layers(
    archs: Iterable[int], head_dims: Iterable[int], dtypes: Iterable[torch.dtype]
) -> dict[str, dict]:
    """Prints the D layers of DAT-T++ at both image sizes; returns the entries."""
    entries = {}
    print(ASSUMPTIONS)
    for arch in archs:
        for dtype in dtypes:
            for head_dim in head_dims:
                for image in IMAGES:
                    kind = str(dtype).removeprefix('torch.')
                    print(f'\nsm_{arch} {kind} D={head_dim} {image[0]}x{image[1]}')
                    print(HEADER)
                    rows = []
                    for layer, x in reports(image, arch, dtype, head_dim):
                        print(describe(layer, x), flush=True)
                        rows.append((layer, x))
                    count = sum({x.stage: x.count for x, _ in rows}.values())
                    sums = ', '.join(
                        f'{name} {us:.0f}' for name, us in totals_us(rows).items()
                    )
                    print(f'bound of all {count} layers in us: {sums}')
                    entries |= as_entries(rows, arch, dtype)
    return entries


def save(entries: dict[str, dict], path: pathlib.Path) -> None:
    path.write_text(json.dumps(entries, indent=1) + '\n')


def worsened(before: pathlib.Path, after: pathlib.Path) -> list[str]:
    """What costs more in ``after`` than in ``before``, both from ``save``.

    Raises:
        ValueError: If they report on different kernels.
    """
    old, new = (json.loads(path.read_text()) for path in (before, after))
    if old.keys() != new.keys():
        raise ValueError(
            f'{before} and {after} report on different kernels: '
            f'{sorted(old.keys() ^ new.keys())}'
        )
    return [
        f'{key}: {cost} {old[key][cost]:.6g} -> {new[key][cost]:.6g}'
        for key in old
        for cost in COSTS
        if new[key][cost] > old[key][cost] * (1 + 1e-9)
    ]
