"""Every block letter against the official implementation: outputs and gradients."""

import pytest
from golden import check_against_golden, load_golden, sub_dict

from deform_gqa.models import (
    DeformableGQA,
    NeighborhoodAttention,
    PyramidAttention,
    ShiftedWindowAttention,
    WindowAttention,
)
from deform_gqa.models.layers import ConvMLP

DEFORMABLE = [
    'dwcpe',
    'logcpb',
    'nooffset',
    'nope',
    'rpe_nonsquare_native_table',
    'rpe_nonsquare_resampled_table',
    'rpe_range2',
    'rpe_square',
]
# What the official checkpoint holds besides parameters.
BUFFERS = ('attn_mask', 'relative_position_index')


def check(module, arrays):
    state = sub_dict(arrays, 'state/')
    module.load_state_dict({k: v for k, v in state.items() if k not in BUFFERS})
    check_against_golden(module, arrays)


def position_bias(config):
    if not config['use_pe']:
        return None
    for key, name in (('dwc_pe', 'dwc'), ('fixed_pe', 'fixed'), ('log_cpb', 'log_cpb')):
        if config[key]:
            return name
    return 'table'


INTERPRETED = pytest.param('triton', marks=pytest.mark.interpret)


@pytest.mark.parametrize('backend', ['naive', 'torch', INTERPRETED])
@pytest.mark.parametrize('name', DEFORMABLE)
def test_deformable(name, backend):
    config, arrays = load_golden(f'dat_attn_{name}')
    module = DeformableGQA(
        config['dim'],
        config['heads'],
        offset_groups=config['groups'],
        stride=config['stride'],
        offset_kernel_size=config['ksize'],
        offset_range_factor=config['offset_range_factor'],
        table_size=config['fmap_size'],
        position_bias=position_bias(config),
        use_offset=not config['no_off'],
        backend=backend,
    )
    check(module, arrays)


@pytest.mark.parametrize('name', ['local_attn', 'local_attn_pad'])
def test_window(name):
    config, arrays = load_golden(name)
    window = config['window_size']
    check(WindowAttention(config['dim'], config['heads'], window_size=window), arrays)


def test_shifted_window():
    config, arrays = load_golden('shift_attn')
    window = config['window_size']
    module = ShiftedWindowAttention(config['dim'], config['heads'], window_size=window)
    check(module, arrays)


@pytest.mark.parametrize('backend', ['naive', 'torch', INTERPRETED])
def test_neighborhood(backend):
    config, arrays = load_golden('neighborhood_attn')
    module = NeighborhoodAttention(
        config['dim'],
        config['num_heads'],
        kernel_size=config['kernel_size'],
        backend=backend,
    )
    check(module, arrays)


def test_pyramid():
    config, arrays = load_golden('pyramid_attn')
    module = PyramidAttention(
        config['dim'], config['num_heads'], sr_ratio=config['sr_ratio']
    )
    check(module, arrays)


def test_conv_mlp():
    config, arrays = load_golden('mlp_dwconv')
    check(ConvMLP(config['channels'], config['expansion']), arrays)
