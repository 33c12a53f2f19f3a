"""The package is cheap to import, and its ops need nothing but torch."""

import subprocess
import sys

import pytest


def run(code: str) -> None:
    subprocess.run([sys.executable, '-c', code], check=True, timeout=120)


def test_package_imports_no_torch():
    run('import sys, deform_gqa; assert "torch" not in sys.modules')


@pytest.mark.parametrize('missing', ['mmengine', 'mmcv', 'mmdet', 'triton', 'cv2'])
def test_ops_without(missing):
    """None in sys.modules makes an import fail as if nothing were installed."""
    run(
        f'import sys; sys.modules[{missing!r}] = None\n'
        'import torch\n'
        'from deform_gqa.ops import deform_attn\n'
        'q = torch.rand(1, 2, 6, 8)\n'
        'assert deform_attn(q, q, q, grid_size=(2, 3)).shape == q.shape\n'
    )


def test_no_triton_is_an_unsupported_reason():
    run(
        'import importlib.util\n'
        'find_spec = importlib.util.find_spec\n'
        'importlib.util.find_spec = lambda name: (\n'
        '    None if name == "triton" else find_spec(name))\n'
        'import torch\n'
        'from deform_gqa.ops import unsupported_reason\n'
        'reason = unsupported_reason("deform_attn", "triton",\n'
        '    device=torch.device("cuda"), dtype=torch.float16, head_dim=32)\n'
        'assert reason == "the package triton is not installed", reason\n'
    )
