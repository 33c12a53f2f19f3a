"""The arch zoo: complete options of every name, and what a wrong dict is told."""

import copy
import math

import pytest

from deform_gqa.archs import ARCH_DEFAULTS, ARCHS, NUM_STAGES, resolve_arch

STAGE_LISTS = sorted(set(ARCH_DEFAULTS) - {'conv_stem', 'stem_dim'})


@pytest.mark.parametrize('name', ARCHS)
def test_every_name_is_complete(name):
    zoo = copy.deepcopy(ARCHS)
    arch = resolve_arch(name)
    assert arch.keys() == ARCH_DEFAULTS.keys()
    assert arch['stem_dim'] == arch['embed_dims'][0]
    for option in STAGE_LISTS:
        assert len(arch[option]) == NUM_STAGES
    assert resolve_arch(arch) == arch
    arch['stem_dim'] = 0
    assert zoo == ARCHS


def test_options_of_a_dict_take_precedence():
    arch = resolve_arch({**ARCHS['mini'], 'strides': (4, 4, 2, 2), 'stem_dim': 16})
    assert arch == resolve_arch('mini') | {'strides': (4, 4, 2, 2), 'stem_dim': 16}


@pytest.mark.parametrize(
    ('arch', 'error', 'message'),
    [
        ('mega', ValueError, "arch must be one of .*'mini'.*, got 'mega'"),
        (3, TypeError, 'arch must be a name or a dict, got int'),
        ({'depth': 3}, ValueError, r"unknown arch options \['depth'\]"),
        ({'embed_dims': (8,) * 4}, ValueError, "arch dict must hold 'depths'"),
    ],
)
def test_no_arch(arch, error, message):
    with pytest.raises(error, match=message):
        resolve_arch(arch)


@pytest.mark.parametrize('option', STAGE_LISTS)
@pytest.mark.parametrize('value', [(1,) * 3, 'abcd', 4])
def test_lists_have_one_entry_for_each_stage(option, value):
    message = f"arch option '{option}' must have 4 entries, got {value!r}"
    with pytest.raises(ValueError) as error:
        resolve_arch({**ARCHS['mini'], option: value})
    assert str(error.value) == message


@pytest.mark.parametrize('option', ['embed_dims', 'depths', 'num_heads'])
@pytest.mark.parametrize('value', [True, 2.0, None])
def test_counts_are_integers(option, value):
    counts = [*ARCHS['mini'][option][:3], value]
    message = f"'{option}' of stage 3 must be an integer, got {value}"
    with pytest.raises(TypeError, match=message):
        resolve_arch({**ARCHS['mini'], option: counts})
    counts[3] = 0
    with pytest.raises(ValueError, match=f"'{option}' of stage 3 must be at least 1"):
        resolve_arch({**ARCHS['mini'], option: counts})


@pytest.mark.parametrize('option', ['mlp_ratio', 'layer_scale'])
def test_factors_are_numbers(option):
    message = f"'{option}' of stage 1 must be a number, got True"
    with pytest.raises(TypeError, match=message):
        resolve_arch({**ARCHS['mini'], option: (1, True, 1, 1)})


@pytest.mark.parametrize('option', ['use_offsets', 'lpu', 'dwconv_mlp'])
def test_flags(option):
    message = f"'{option}' of stage 1 must be a bool, got 'False' of type str"
    with pytest.raises(TypeError, match=message):
        resolve_arch({**ARCHS['mini'], option: (True, 'False', True, True)})
    with pytest.raises(TypeError, match="'conv_stem' must be a bool, got 'False'"):
        resolve_arch({**ARCHS['mini'], 'conv_stem': 'False'})


def test_letters_are_strings():
    with pytest.raises(TypeError, match='stage 1 must be a string, got 2'):
        resolve_arch({**ARCHS['mini'], 'block_types': ('ND', 2, 'ND', 'DD')})


def test_unknown_options_of_several_types():
    with pytest.raises(ValueError, match=r"unknown arch options \[1, 'x'\]"):
        resolve_arch({**ARCHS['mini'], 'x': 3, 1: 2})


def test_ranges():
    for ratio in (-1, 0, math.nan, math.inf):
        with pytest.raises(ValueError, match="'mlp_ratio' of stage 0 must be positive"):
            resolve_arch({**ARCHS['mini'], 'mlp_ratio': (ratio, 4, 4, 4)})
    with pytest.raises(ValueError, match='stage 3 must name 2 blocks'):
        resolve_arch({**ARCHS['mini'], 'block_types': ('ND', 'ND', 'ND', 'D')})
    with pytest.raises(ValueError, match="'stem_dim' must be at least 2, got 1"):
        resolve_arch({**ARCHS['mini'], 'stem_dim': 1})
    resolve_arch({**ARCHS['mini'], 'stem_dim': 1, 'conv_stem': False})
