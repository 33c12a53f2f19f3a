"""The tool's times against those of torch.utils.benchmark for the same call."""

import numpy as np
import pytest
import torch
from torch.utils import benchmark

from deform_gqa.benchmark.core.sampling import Sampling, Timer
from deform_gqa.benchmark.models import layer, options
from deform_gqa.benchmark.ops.backends import make_call
from deform_gqa.benchmark.ops.deform_attn import DeformAttnCase
from deform_gqa.benchmark.ops.workload import op_calls

ROUNDS = 9
CPU = torch.device('cpu')


def op_call():
    case = DeformAttnCase.at_stage((240, 320), 2, 1, 'full')
    inputs = case.make_inputs(CPU, torch.float32)
    grad_out = case.make_grad_out(CPU, torch.float32)
    return op_calls(make_call(case, 'torch'), inputs, grad_out)['forward']


def layer_call():
    model_options = options.ModelOptions(
        device=CPU,
        sampling=Sampling(1),
        threads=1,
        time_limit_s=None,
        out=None,
        backends=('torch',),
        amp=None,
        sizes=(),
        batch_sizes=(),
        kv_heads=(),
        directions=('train',),
        checkpoint=None,
        cfg_options={},
    )
    config = layer.layer_config('DeformableGQA', 't++', 2, {})
    workload = layer.build_workload(config, (15, 20), 1, model_options, 'torch')
    return workload.calls['train']


@pytest.mark.parametrize('make', [op_call, layer_call])
def test_same_call_same_time(make):
    """Medians of samples taken in turns, so that other work hits both alike."""
    call, timer = make(), Timer(CPU, Sampling(1))
    theirs = benchmark.Timer('call()', globals={'call': call})
    timer.warm_up(call)
    ours_ms, theirs_ms = [], []
    for _ in range(ROUNDS):
        ours_ms += timer.sample(call, 1)
        theirs_ms.append(theirs.timeit(1).median * 1e3)
    ratio = np.median(ours_ms) / np.median(theirs_ms)
    assert 0.5 < ratio < 2
