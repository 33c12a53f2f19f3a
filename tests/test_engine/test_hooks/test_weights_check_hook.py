import pytest
import torch
from tiny_training import make_runner

from deform_gqa.engine.hooks.weights_check_hook import WeightsCheckHook


def load(tmp_path, checkpoint: dict) -> None:
    torch.save(checkpoint, tmp_path / 'a.pth')
    runner = make_runner(str(tmp_path), hooks=(WeightsCheckHook(),))
    runner.load_checkpoint(str(tmp_path / 'a.pth'))


@pytest.mark.parametrize('prefix', ['', 'module.'])
def test_what_fits_in_part_is_loaded(tmp_path, prefix):
    state = {f'{prefix}layers.0.bias': torch.ones(8), 'other': torch.ones(1)}
    load(tmp_path, dict(state_dict=state))
    load(tmp_path, state)


@pytest.mark.parametrize(
    'state',
    [
        {},
        {'backbone.layers.0.bias': torch.ones(8)},
        {'layers.0.bias': torch.ones(9), 'layers.0.weight': torch.ones(4, 8)},
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, state):
    message = f'nothing in the checkpoint fits the model: .* {len(state)} entries'
    with pytest.raises(ValueError, match=message):
        load(tmp_path, dict(state_dict=state))
