"""What conversion learns from calibration data."""

import json

import pytest
import torch
from mmengine.model import BaseModel
from torch import nn

from deform_gqa.conversion import convert_model, convert_state_dict
from deform_gqa.conversion.calibration import OutputStatistics
from deform_gqa.models.layers import DeformableGQA, NeighborhoodAttention

HEADS = 4


class Model(nn.Module):
    """Attention to maps and to tokens, with a module that stands in two places."""

    def __init__(self, bias=True):
        super().__init__()
        self.map = NeighborhoodAttention(16, HEADS, kernel_size=3)
        self.log_cpb = DeformableGQA(16, HEADS, stride=2, position_bias='log_cpb')
        self.tokens = nn.MultiheadAttention(16, HEADS, bias=bias, batch_first=True)
        self.again = self.tokens

    def forward(self, x):
        x = x + self.map(x)
        x = x + self.log_cpb(x)
        x = x.flatten(2).mT
        for attention in (self.tokens, self.again):
            x = x + attention(x, x, x)[0]
        return x


def make(**options):
    torch.manual_seed(0)
    model = Model(**options).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope='module')
def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 16, 7, 9, generator=generator) for _ in range(2)]


def errors(report):
    return [layer.error for layer in report.layers]


@torch.no_grad()
@pytest.mark.parametrize('refit', [False, True])
def test_errors_are_those_of_the_outputs(batches, refit):
    attention = make().map
    converted, report = convert_model(
        attention, 1, calibration=batches, refit_output=refit
    )
    wanted = torch.cat([attention(x) for x in batches])
    change = torch.cat([converted(x) for x in batches]) - wanted
    [error] = errors(report)
    assert error == pytest.approx(float(change.norm() / wanted.norm()), rel=1e-4)


@pytest.mark.parametrize('bias', [True, False])
def test_refit_lowers_all_errors(batches, bias):
    model = make(bias=bias)
    _, report = convert_model(model, 2, calibration=batches, refit_output=True)
    assert len(report.layers) == 4
    for layer in report.layers:
        assert layer.error < 0.95 * layer.error_before_refit


def test_refit_of_the_same_heads_changes_nothing(batches):
    """If merging made no error, the ridge leaves the projection where it is."""
    attention = make().map
    for name in ('qkv.weight', 'qkv.bias'):
        rows = attention.get_parameter(name).detach().unflatten(0, (3, HEADS, -1))
        rows[1:, 1::2] = rows[1:, ::2].clone()
    converted, report = convert_model(
        attention, 2, calibration=batches, refit_output=True
    )
    torch.testing.assert_close(converted.proj.weight, attention.proj.weight)
    assert errors(report)[0] < 1e-5


def test_refit_does_not_follow_noise():
    """Outputs that have nothing to do with the inputs: the projection stays near."""
    torch.manual_seed(0)
    weight, bias = torch.zeros(3, 8).double(), torch.zeros(3).double()
    noise, linear = OutputStatistics(), OutputStatistics()
    for _ in range(8):
        x, y = torch.randn(3, 8), torch.randn(3, 3)
        noise.add(x, 0 * y, y)
        linear.add(x, 0 * y, x @ torch.arange(24.0).reshape(8, 3) + 5)
    assert noise.error == linear.error == 1
    fitted, _, error, held_out = noise.refit(weight, bias)
    assert fitted.norm() < 0.2
    assert error < 1 < 1.3 * held_out
    fitted, shift, error, held_out = linear.refit(weight, bias)
    torch.testing.assert_close(
        fitted.T, torch.arange(24.0).double().reshape(8, 3), rtol=0.01, atol=0.01
    )
    torch.testing.assert_close(shift, torch.full((3,), 5.0).double(), rtol=0.01, atol=0)
    assert error <= held_out < 0.01


def test_a_single_call_is_fitted_with_care(batches):
    """Nothing says how the fit does elsewhere, so the ridge is strong."""
    attention = make().map
    _, report = convert_model(attention, 2, calibration=batches[:1], refit_output=True)
    [layer] = report.layers
    assert layer.error_held_out is None
    assert 0.8 * layer.error_before_refit < layer.error < layer.error_before_refit
    _, report = convert_model(attention, 2, calibration=batches, refit_output=True)
    assert report.layers[0].error_held_out > report.layers[0].error


def test_learned_weights_beat_the_mean(batches):
    reports = [
        convert_model(make(), 2, merge=merge, calibration=batches)[1]
        for merge in ('mean', 'learned')
    ]
    means, learned = map(errors, reports)
    assert all(x < y for x, y in zip(learned, means, strict=True))


def test_grouping_by_activations(batches):
    """Heads that differ where the inputs are zero alone are equal."""
    attention = make().map
    inputs = [x * (torch.arange(16) < 8)[:, None, None] for x in batches]
    with torch.no_grad():
        rows = attention.qkv.weight.unflatten(0, (3, HEADS, -1))
        bias = attention.qkv.bias.unflatten(0, (3, HEADS, -1))
        for first, second in ((0, 3), (1, 2)):
            rows[1:, second, :, :8] = rows[1:, first, :, :8]
            bias[1:, second] = bias[1:, first]
        rows[1:, :2, :, 8:] = 3 * rows[1:, 2:, :, 8:]
    _, report = convert_model(attention, 2, 'activations', calibration=inputs)
    assert report.layers[0].groups == [[0, 3], [1, 2]]
    assert errors(report)[0] < 1e-5
    assert convert_model(attention, 2, 'similarity')[1].layers[0].groups != [
        [0, 3],
        [1, 2],
    ]


def test_batches_may_be_dicts_or_a_function(batches):
    class Detector(BaseModel):
        def __init__(self):
            super().__init__()
            self.model = make()

        def forward(self, inputs, mode='tensor'):
            return self.model(inputs)

    class ByName(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = make()

        def forward(self, pixels):
            return self.model(pixels)

    def run(model):
        for x in batches:
            model(x)

    reports = [
        convert_model(make(), 2, calibration=batches)[1],
        convert_model(make(), 2, calibration=run)[1],
        convert_model(Detector(), 2, calibration=[dict(inputs=x) for x in batches])[1],
        convert_model(ByName(), 2, calibration=[dict(pixels=x) for x in batches])[1],
    ]
    for report in reports[1:]:
        assert errors(report) == pytest.approx(errors(reports[0]), rel=1e-5)


def test_the_model_is_not_changed(batches):
    model = make().train()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    convert_model(model, 2, merge='aligned', calibration=batches, refit_output=True)
    assert model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_weights_of_a_file_are_calibrated_with_a_grouped_model(batches):
    """The model that is built for fewer heads serves as well as the old one."""
    model = make()
    grouped, _ = convert_model(model, 2)
    options = dict(merge='aligned', calibration=batches, refit_output=True)
    state, _ = convert_state_dict(model.state_dict(), grouped, None, **options)
    expected, _ = convert_state_dict(model.state_dict(), model, 2, **options)
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, rtol=1e-3, atol=1e-4)


def test_report_as_json_and_picture(batches, tmp_path):
    _, report = convert_model(make(), 2, calibration=batches, refit_output=True)
    report.write(tmp_path / 'report')
    folder = tmp_path / 'report'
    saved = json.loads((folder / 'conversion.json').read_text())
    assert saved['options']['calibrated'] is True
    assert [layer['error'] for layer in saved['layers']] == errors(report)
    assert (folder / 'conversion.png').read_bytes().startswith(b'\x89PNG')
    table = (folder / 'conversion.md').read_text().splitlines()
    assert len(table) == 2 + len(report.layers) + 1
    assert f'{report.layers[0].error:.3f}' in table[2]


@pytest.mark.parametrize('calibration', [torch.ones(1), 'images', 3, [1]])
def test_calibration_of_another_type(calibration):
    with pytest.raises(TypeError, match='calibration'):
        convert_model(make(), 2, calibration=calibration)


@pytest.mark.parametrize(
    ('calibration', 'message'),
    [([], 'must hold batches, got none'), (lambda model: None, 'does not run map')],
)
@pytest.mark.parametrize('merge', ['mean', 'aligned', 'learned'])
def test_calibration_without_data(calibration, message, merge):
    with pytest.raises(ValueError, match=message):
        convert_model(make(), 2, merge=merge, calibration=calibration)
