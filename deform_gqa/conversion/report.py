"""What a conversion did, layer by layer."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path


@dataclasses.dataclass
class LayerReport:
    """The conversion of one attention module.

    Args:
        name: Name of the module in the model; '' for the model itself.
        type: Its class.
        num_heads: Query heads.
        kv_heads: Key/value heads before and after.
        params: Parameters of the module before and after.
        kv_params: Those of its key and value projections.
        kv_bytes: Bytes of the keys and values of one token, in the dtype of the
            weights.
        groups: Old kv heads that each new one was made of.
        value_groups: Those of the values, if they are not those of the keys.
        value_heads: Then also the head of the values that each query head reads.
        error: Norm of the change of the module's output on the calibration inputs,
            over the norm of the output; None without calibration.
        error_before_refit: The same before the output projection was refitted.
        error_held_out: The same after a refit that did without the images in question
            (cross-validation): what to expect on other images.
    """

    name: str
    type: str
    num_heads: int
    kv_heads: tuple[int, int]
    params: tuple[int, int]
    kv_params: tuple[int, int]
    kv_bytes: tuple[int, int]
    groups: list[list[int]]
    value_groups: list[list[int]] | None = None
    value_heads: tuple[int, ...] | None = None
    error: float | None = None
    error_before_refit: float | None = None
    error_held_out: float | None = None


@dataclasses.dataclass
class ConversionReport:
    """The layers of a conversion and the options it was made with."""

    layers: list[LayerReport]
    options: dict

    @property
    def converted(self) -> list[LayerReport]:
        """The layers whose number of kv heads changed."""
        return [
            layer for layer in self.layers if layer.kv_heads[0] != layer.kv_heads[1]
        ]

    def __str__(self) -> str:
        return self.to_table()

    def to_table(self) -> str:
        """A Markdown table, with a line for the sum of all layers."""
        head = ('layer', 'type', 'heads', 'kv heads', 'parameters', 'kv parameters')
        head += ('kv bytes per token', 'output error')
        rows = [
            (
                layer.name,
                layer.type,
                str(layer.num_heads),
                _arrow(layer.kv_heads),
                _arrow(layer.params),
                _arrow(layer.kv_params),
                _arrow(layer.kv_bytes),
                '' if layer.error is None else f'{layer.error:.3f}',
            )
            for layer in self.layers
        ]
        total = ['sum', '', '', '']
        total += [_arrow(self._sum(key)) for key in ('params', 'kv_params', 'kv_bytes')]
        rows.append((*total, ''))
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        lines = [head, ['-' * width for width in widths], *rows]
        return '\n'.join(
            '| ' + ' | '.join(map(str.ljust, line, widths)) + ' |' for line in lines
        )

    def _sum(self, key: str) -> tuple[int, int]:
        pairs = [getattr(layer, key) for layer in self.layers]
        return sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)

    def to_json(self) -> str:
        """Options and layers; a pair holds the number before and after."""
        return json.dumps(self.to_dict(), indent=1)

    def to_dict(self) -> dict:
        return dict(
            options=self.options,
            layers=[dataclasses.asdict(layer) for layer in self.layers],
        )

    def plot(self, path: str | Path) -> None:
        """Bars of the kv parameters before and after, and of the output errors."""
        # matplotlib takes half a second, and no training needs it.
        from matplotlib.figure import Figure

        names = [layer.name or layer.type for layer in self.layers]
        errors = [layer.error for layer in self.layers]
        measured = any(error is not None for error in errors)
        figure = Figure(
            figsize=(10 if measured else 6, 1.2 + 0.25 * len(names)),
            layout='constrained',
        )
        axes = figure.subplots(1, 1 + measured, sharey=True, squeeze=False)[0]
        rows = range(len(names))
        for side, label in enumerate(('before', 'after')):
            axes[0].barh(
                [row + 0.4 * side - 0.2 for row in rows],
                [layer.kv_params[side] / 1000 for layer in self.layers],
                height=0.4,
                label=label,
            )
        axes[0].set_xlabel('kv parameters (thousand)')
        axes[0].set_yticks(rows, names, fontsize='small')
        axes[0].invert_yaxis()
        axes[0].legend()
        if measured:
            axes[1].barh(rows, [error or 0 for error in errors], color='tab:green')
            axes[1].set_xlabel('relative error of the output')
        figure.savefig(path, dpi=120)

    def write(self, folder: str | Path) -> None:
        """Writes ``conversion.json``, ``conversion.md`` and ``conversion.png``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        Path(folder, 'conversion.json').write_text(self.to_json() + '\n')
        Path(folder, 'conversion.md').write_text(self.to_table() + '\n')
        self.plot(folder / 'conversion.png')


def _arrow(pair: Sequence[int]) -> str:
    before, after = pair
    return f'{before:,}' if before == after else f'{before:,} -> {after:,}'
