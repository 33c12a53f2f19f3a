"""The published kernel as a baseline, with a stand-in for the user's copy of it."""

import sys

import pytest
import torch

from deform_gqa.benchmark.core.errors import OptionError
from deform_gqa.benchmark.ops import backends, published_sdpa
from deform_gqa.benchmark.ops.deform_sdpa import DeformSdpaCase
from deform_gqa.benchmark.ops.gate import Gate
from deform_gqa.benchmark.ops.workload import op_calls

CPU, CUDA = torch.device('cpu'), torch.device('cuda')
STAND_IN = """
from deform_gqa.ops import deform_sdpa

def deform_sdpa_triton(q, k, v, coords, width, height, scale):
    assert not coords.requires_grad
    return deform_sdpa(q, k, v, coords, grid_size=(height, width), scale=scale)
"""


def one_case(kv_heads=2, head_dim=16):
    return DeformSdpaCase(
        batch=1,
        num_heads=2,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        grid_size=(4, 5),
        views=2,
        points=3,
    )


@pytest.fixture
def copy(tmp_path, monkeypatch):
    package = tmp_path / 'ops' / 'triton'
    package.mkdir(parents=True)
    (tmp_path / 'ops' / '__init__.py').touch()
    (package / '__init__.py').write_text(STAND_IN)
    monkeypatch.setenv(published_sdpa.COPY.variable, str(tmp_path))
    yield tmp_path
    for name in ('ops', 'ops.triton'):
        sys.modules.pop(name, None)


def test_reasons(monkeypatch, tmp_path):
    def reason(*args):
        return backends.unsupported_reason(one_case(), 'published', *args)

    monkeypatch.delenv(published_sdpa.COPY.variable, raising=False)
    assert 'names no folder' in reason(CUDA, torch.float32)
    assert 'published' not in backends.default_backends()
    monkeypatch.setenv(published_sdpa.COPY.variable, str(tmp_path))
    assert 'published' in backends.default_backends()
    assert 'CUDA only' in reason(CPU, torch.float32)
    assert 'bfloat16' in reason(CUDA, torch.bfloat16)
    assert reason(CUDA, torch.float16) is None
    for case, text in ((one_case(1), 'grouped'), (one_case(head_dim=24), 'head dim')):
        found = backends.unsupported_reason(case, 'published', CUDA, torch.float32)
        assert text in found


def test_gate_leaves_out_the_gradient_of_coords(copy):
    Gate(CPU, torch.float32).check(one_case(), 'published')


def test_times_what_it_has_gradients_of(copy):
    case = one_case()
    inputs = case.make_inputs(CPU, torch.float32)
    inputs = backends.inputs_of(case, 'published', inputs)
    call = backends.make_call(case, 'published')
    grad_out = case.make_grad_out(CPU, torch.float32)
    assert len(op_calls(call, inputs, grad_out)['forward+backward']()) == 3


def test_folder_without_it(copy):
    (copy / 'ops' / 'triton' / '__init__.py').write_text('')
    with pytest.raises(OptionError, match=r'holds no ops\.triton\.deform'):
        published_sdpa.COPY.load()


def test_no_folder(monkeypatch):
    monkeypatch.delenv(published_sdpa.COPY.variable, raising=False)
    with pytest.raises(OptionError, match='is not set'):
        published_sdpa.COPY.load()
