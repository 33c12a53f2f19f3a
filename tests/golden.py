"""Reference data in tests/data/golden, made by the original implementations."""

import json
from pathlib import Path

import numpy as np
import torch

GOLDEN = Path(__file__).parent / 'data' / 'golden'
RELATIVE_TOLERANCE = 1e-4


def load_golden(name: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """(config, arrays) of tests/data/golden/NAME.npz."""
    with np.load(GOLDEN / f'{name}.npz', allow_pickle=False) as data:
        arrays = {k: torch.from_numpy(data[k]) for k in data.files if k != 'config'}
        return json.loads(str(data['config'])), arrays


def load_state(name: str) -> dict:
    """The JSON with 'config', 'params_M' and 'state' (parameter name -> shape)."""
    return json.loads((GOLDEN / f'{name}_state.json').read_text())


def sub_dict(arrays: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Entries under ``prefix``, with the prefix cut off."""
    return {k[len(prefix) :]: v for k, v in arrays.items() if k.startswith(prefix)}


def assert_close(
    name: str, actual: torch.Tensor, expected: torch.Tensor, floor: float = 1e-6
) -> None:
    """Largest error relative to the largest expected value (or ``floor``)."""
    assert actual.shape == expected.shape, (name, actual.shape, expected.shape)
    error = (actual - expected).abs().max().item()
    scale = max(expected.abs().max().item(), floor)
    assert error <= RELATIVE_TOLERANCE * scale, f'{name}: {error / scale:.2e} relative'


def check_against_golden(module: torch.nn.Module, arrays: dict) -> None:
    """Outputs, and the gradients of x and of every parameter, where recorded."""
    x = arrays['x'].clone().requires_grad_()
    outs = module(x)
    outs = outs if isinstance(outs, tuple) else (outs,)
    for i, out in enumerate(outs):
        assert_close(f'y{i}', out, arrays[f'y{i}'])
    if 'grad_x' not in arrays:
        return
    loss = sum((out * arrays[f'gy{i}']).sum() for i, out in enumerate(outs))
    loss.backward()
    assert_close('grad_x', x.grad, arrays['grad_x'])
    grads = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    expected_grads = sub_dict(arrays, 'grad/')
    # Softmax does not feel a shift of all keys: gradients of key biases are rounding
    # noise around zero and have no scale of their own.
    floor = 1e-2 * max(grad.abs().max().item() for grad in expected_grads.values())
    for name, expected in expected_grads.items():
        if name in grads:
            assert_close(name, grads[name], expected, floor)
        else:
            assert not expected.any(), f'{name} has no gradient'
