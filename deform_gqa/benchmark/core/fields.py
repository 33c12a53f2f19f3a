"""What tells the cases of a report apart: columns of tables, labels of figures.

The fields of a case are a dict of short texts and numbers by the name of the column,
such as ``{'stage': 1, 'image': '800x1333', 'batch': 2, 'kv heads': '1 of 2'}``.
"""

from collections.abc import Sequence
from typing import Any

Fields = dict[str, Any]


def size_text(size: Sequence[int]) -> str:
    """(800, 1333) -> '800x1333', height first."""
    return f'{size[0]}x{size[1]}'


def kv_heads_text(kv_heads: int | str, heads: int | str) -> str:
    return 'all' if kv_heads == heads else f'{kv_heads} of {heads}'


def field_text(name: str, value: Any) -> str:
    """A field as it stands in a title or at an axis."""
    if value == '':
        return ''
    if name in ('batch', 'stage'):
        return f'{name} {value}'
    if name in ('kv heads', 'views', 'points'):
        return f'{value} {name}'
    return f'{value} px' if name == 'image' else str(value)


def split_labels(cases: Sequence[Fields]) -> tuple[str, list[str]]:
    """(what all cases share, what tells each from the others)."""
    names = list(dict.fromkeys(name for fields in cases for name in fields))
    texts = [{n: field_text(n, fields.get(n, '')) for n in names} for fields in cases]
    shared = [n for n in names if len({text[n] for text in texts}) == 1]
    labels = [
        ', '.join(text[n] for n in names if n not in shared and text[n])
        for text in texts
    ]
    return ', '.join(texts[0][n] for n in shared if texts[0][n]), labels
