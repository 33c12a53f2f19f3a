"""The predicate behind the choice of a backend."""

import importlib.util
import types

import pytest
import torch

from deform_gqa.ops import unsupported_reason
from deform_gqa.ops.common import backends
from deform_gqa.ops.common.backends import choose_backend

CALL = dict(dtype=torch.float16, head_dim=32)
GPU = torch.device('cuda', 0)


@pytest.fixture
def gpu_of(monkeypatch):
    """Lets this machine have one GPU of a compute capability; triton is installed."""

    def pretend(major, minor):
        properties = types.SimpleNamespace(major=major, minor=minor)
        cuda = types.SimpleNamespace(
            is_available=lambda: True,
            current_device=lambda: 0,
            get_device_properties=lambda _: properties,
        )
        # torch.compile asks torch.cuda itself: pretend to this module alone.
        torch_with_gpu = types.SimpleNamespace(cuda=cuda, compiler=torch.compiler)
        monkeypatch.setattr(backends, 'torch', torch_with_gpu)
        monkeypatch.setattr(backends, '_triton_installed', lambda: True)
        monkeypatch.setattr(backends, '_triton_interpreted', lambda: False)

    return pretend


class TestComputeCapability:
    @pytest.mark.parametrize('device', [GPU, torch.device('cuda')])
    @pytest.mark.parametrize('capability', [(7, 0), (7, 5)])
    def test_too_low(self, gpu_of, device, capability):
        gpu_of(*capability)
        reason = unsupported_reason('deform_attn', 'triton', device=device, **CALL)
        got = '.'.join(map(str, capability))
        assert reason == (
            f'Triton kernels need compute capability 8.0 or higher, got {got}'
        )
        assert choose_backend('deform_attn', 'auto', device=device, **CALL) == 'torch'
        with pytest.raises(ValueError, match=f'cannot run deform_attn: .* got {got}'):
            choose_backend('deform_attn', 'triton', device=device, **CALL)

    @pytest.mark.parametrize('capability', [(8, 0), (8, 9), (9, 0), (12, 0)])
    def test_high_enough(self, gpu_of, capability):
        gpu_of(*capability)
        assert choose_backend('deform_sdpa', 'auto', device=GPU, **CALL) == 'triton'

    @pytest.mark.parametrize('backend', ['auto', 'torch', 'naive'])
    def test_cpu_tensors_leave_cuda_alone(self, monkeypatch, backend):
        for name in ('is_available', 'current_device', 'get_device_properties'):
            monkeypatch.delattr(torch.cuda, name)
        cpu = torch.device('cpu')
        assert choose_backend('deform_attn', backend, device=cpu, **CALL) != 'triton'

    @pytest.mark.skipif(
        importlib.util.find_spec('triton') is None, reason='needs the package triton'
    )
    def test_fake_tensors_of_an_absent_gpu(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
        assert unsupported_reason('deform_attn', 'triton', device=GPU, **CALL) is None

    @pytest.mark.parametrize(('major', 'factor'), [(7, 2.0), (8, 3.0)])
    def test_is_part_of_one_graph(self, gpu_of, major, factor):
        gpu_of(major, 0)

        def scale_by_backend(x):
            backend = choose_backend('deform_attn', 'auto', device=GPU, **CALL)
            return x * (2.0 if backend == 'torch' else 3.0)

        torch._dynamo.reset()
        compiled = torch.compile(scale_by_backend, backend='eager', fullgraph=True)
        assert compiled(torch.ones(1)).item() == factor


@pytest.mark.parametrize('backend', ['auto', 'cuda', None])
def test_no_such_backend(backend):
    with pytest.raises(ValueError, match=f'backend must be one of .* got {backend!r}'):
        unsupported_reason('deform_attn', backend, device=GPU, **CALL)


@pytest.mark.parametrize('backend', ['naive', 'torch', 'triton'])
def test_no_such_op(backend):
    with pytest.raises(ValueError, match=r"op must be one of .* got 'attn'"):
        unsupported_reason('attn', backend, device=GPU, **CALL)


def test_op_without_a_kernel():
    op = 'scaled_dot_product_gqa'
    assert unsupported_reason(op, 'torch', device=GPU, **CALL) is None
    reason = unsupported_reason(op, 'triton', device=GPU, **CALL)
    assert reason == f'{op} has no Triton kernel'


@pytest.mark.parametrize(('needs_grad', 'most'), [(True, 2**20), (False, 3 * 2**17)])
def test_naive_is_for_small_calls_on_a_cpu(monkeypatch, needs_grad, most):
    def chosen(weights):
        call = dict(device=torch.device('cpu'), **CALL)
        with torch.set_grad_enabled(needs_grad):
            return choose_backend('deform_attn', 'auto', weights=weights, **call)

    assert [chosen(most), chosen(most + 1), chosen(None)] == ['naive', 'torch', 'torch']
    # One graph for all sizes
    monkeypatch.setattr(torch.compiler, 'is_compiling', lambda: True)
    assert chosen(1) == 'torch'


def test_head_dimensions_of_the_kernels(gpu_of):
    gpu_of(9, 0)
    for head_dim, takes in ((7, False), (8, True), (256, True), (257, False)):
        call = dict(device=GPU, dtype=torch.float16, head_dim=head_dim)
        reason = unsupported_reason('deform_attn', 'triton', **call)
        message = f'Triton kernels take head dimensions 8 to 256, got {head_dim}'
        assert reason == (None if takes else message)
