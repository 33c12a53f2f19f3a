"""The arch zoo of the DAT backbone: what each name and each option stands for.

It needs nothing but the standard library, so that the benchmark of the ops, which runs
where no mm package is installed, reads its sizes here too. Lists have one entry for
each stage. 't', 's' and 'b' are DAT (arXiv 2201.00520) as released in 2022, 't++',
's++' and 'b++' DAT++ (arXiv 2309.01430) as of 2023, with the values of the official
configurations. 'mini' is our own small DAT++, for small images.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from deform_gqa.checks import check_bool, check_int, check_number

NUM_STAGES = 4

# Every option of an arch dict with its default; None must be given.
ARCH_DEFAULTS: dict[str, Any] = dict(
    embed_dims=None,
    depths=None,
    num_heads=None,
    # A string of block letters for each stage, one letter for each block.
    block_types=None,
    offset_groups=(1, 1, 1, 1),
    strides=(8, 4, 2, 1),
    offset_kernel_sizes=(9, 7, 5, 3),
    offset_range_factors=(-1, -1, -1, -1),
    neighborhood_sizes=(7, 7, 7, 7),
    window_sizes=(7, 7, 7, 7),
    position_bias=('table', 'table', 'table', 'table'),
    use_offsets=(True, True, True, True),
    # Map sizes that the bias tables are made for: those of a 224 x 224 image.
    table_sizes=(56, 28, 14, 7),
    sr_ratios=(8, 4, 2, 1),
    # A 3x3 depthwise convolution (local perception unit) before each block.
    lpu=(True, True, True, True),
    dwconv_mlp=(True, True, True, True),
    mlp_ratio=(4, 4, 4, 4),
    # Initial value of the scales of the residual branches; 0 or less for no scales.
    layer_scale=(-1, -1, -1, -1),
    # Two 3x3 convolutions in the stem and one between stages, in place of convolutions
    # whose kernels do not overlap.
    conv_stem=True,
    # Channels of the stem; None for those of the first stage.
    stem_dim=None,
)


def _dat(dims, heads, depth, groups) -> dict[str, Any]:
    return dict(
        embed_dims=dims,
        depths=(2, 2, depth, 2),
        num_heads=heads,
        block_types=('LS', 'LS', 'LD' * (depth // 2), 'LD'),
        offset_groups=(1, 1, *groups),
        strides=(1, 1, 1, 1),
        offset_range_factors=(-1, -1, 2, 2),
        lpu=(False,) * 4,
        dwconv_mlp=(False,) * 4,
        conv_stem=False,
    )


def _dat_pp(dims, heads, groups) -> dict[str, Any]:
    return dict(
        embed_dims=dims,
        depths=(2, 4, 18, 2),
        num_heads=heads,
        block_types=('ND', 'NDND', 'ND' * 9, 'DD'),
        offset_groups=groups,
    )


ARCHS: dict[str, dict[str, Any]] = {
    't': _dat((96, 192, 384, 768), (3, 6, 12, 24), 6, (3, 6)),
    's': _dat((96, 192, 384, 768), (3, 6, 12, 24), 18, (3, 6)),
    'b': _dat((128, 256, 512, 1024), (4, 8, 16, 32), 18, (4, 8)),
    't++': _dat_pp((64, 128, 256, 512), (2, 4, 8, 16), (1, 2, 4, 8)),
    's++': _dat_pp((96, 192, 384, 768), (3, 6, 12, 24), (1, 2, 3, 6)),
    'b++': _dat_pp((128, 256, 512, 1024), (4, 8, 16, 32), (2, 4, 8, 16)),
    'mini': dict(
        embed_dims=(32, 64, 128, 256),
        depths=(2, 2, 2, 2),
        num_heads=(2, 4, 8, 16),
        block_types=('ND', 'ND', 'ND', 'DD'),
        offset_groups=(1, 2, 4, 8),
        # Bias tables are made for 256 x 256 images.
        table_sizes=(64, 32, 16, 8),
    ),
}


def resolve_arch(arch: str | Mapping[str, Any]) -> dict[str, Any]:
    """A complete, checked arch dict from a name of the zoo or a dict.

    Raises:
        TypeError: If ``arch`` is neither a string nor a mapping, or an entry that must
            be a number, a flag or a string is not one.
        ValueError: For an unknown name or option, a missing option, a value that is not
            a list with one entry for each stage, or a number out of range.
    """
    if isinstance(arch, str):
        if arch not in ARCHS:
            raise ValueError(f'arch must be one of {tuple(ARCHS)}, got {arch!r}')
        arch = ARCHS[arch]
    elif not isinstance(arch, Mapping):
        raise TypeError(f'arch must be a name or a dict, got {type(arch).__name__}')
    unknown = sorted(set(arch) - set(ARCH_DEFAULTS), key=str)
    if unknown:
        raise ValueError(
            f'unknown arch options {unknown}, known: {list(ARCH_DEFAULTS)}'
        )
    arch = {**ARCH_DEFAULTS, **arch}
    for name in ('embed_dims', 'depths', 'num_heads', 'block_types'):
        if arch[name] is None:
            raise ValueError(f'arch dict must hold {name!r}')
    for name, value in arch.items():
        if name in ('conv_stem', 'stem_dim'):
            continue
        is_list = isinstance(value, Sequence) and not isinstance(value, str)
        if not is_list or len(value) != NUM_STAGES:
            raise ValueError(
                f'arch option {name!r} must have {NUM_STAGES} entries, got {value!r}'
            )
    _check_numbers(arch)
    _check_flags(arch)
    for stage, (letters, depth) in enumerate(
        zip(arch['block_types'], arch['depths'], strict=True)
    ):
        if not isinstance(letters, Sequence):
            raise TypeError(
                f'block_types of stage {stage} must be a string, got {letters!r}'
            )
        if len(letters) != depth:
            raise ValueError(
                f'block_types of stage {stage} must name {depth} blocks (its depth), '
                f'got {letters!r}'
            )
    if arch['stem_dim'] is None:
        arch['stem_dim'] = arch['embed_dims'][0]
    # The first of two convolutions has half of the channels.
    check_int("arch option 'stem_dim'", arch['stem_dim'], 2 if arch['conv_stem'] else 1)
    return arch


def _check_numbers(arch: Mapping[str, Any]) -> None:
    """Checks the numbers that no attention module checks."""
    for name in ('embed_dims', 'depths', 'num_heads', 'mlp_ratio', 'layer_scale'):
        for stage, value in enumerate(arch[name]):
            option = f'arch option {name!r} of stage {stage}'
            if name in ('mlp_ratio', 'layer_scale'):
                check_number(option, value)
            else:
                check_int(option, value, 1)
            if name == 'mlp_ratio' and not 0 < value < math.inf:
                raise ValueError(f'{option} must be positive, got {value}')


def _check_flags(arch: Mapping[str, Any]) -> None:
    """The string 'False' would be taken for True."""
    check_bool("arch option 'conv_stem'", arch['conv_stem'])
    for name in ('use_offsets', 'lpu', 'dwconv_mlp'):
        for stage, flag in enumerate(arch[name]):
            check_bool(f'arch option {name!r} of stage {stage}', flag)
