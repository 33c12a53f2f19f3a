"""Checks of what a config says to the runtime-benchmark hook."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def check_out_dir(out_dir: Any) -> None:
    if out_dir is None:
        return
    if not isinstance(out_dir, (str, Path)):
        raise TypeError(f'out_dir must be a str or a Path, got {out_dir!r}')
    if '://' in str(out_dir):
        raise ValueError(f'out_dir must be a local folder, got {out_dir!r}')


def check_modules(modules: Any) -> dict[str, list[str]]:
    if not isinstance(modules, Mapping):
        raise TypeError(
            f"modules must be a dict such as {{'neck': 'FPN'}}, got {modules!r}"
        )
    groups = {}
    for name, choices in modules.items():
        listed = [choices] if isinstance(choices, str) else choices
        if not isinstance(listed, (list, tuple)) or not all(
            isinstance(choice, str) for choice in listed
        ):
            raise TypeError(
                f'modules[{name!r}] must be a class name, a path of a module, or a '
                f'list of them, got {choices!r}'
            )
        if not listed:
            raise ValueError(f'modules[{name!r}] must name a module, got {choices!r}')
        groups[str(name)] = list(listed)
    return groups
