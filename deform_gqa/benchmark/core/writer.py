"""The one place that prints and writes: JSON, Markdown and pictures of any suite."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from . import figures


def publish(
    name: str,
    record: Mapping[str, Any],
    markdown: str,
    out: str | None,
    pictures: Mapping[str, Callable[[], Any]],
) -> None:
    """Prints the tables; writes them, the record and pictures if ``out`` is given.

    Args:
        name: Of the files.
        record: What the JSON file holds.
        markdown: The tables.
        out: Folder, or None.
        pictures: Name -> function that draws the figure.
    """
    print(markdown)
    if out is None:
        return
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f'{name}.json').write_text(json.dumps(record, indent=1) + '\n')
    (folder / f'{name}.md').write_text(markdown)
    written = [f'{name}.json', f'{name}.md']
    reason = figures.unavailable_reason()
    for picture, draw in pictures.items():
        if reason is None:
            draw().savefig(folder / f'{picture}.png', dpi=figures.DPI)
            written.append(f'{picture}.png')
    print(f'written to {folder}: {", ".join(written)}')
    if reason is not None:
        print(reason)
