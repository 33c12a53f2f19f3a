"""Whole detectors of MMDetection, converted."""

import copy

import pytest
import torch
from tiny_detectors import DETECTORS, build, outputs

from deform_gqa.conversion import convert_model, find_adapter
from deform_gqa.conversion.adapter import attention_modules
from deform_gqa.models.layers import GroupedMultiheadAttention, GroupedWindowMSA

OURS = (GroupedMultiheadAttention, GroupedWindowMSA)


@pytest.fixture(scope='module', params=DETECTORS)
def detector(request):
    return build(DETECTORS[request.param]())


def size(x):
    return float(x.detach().abs().max())


def with_our_modules(model):
    """All attention modules replaced by ours, with the same weights and kv heads."""
    model = copy.deepcopy(model)
    for name, old in attention_modules(model).items():
        adapter = find_adapter(old)
        new = adapter.with_kv_heads(old, adapter.num_heads(old))
        assert isinstance(new, OURS)
        new.load_state_dict(old.state_dict())
        parent, _, child = name.rpartition('.')
        setattr(model.get_submodule(parent), child, new)
    return model


def test_our_modules_change_neither_outputs_nor_gradients(detector):
    results = []
    for model in (detector, with_our_modules(detector)):
        model.zero_grad()
        outs = outputs(model)
        sum(out.square().sum() for out in outs).backward()
        gradients = {n: p.grad for n, p in model.named_parameters()}
        results.append((outs, gradients))
    (outs, gradients), (our_outs, our_gradients) = results
    for out, wanted in zip(our_outs, outs, strict=True):
        torch.testing.assert_close(out, wanted, rtol=0, atol=1e-5 * size(wanted))
    for name, wanted in gradients.items():
        if wanted is None:
            assert our_gradients[name] is None
            continue
        atol = 1e-4 * max(size(wanted), 1e-6)
        torch.testing.assert_close(
            our_gradients[name], wanted, rtol=0, atol=atol, msg=name
        )


@torch.no_grad()
def test_as_many_kv_heads_change_nothing(detector):
    converted, report = convert_model(detector, 1.0)
    assert report.layers and not report.converted
    for out, wanted in zip(outputs(converted), outputs(detector), strict=True):
        assert torch.equal(out, wanted)


@torch.no_grad()
@pytest.mark.parametrize('merge', ['mean', 'aligned'])
def test_half_of_the_kv_heads(detector, merge):
    """The kv projections are half as large; equal heads are merged without error."""
    model = copy.deepcopy(detector)
    for module in attention_modules(model).values():
        names = find_adapter(module).names(module)
        for name in {names.k[0], names.k[1]}:
            rows = module.get_parameter(name).unflatten(0, (3, module.num_heads, -1))
            rows[1:, 1::2] = rows[1:, ::2].clone()
    converted, report = convert_model(model, '1/2', merge=merge)
    for layer in report.layers:
        assert layer.kv_params[0] == 2 * layer.kv_params[1]
        assert layer.kv_bytes[0] == 2 * layer.kv_bytes[1]
        assert layer.params[0] - layer.params[1] == layer.kv_params[1]
    for out, wanted in zip(outputs(converted), outputs(model), strict=True):
        atol = 1e-4 * size(wanted)
        torch.testing.assert_close(out, wanted, rtol=0, atol=atol)


def test_calibration_runs_every_layer(detector):
    _, report = convert_model(
        detector, '1/2', 'activations', calibration=outputs, refit_output=True
    )
    for layer in report.layers:
        assert layer.error < layer.error_before_refit


def test_frozen_stages_stay_frozen():
    detector = build(DETECTORS['swin']())
    detector.backbone.frozen_stages = 1
    detector.backbone.train()
    converted, _ = convert_model(detector, '1/2')
    frozen = [
        {name for name, x in model.named_parameters() if not x.requires_grad}
        for model in (detector, converted)
    ]
    assert any('w_msa.qkv' in name for name in frozen[0])
    assert frozen[1] == frozen[0]
