"""Compiled kernels for a machine that is not there, in a cache that travels.

``compile_only`` lets calls of the ops compile what they would launch, through Triton's
own launch path, so that a launch on that machine looks up the same key. The key also
holds a hash of Triton's compiled part, which is another file for each version of
Python: ``use_library`` takes that of the other machine's. Not under TRITON_INTERPRET.
"""

import contextlib
import hashlib
import json
import pathlib
import tarfile
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import cache
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from deform_gqa.ops.common import backends, triton_host

WARP_SIZE = 32
GROUP_PREFIX = '__grp__'  # of the files that list those of one kernel
LIBRARY = pathlib.Path(triton.__file__).parent / '_C' / 'libtriton.so'


@contextlib.contextmanager
def compile_only(arch: int) -> Iterator[set[pathlib.Path]]:
    """Calls with backend='triton' on CPU tensors compile for ``arch`` and run nothing.

    What they return is not initialised.

    Args:
        arch: Compute capability as 80 or 90.

    Yields:
        The folders of the cache that hold the kernels of the calls so far.
    """
    launch, folders = JITFunction.run, set()

    def run(self, *args, grid, warmup, **kwargs):
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        folders.update(pathlib.Path(x).parent for x in kernel.metadata_group.values())
        return kernel

    device = object()  # Triton keeps loaded kernels by device: none of before
    absent = SimpleNamespace(
        get_current_target=lambda: GPUTarget('cuda', arch, WARP_SIZE),
        get_current_device=lambda: device,
        get_current_stream=lambda device: 0,
    )
    with (
        mock.patch.object(JITFunction, 'run', run),
        mock.patch.object(driver, '_active', absent),
        mock.patch.object(triton_host, 'architecture', lambda device: arch),
        mock.patch.object(backends, '_device_reason', lambda device: None),
    ):
        yield folders


@contextlib.contextmanager
def use_library(path: pathlib.Path) -> Iterator[None]:
    """Keys as of a Triton of the same version whose ``libtriton.so`` is ``path``."""
    ours, theirs = (
        hashlib.sha256(library.read_bytes()).hexdigest() for library in (LIBRARY, path)
    )
    key = cache.triton_key()
    if ours not in key:
        raise RuntimeError(f'Triton {triton.__version__} hashes no {LIBRARY}')
    key = key.replace(ours, theirs)
    with mock.patch.object(cache, 'triton_key', lambda: key):
        yield


def pack(folders: Iterable[pathlib.Path], archive: pathlib.Path) -> int:
    """Writes what a launch needs of these folders; returns the number of kernels."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with tarfile.open(archive, 'w:gz') as tar:
        for folder in sorted(folders):
            for path in sorted(folder.iterdir()):
                if path.suffix in ('.cubin', '.json'):
                    tar.add(path, f'{folder.name}/{path.name}')
                    count += path.suffix == '.cubin'
    return count


def unpack(archive: pathlib.Path, folder: pathlib.Path) -> int:
    """Puts an archive of :func:`pack` into a cache; returns the number of kernels."""
    with tarfile.open(archive) as tar:
        names = tar.getnames()
        tar.extractall(folder, filter='data')
    for name in names:
        path = folder / name
        if path.name.startswith(GROUP_PREFIX):
            _move_group(path)
    return sum(name.endswith('.cubin') for name in names)


def _move_group(path: pathlib.Path) -> None:
    """The list of a kernel's files names all by absolute paths; it is void if one
    is missing.
    """
    group = json.loads(path.read_text())
    here = {name: path.absolute().with_name(name) for name in group['child_paths']}
    group['child_paths'] = {name: str(x) for name, x in here.items() if x.is_file()}
    path.write_text(json.dumps(group))
