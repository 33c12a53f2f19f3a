"""A progress bar: rich's where rich is installed, else a line a step."""

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """Yields a function to call with a description before each of ``total`` steps."""
    if importlib.util.find_spec('rich') is None:
        yield _lines(total)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeElapsedColumn as Elapsed

    columns = (BarColumn(), MofNCompleteColumn(), Elapsed())
    console = Console(stderr=True)
    with Progress(*columns, TextColumn('{task.description}'), console=console) as bar:
        task = bar.add_task('', total=total)
        done = -1

        def step(description: str) -> None:
            nonlocal done
            done += 1
            bar.update(task, completed=done, description=description)

        yield step
        bar.update(task, completed=total, description='done')


def _lines(total: int) -> Callable[[str], None]:
    number = 0

    def step(description: str) -> None:
        nonlocal number
        number += 1
        print(f'[{number}/{total}] {description}', file=sys.stderr, flush=True)

    return step
