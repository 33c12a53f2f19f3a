"""File system calls that fail, or end the process, at one of their number.

The layer stands between :mod:`deform_gqa.engine.checkpoint_io` and the system, as well
as around the functions of ``os`` that rename, sync and remove files.
"""

import contextlib
import errno
import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

from deform_gqa.engine import checkpoint_io

Undo = tuple[Path, bytes | None]


class FileLayer:
    """Counts calls; at one of them something happens.

    Args:
        at (int, optional): Number of that call, from 1; None to count only.
        fault (str): ``'kill'``: the process is killed before the call, or when a write
            is half done. ``'full'``: from then on there is no space left.
            ``'read_only'``: from then on nothing can be written. ``'power'``: as
            ``'kill'``, and what was not synced is lost in part, in any order.
        seed (int): For what is lost.
    """

    def __init__(self, at: int | None, fault: str, seed: int = 0) -> None:
        self.at, self.fault = at, fault
        self.random = random.Random(seed)
        self.calls = 0
        self.half_synced: set[Path] = set()  # with data that are not on the disk yet
        self.pending: list[Undo] = []  # changes of folders that are not

    def call(self, file=None, data: bytes = b'') -> None:
        """Notes a call that is about to be made; ``data`` are about to be written."""
        self.calls += 1
        if self.at is None or self.calls < self.at:
            return
        is_first = self.calls == self.at
        if self.fault in ('kill', 'power') and is_first:
            if file is not None:
                file.write(data[: self.random.randint(0, len(data))])
            self.die()
        if self.fault == 'full':
            if file is not None:
                file.write(data[: self.random.randint(0, len(data))])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self.fault == 'read_only':
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def die(self) -> None:
        if self.fault == 'power':
            for path, content in reversed(self.pending):
                if self.random.random() < 0.5:
                    _put_back(path, content)
            for path in self.half_synced:
                if path.exists():
                    length = self.random.randint(0, path.stat().st_size)
                    os.truncate(path, length)
        os.kill(os.getpid(), signal.SIGKILL)

    # The calls

    def open(self, path, mode: str = 'r', **options):
        if 'w' not in mode:
            return open(path, mode, **options)
        self.call()
        path = Path(path)
        self.half_synced.add(path)
        return _File(open(path, mode, buffering=0), self)

    def fsync(self, descriptor: int) -> None:
        """Notes what is safe; a killed process leaves the system running."""
        self.call()
        path = Path(os.readlink(f'/proc/self/fd/{descriptor}'))
        if path.is_dir():
            self.pending = [entry for entry in self.pending if entry[0].parent != path]
        self.half_synced.discard(path)

    def replace(self, source, target) -> None:
        self.call()
        source, target = Path(source), Path(target)
        self.pending.append((target, _content(target)))
        _replace(source, target)
        if source in self.half_synced:
            self.half_synced.remove(source)
            self.half_synced.add(target)

    def unlink(self, path, **options) -> None:
        path = Path(path)
        if path.exists() and self.fault == 'full':
            self.calls += 1  # to free space is possible
        elif path.exists():
            self.call()
            self.pending.append((path, _content(path)))
        _unlink(path, **options)

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        former = vars(checkpoint_io).get('open', open)
        checkpoint_io.open = self.open
        os.fsync, os.replace = self.fsync, self.replace
        os.remove = os.unlink = self.unlink
        try:
            yield
        finally:
            checkpoint_io.open = former
            os.fsync, os.replace = _fsync, _replace
            os.remove = os.unlink = _unlink


_fsync, _replace, _unlink = os.fsync, os.replace, os.unlink


class _File:
    """A file without a buffer, whose writes are calls."""

    def __init__(self, file, layer: FileLayer) -> None:
        self.file, self.layer = file, layer
        self.flush: Callable = file.flush
        self.fileno: Callable = file.fileno

    def write(self, data: bytes) -> int:
        self.layer.call(self.file, data)
        return self.file.write(data)

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        self.file.close()


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _put_back(path: Path, content: bytes | None) -> None:
    if content is not None:
        path.write_bytes(content)
    elif path.exists():
        _unlink(path)
