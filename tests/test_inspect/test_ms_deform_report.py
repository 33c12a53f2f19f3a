"""Counts of ms_deform_attn's compiled kernels, and of others' beside them."""

import os
import sys

import pytest
import torch

pytest.importorskip('triton')
if os.environ.get('TRITON_INTERPRET') == '1':
    pytest.skip('interpreted kernels do not compile', allow_module_level=True)

from deform_gqa.inspect import ms_deform_report, sass
from deform_gqa.inspect.representative import multi_scale

NAME = 'triton_multi_scale_deformable_attention'
INPUTS = (
    'img, points, weights, shapes, B, I, C, N, H, L, P, BC, BL, BP, '
    'PAD: tl.constexpr, ALIGN: tl.constexpr'
)
STAND_IN = f"""
from types import SimpleNamespace
import triton
import triton.language as tl

@triton.jit
def forward(out, {INPUTS}):
    tl.store(out, 0.0)

@triton.jit
def backward(d_img, d_points, d_weights, d_out, {INPUTS}):
    tl.make_no_such_thing()

{NAME}_fwd_kernel = SimpleNamespace(fn=forward)
{NAME}_bwd_kernel = SimpleNamespace(fn=backward)
"""
LOOPS = """
        /*0000*/                   MOV R1, R2 ;
.L_x_0:
        /*0010*/                   IADD3 R1, R2, R3 ;
.L_x_1:
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/               @P0 BRA `(.L_x_1) ;
        /*0040*/               @P1 BRA `(.L_x_0) ;
        /*0050*/                   EXIT ;
"""


def test_loops_over_levels_and_points():
    code = sass.parse(LOOPS)
    assert ms_deform_report.times_executed(code) == [1, 4, 16, 16, 4, 1]


@pytest.mark.aot
def test_counts_of_a_sample():
    forward, backward = (
        ms_deform_report.report_samples(launch, 90, torch.bfloat16)
        for launch in multi_scale(90, 32, torch.bfloat16)
    )
    # Four pixels of 64 bytes, by 16 a lane or, in two halves, by 8
    for report, size in ((forward, 16), (backward, 8)):
        assert report.loads * size == pytest.approx(8, abs=0.3)
        assert report.load_bytes == size and report.kernel.local_bytes == 0
    assert forward.atomics == 0 and forward.instructions < 27
    # 4 x 32 numbers by four a lane
    assert (
        backward.atomics == pytest.approx(1.0, abs=0.01) and backward.atomic_bytes == 16
    )
    assert backward.instructions < 46
    assert forward.bound_us < 85 and backward.bound_us < 145
    assert 'ms_deform_attn_fwd_kernel' in str(forward)


def test_no_copy_of_others(monkeypatch):
    monkeypatch.delenv(ms_deform_report.FOREIGN_VARIABLE, raising=False)
    assert list(ms_deform_report.foreign_launches()) == []


def test_others_are_compiled_as_they_are(monkeypatch, tmp_path, capsys):
    package = tmp_path / 'msda_triton'
    package.mkdir()
    (package / '__init__.py').touch()
    (package / 'kernels.py').write_text(STAND_IN)
    monkeypatch.setenv(ms_deform_report.FOREIGN_VARIABLE, str(tmp_path))
    try:
        monkeypatch.setattr(ms_deform_report, 'multi_scale', lambda *_: [])
        ms_deform_report.print_table([90], [torch.bfloat16])
    finally:
        for name in ('msda_triton', 'msda_triton.kernels'):
            sys.modules.pop(name, None)
    lines = capsys.readouterr().out.splitlines()[1:]
    assert len(lines) == 4
    assert all('90  float32' in line for line in lines[:2])
    assert all('backward does not compile' in line for line in lines[2:])
