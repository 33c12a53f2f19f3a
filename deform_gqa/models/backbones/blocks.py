"""Which attention module each block letter of a DAT stage builds."""

import inspect
from collections.abc import Mapping
from typing import Any

from mmdet.registry import MODELS
from torch import nn

from ..layers.registered import describe_kinds

# letter -> (default class, {its option: arch option})
LETTERS: dict[str, tuple[str, dict[str, str]]] = {
    'L': ('WindowAttention', {'window_size': 'window_sizes'}),
    'S': ('ShiftedWindowAttention', {'window_size': 'window_sizes'}),
    'N': ('NeighborhoodAttention', {'kernel_size': 'neighborhood_sizes'}),
    'P': ('PyramidAttention', {'sr_ratio': 'sr_ratios'}),
    'X': ('DepthwiseConv', {'kernel_size': 'window_sizes'}),
    'D': (
        'DeformableGQA',
        {
            'offset_groups': 'offset_groups',
            'stride': 'strides',
            'offset_kernel_size': 'offset_kernel_sizes',
            'offset_range_factor': 'offset_range_factors',
            'table_size': 'table_sizes',
            'position_bias': 'position_bias',
            'use_offset': 'use_offsets',
        },
    ),
}


def resolve_overrides(
    attention: Mapping[str, Any] | None,
) -> dict[str, dict[str, Any]]:
    """The overrides by block letter, as dicts of ``type`` and options.

    mmengine removes ``_delete_`` from a dict only where the base config has its key.

    Raises:
        TypeError: If an override, or ``attention`` itself, is not a dict.
    """
    if attention is None:
        return {}
    overrides = {}
    for letter, override in _without_delete('attention', attention).items():
        overrides[letter] = _without_delete(f'attention[{letter!r}]', override)
    return overrides


def _without_delete(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(config, Mapping):
        raise TypeError(f'{name} must be a dict, got {config!r}')
    return {key: value for key, value in config.items() if key != '_delete_'}


def check_letters(block_types, attention: Mapping[str, Any]) -> None:
    """Checks that every letter in use has a class and every override is in use.

    Raises:
        ValueError: Naming the letter.
    """
    used = set(''.join(''.join(letters) for letters in block_types))
    for letter in sorted(used):
        if letter not in LETTERS and 'type' not in attention.get(letter, {}):
            raise ValueError(
                f'block letter {letter!r} is none of {tuple(LETTERS)} and has no '
                f"'type' in attention={dict(attention)}"
            )
    unused = sorted(set(attention) - used)
    if unused:
        raise ValueError(
            f'attention overrides the block letters {unused}, which block_types '
            f'{tuple(block_types)} do not use'
        )


def build_attention(
    letter: str,
    arch: Mapping[str, Any],
    stage: int,
    override: Mapping[str, Any],
    **shared: Any,
) -> nn.Module:
    """The attention module of one block.

    Args:
        letter: Block letter.
        arch: Complete arch dict, whose options go to the letter's default class only.
        stage: Index of the stage.
        override: What the config says about this letter: ``type`` and options.
        shared: Options that every class gets whose signature names them: dim,
            num_heads, num_kv_heads, attn_drop, proj_drop, backend.

    Raises:
        TypeError: For an option that the class does not take.
        ValueError: For a type that is not registered.
    """
    default_type, arch_options = LETTERS.get(letter, (None, {}))
    options = dict(override)
    kind = options.pop('type', default_type)
    module_class = _find_class(kind) if isinstance(kind, str) else kind
    if not callable(module_class):
        raise ValueError(
            f'attention[{letter!r}]: {kind!r} is not registered in MODELS; '
            f'{describe_kinds()}'
        )
    parameters = inspect.signature(module_class).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    shared = {n: v for n, v in shared.items() if n in parameters or takes_all}
    if default_type is not None and module_class is _find_class(default_type):
        defaults = {option: arch[name][stage] for option, name in arch_options.items()}
        options = {**defaults, **options}
    unknown = sorted(set(options) - set(parameters))
    if unknown and not takes_all:
        raise TypeError(
            f'attention[{letter!r}]: {module_class.__name__} takes no option '
            f'{unknown}; options of an inherited config stay unless the override says '
            f'_delete_=True'
        )
    return module_class(**{**shared, **options})


def _find_class(name: str) -> type | None:
    """The class that is registered under a name, or None."""
    # The first MODELS.get imports mmdet.models, which needs mmcv's compiled ops.
    if name in MODELS.module_dict:
        return MODELS.module_dict[name]
    return MODELS.get(name)
