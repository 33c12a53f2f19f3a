"""Checkpoint files that are written completely or not at all, and read safely.

mmengine writes a checkpoint in place, so that a killed process leaves half a file, and
its reader falls back to the full unpickler, which runs any code that a file names.
"""

import contextlib
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import torch
from mmengine.dist import barrier, get_rank
from mmengine.fileio import LocalBackend, register_backend
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader
from torch.serialization import safe_globals

__all__ = [
    'AtomicLocalBackend',
    'check_checkpoint',
    'find_checkpoint_to_resume',
    'load_checkpoint',
    'point_to_checkpoint',
    'remove_parts',
    'use_atomic_writing',
    'use_safe_loading',
]

_PART = '.part'
_POINTER = 'last_checkpoint'
_ZIP_HEAD = b'PK'
# Files of torch.save before version 1.6 start with this number, pickled.
_OLD_HEAD = torch.serialization.MAGIC_NUMBER.to_bytes(10, 'little')
_HEAD_LENGTH = 32
_NUMPY_SCALARS = (np.bool_, np.int32, np.int64, np.uint8, np.uint32, np.float32)


@register_backend('atomic_local', force=True)
class AtomicLocalBackend(LocalBackend):
    """Local files that are replaced in one step.

    Chosen with ``backend_args=dict(backend='atomic_local')``, or for all local files by
    :func:`use_atomic_writing`. A reader sees the old file or the new one, never a part,
    whenever the writer is killed.
    """

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Writes ``obj`` beside ``filepath``, syncs it to disk and renames it.

        Raises:
            OSError: Naming ``filepath``, which is then what it was before.
        """
        filepath = Path(filepath)
        part = filepath.with_name(filepath.name + _PART)
        try:
            filepath.parent.mkdir(parents=True, exist_ok=True)
            with open(part, 'wb') as file:
                file.write(obj)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, filepath)
            _sync_folder(filepath.parent)
        except OSError as error:  # of a write, it has no file name
            raise OSError(error.errno, error.strerror, str(filepath)) from error
        finally:
            part.unlink(missing_ok=True)  # on a full disk, it would keep it full

    def put_text(self, obj: str, filepath: str | Path, encoding: str = 'utf-8') -> None:
        """As :meth:`put`, for text."""
        self.put(obj.encode(encoding), filepath)


def use_atomic_writing() -> None:
    """Makes all local files of mmengine's file backends appear in one step.

    mmengine's FlexibleRunner saves checkpoints without a choice of the backend.
    """
    register_backend('local', AtomicLocalBackend, force=True, prefixes='')


def remove_parts(folder: str | Path) -> None:
    """Removes what writers that were killed have left in a folder of checkpoints."""
    for name in (f'*.pth{_PART}', f'{_POINTER}{_PART}'):
        for part in Path(folder).glob(name):
            part.unlink()


def _sync_folder(folder: Path) -> None:
    """Makes a rename survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _get_statistics_method(owner: type, name: str) -> Callable:
    """Stands for ``getattr`` in a checkpoint: returns a method of a history buffer.

    A history buffer pickles its public statistics methods as calls of ``getattr``. The
    real ``getattr`` would give a file access to everything.
    """
    if owner is not HistoryBuffer or name.startswith('_'):
        raise pickle.UnpicklingError(f'getattr({owner!r}, {name!r}) is not allowed')
    return getattr(HistoryBuffer, name)


def _allowed_globals() -> list:
    """What mmengine's own checkpoints hold besides tensors and plain values."""
    multiarray = np.core.multiarray if np.__version__ < '2' else np._core.multiarray
    # NumPy 2 renamed the module; files written with NumPy 1 have the old name.
    allowed = [
        (function, f'numpy.{core}.multiarray.{function.__name__}')
        for core in ('core', '_core')
        for function in (multiarray._reconstruct, multiarray.scalar)
    ]
    dtypes = {type(np.dtype(scalar)) for scalar in (*_NUMPY_SCALARS, np.float64)}
    allowed += [np.ndarray, np.dtype, *dtypes, slice, HistoryBuffer]
    allowed.append((_get_statistics_method, 'builtins.getattr'))
    return allowed


@contextlib.contextmanager
def _explained(filename: str) -> Iterator[None]:
    """Names the file in the errors of torch's reader."""
    try:
        yield
    except pickle.UnpicklingError as error:
        raise ValueError(
            f'checkpoint {filename!r} was refused, because reading it could run code '
            f'({_reason(error)}). If you trust it, write its weights to a new file: '
            "torch.save({'state_dict': torch.load(FILE, weights_only=False)[KEY]}, "
            "NEW_FILE), where KEY is 'state_dict' or 'model' or what else holds them"
        ) from error
    except OSError:
        raise
    except Exception as error:  # damaged bytes can lead the reader anywhere
        reason = str(error).split('. ')[0] or type(error).__name__
        raise ValueError(f'checkpoint {filename!r} cannot be read: {reason}') from error


def _reason(error: pickle.UnpicklingError) -> str:
    """What torch says between a long general text and advice that would be unsafe."""
    name = re.search(r'GLOBAL (\S+)', str(error))
    if name is not None:
        return f'it names {name[1]}'
    reason = re.search(r'WeightsUnpickler error:\s*(.+)', str(error))
    return str(error).split('. ')[0] if reason is None else reason[1].strip()


def _check_head(filename: str) -> None:
    """Says of an error page or a git-lfs pointer that it is no checkpoint."""
    with open(filename, 'rb') as file:
        head = file.read(_HEAD_LENGTH)
    if not head.startswith(_ZIP_HEAD) and _OLD_HEAD not in head:
        raise ValueError(
            f'checkpoint {filename!r} cannot be read: it starts with {head!r}, as '
            'nothing that torch.save writes'
        )


def load_checkpoint(
    filename: str | Path, map_location: str | torch.device | None = None
) -> dict:
    """Reads a local checkpoint with torch's weights-only unpickler.

    Args:
        filename (str or Path): A file that ``torch.save`` wrote.
        map_location (str or torch.device, optional): As in ``torch.load``.

    Returns:
        dict: The checkpoint.

    Raises:
        FileNotFoundError: ``filename`` is no file.
        ValueError: The file is damaged, or holds something else than tensors, plain
            values and what mmengine itself stores, or is no dict.
    """
    filename = os.path.expanduser(filename)
    if not os.path.isfile(filename):
        raise FileNotFoundError(f'checkpoint {filename!r} does not exist')
    _check_head(filename)
    with _explained(filename), safe_globals(_allowed_globals()):
        checkpoint = torch.load(
            filename,
            map_location=map_location,
            weights_only=True,
            # maps the tensors' bytes instead of reading them, where the format can
            mmap=map_location == 'meta' and zipfile.is_zipfile(filename),
        )
    if not isinstance(checkpoint, dict):
        raise ValueError(
            f'checkpoint {filename!r} must hold a dict, got a '
            f'{type(checkpoint).__name__}'
        )
    return checkpoint


def check_checkpoint(filename: str | Path) -> None:
    """Raises what :func:`load_checkpoint` would raise, without reading the weights.

    Args:
        filename (str or Path): A local file. An address with a scheme, such as
            ``https://``, is not looked at: it is checked when it is loaded.
    """
    if '://' not in str(filename):
        load_checkpoint(filename, map_location='meta')


def point_to_checkpoint(work_dir: str | Path, path: str) -> None:
    """Notes in a work folder which checkpoint is the newest."""
    AtomicLocalBackend().put_text(path, Path(work_dir, _POINTER))


def find_checkpoint_to_resume(work_dir: str | Path) -> str | None:
    """The newest checkpoint of a work folder, or None where there is none yet.

    Raises:
        FileNotFoundError: The folder's ``last_checkpoint`` names a missing file, and
            there is none of that name beside it either.
        ValueError: The file is damaged or unsafe to read.
    """
    pointer = Path(work_dir, _POINTER)
    if not pointer.is_file():
        return None
    path = pointer.read_text(encoding='utf-8').strip()
    moved = pointer.with_name(Path(path).name)
    if not os.path.exists(path) and moved.is_file():  # with its folder
        path = str(moved)
    check_checkpoint(path)
    return path


def load_from_http(url: str, map_location: str | torch.device | None = None) -> dict:
    """As :func:`load_checkpoint`, for a web address; rank 0 downloads it first."""
    folder = Path(torch.hub.get_dir(), 'checkpoints')  # torch's own cache
    file = folder / Path(urlparse(url).path).name
    if get_rank() > 0:
        barrier()
    if not file.exists():  # other machines may have caches of their own
        folder.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(file), progress=False)
    if get_rank() == 0:
        barrier()
    return load_checkpoint(file, map_location)


def load_from_local(
    filename: str, map_location: str | torch.device | None = None
) -> dict:
    """:func:`load_checkpoint`, named as mmengine's log names its loaders."""
    return load_checkpoint(filename, map_location)


def use_safe_loading() -> None:
    """Makes mmengine load all checkpoints of this process by :func:`load_checkpoint`.

    That covers ``load_from``, ``resume`` and ``init_cfg=dict(type='Pretrained')``,
    for local files and web addresses.
    """
    CheckpointLoader.register_scheme('', load_from_local, force=True)
    CheckpointLoader.register_scheme(
        ('http://', 'https://'), load_from_http, force=True
    )
