"""``python -m deform_gqa``: what can run here, and what is missing."""

import importlib

import pytest
import torch

from deform_gqa import __main__ as main
from deform_gqa.ops.common.backends import OPS


def test_says_what_runs_here(capsys):
    main.main()
    said = capsys.readouterr().out
    assert f'torch      torch {torch.__version__}' in said
    assert 'naive   all operators' in said
    assert 'scaled_dot_product_gqa has no Triton kernel' in said
    if not torch.cuda.is_available():
        assert 'Triton kernels run on CUDA devices, the tensors are on cpu' in said
        assert 'No GPU: this torch' in said
    assert 'Nothing is missing.' in said


@pytest.mark.parametrize('error', [ImportError, AssertionError])
def test_says_what_to_install(monkeypatch, capsys, error):
    def import_module(name):
        raise error(f'no {name} here')

    monkeypatch.setattr(importlib, 'import_module', import_module)
    monkeypatch.setattr(main, 'package_version', lambda name: None)
    main.main()
    said = capsys.readouterr().out
    assert 'triton     not installed' in said
    assert 'mmdet, for the modules, the backbone and detectors: pip install' in said
    assert '(no mmcv._ext here)' in said


def test_every_op_is_named_once_for_a_backend():
    lines = main.backends(torch.device('cpu'))
    triton = ' '.join(line for line in lines if line.startswith('triton'))
    for op in OPS:
        assert triton.replace(',', ' ').split().count(op) == 1
