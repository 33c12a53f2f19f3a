"""Other people's functions from a folder of the user; no part of them is here."""

import contextlib
import dataclasses
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor

from ..core.errors import OptionError


@dataclasses.dataclass(frozen=True)
class UserCopy:
    """Where a function is to be found.

    Attributes:
        variable: Of the environment: names the folder with the copy.
        module: That holds the function.
        function: Its name.
    """

    variable: str
    module: str
    function: str

    @property
    def folder(self) -> Path | None:
        """The user's copy; None if the variable is not set."""
        path = os.environ.get(self.variable)
        return Path(path) if path else None

    def is_available(self) -> bool:
        return self.folder is not None

    def missing_reason(self) -> str | None:
        """Why there is none, or None."""
        if self.is_available():
            return None
        return f'{self.variable} names no folder with the repository'

    def load(self) -> Callable[..., Tensor]:
        """The function.

        Raises:
            OptionError: If the folder does not hold it.
        """
        if self.folder is None:
            raise OptionError(f'{self.variable} is not set')
        try:
            with _imports_from(self.folder):
                return getattr(importlib.import_module(self.module), self.function)
        except (ImportError, AttributeError) as error:
            raise OptionError(
                f'{self.variable}={self.folder} holds no '
                f'{self.module}.{self.function}: {error}'
            ) from error


@contextlib.contextmanager
def _imports_from(path: Path) -> Iterator[None]:
    sys.path.insert(0, str(path))
    try:
        yield
    finally:
        sys.path.remove(str(path))
