"""The one place that prints and writes: JSON, Markdown and pictures of any suite."""

import json
import os
import tempfile
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

    All files are complete before the first of them gets its name, the record last: a
    picture that cannot be drawn leaves what an earlier run wrote.

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
    reason = figures.unavailable_reason()
    names = [f'{picture}.png' for picture in ({} if reason else pictures)]
    names += [f'{name}.md', f'{name}.json']
    os.makedirs(out, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix='.new-', dir=out) as folder:
        new = Path(folder)
        (new / f'{name}.json').write_text(json.dumps(record, indent=1) + '\n')
        (new / f'{name}.md').write_text(markdown)
        if reason is None:
            for picture, draw in pictures.items():
                draw().savefig(new / f'{picture}.png', dpi=figures.DPI)
        for file in names:
            os.replace(new / file, Path(out, file))
    print(f'written to {out}: {", ".join(names)}')
    if reason is not None:
        print(reason)
