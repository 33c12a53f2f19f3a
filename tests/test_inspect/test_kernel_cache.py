"""Compiled kernels that travel: a launch elsewhere looks them up by the same key."""

import os

import pytest
import torch

pytest.importorskip('triton')
if os.environ.get('TRITON_INTERPRET') == '1':
    pytest.skip('interpreted kernels do not compile', allow_module_level=True)

import triton

from deform_gqa.inspect import aot, kernel_cache
from deform_gqa.inspect.kernel_cache import compile_only, pack, unpack, use_library
from deform_gqa.ops import deform_sample

pytestmark = pytest.mark.aot


@pytest.fixture
def call():
    """A call of an op with a kernel for forward and one for backward."""
    x = torch.zeros(1, 8, 6, 5, dtype=torch.bfloat16, requires_grad=True)
    pos = torch.zeros(1, 2, 7, 2, requires_grad=True)

    def run():
        out = deform_sample(x, pos, backend='triton')
        torch.autograd.grad(out, (x, pos), torch.zeros_like(out))

    return run


@pytest.fixture
def hits(monkeypatch):
    """For each kernel that is asked for, whether it was in the cache."""
    found = []

    def listen(*, cache_hit, **_):
        found.append(cache_hit)

    monkeypatch.setattr(triton.knobs.compilation, 'listener', listen)
    return found


@pytest.fixture
def use_cache(monkeypatch, tmp_path):
    def use(name):
        monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path / name))
        return tmp_path / name

    return use


def test_kernels_are_found_where_they_are_unpacked(call, hits, use_cache, tmp_path):
    archive = tmp_path / 'archives' / 'kernels.tar.gz'
    here = use_cache('here')
    with compile_only(90) as folders:
        call()
    assert hits == [False, False]
    assert {folder.parent for folder in folders} == {here}
    assert pack(folders, archive) == 2
    here.rename(tmp_path / 'gone')

    there = use_cache('there')
    assert unpack(archive, there) == 2
    hits.clear()
    with compile_only(90) as found:
        call()
    assert hits == [True, True]
    assert {x.name for x in found} == {x.name for x in folders}
    assert not list(there.glob('*/*.ptx'))  # what a launch has no use for


def test_the_key_is_that_of_ahead_of_time_compilation(call, use_cache, monkeypatch):
    """So that what the tests of the compiled code see is what a launch runs."""
    use_cache('cache')
    with compile_only(90) as folders:
        call()
    with aot.record_launches(90) as launches:
        monkeypatch.setattr(
            kernel_cache.backends, '_device_reason', lambda device: None
        )
        call()
    kernels = [aot.compile_launch(launch, 90) for launch in launches]
    paths = [path for kernel in kernels for path in kernel.metadata_group.values()]
    assert {os.path.dirname(path) for path in paths} == set(map(str, folders))


def test_another_library_has_its_own_keys(call, hits, use_cache, tmp_path):
    use_cache('cache')
    library = tmp_path / 'libtriton.so'
    library.write_bytes(b'of another version of Python')
    with use_library(library), compile_only(90) as theirs:
        call()
    with compile_only(90) as ours:
        call()
    with use_library(kernel_cache.LIBRARY), compile_only(90) as same:
        call()
    assert not theirs & ours and same == ours
    assert hits == [False] * 4 + [True] * 2


def test_a_triton_whose_key_holds_no_library_is_refused(monkeypatch):
    monkeypatch.setattr(kernel_cache.cache, 'triton_key', lambda: 'a version')
    with (
        pytest.raises(RuntimeError, match=f'Triton {triton.__version__} hashes no'),
        use_library(kernel_cache.LIBRARY),
    ):
        raise AssertionError('not reached')
