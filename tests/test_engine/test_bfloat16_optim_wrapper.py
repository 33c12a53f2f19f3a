import torch
from mmengine.optim import build_optim_wrapper
from torch import nn

from deform_gqa.engine import BFloat16OptimWrapper


def test_forward_in_bfloat16_and_step_in_float32():
    model = nn.Linear(4, 1)
    cfg = dict(type='BFloat16OptimWrapper', optimizer=dict(type='SGD', lr=0.1))
    wrapper = build_optim_wrapper(model, cfg)
    assert isinstance(wrapper, BFloat16OptimWrapper)
    before = model.weight.detach().clone()
    with wrapper.optim_context(model):
        out = model(torch.ones(2, 4))
    assert out.dtype == torch.bfloat16
    wrapper.update_params(out.float().mean())
    assert model.weight.dtype == torch.float32
    assert not torch.equal(model.weight, before)
