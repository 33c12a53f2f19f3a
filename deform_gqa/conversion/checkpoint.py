"""Whole checkpoints: their names, and whether they fit the model."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from deform_gqa.models.backbones.dat import DAT
from deform_gqa.models.backbones.dat_checkpoint import (
    rename_official,
    resample_tables,
    unwrap_state_dict,
)

from .adapter import State
from .convert import convert_state_dict
from .kv_heads import KVHeads, check_pattern
from .layers import skeleton
from .report import ConversionReport

WRAPPER = 'module.'  # what DDP puts before the names of a model
NAMED_KEYS = 5  # in a message


def convert_checkpoint(
    checkpoint: Mapping,
    model: nn.Module,
    num_kv_heads: KVHeads = None,
    *,
    source: str = 'checkpoint',
    ignore: Sequence[str] = (),
    **options: Any,
) -> tuple[dict[str, Tensor], ConversionReport]:
    """Converts a checkpoint of a whole model, which has to fit it.

    Args:
        checkpoint: A state_dict, or one under 'model' or 'state_dict', with the names
            of the model or, in a DAT backbone, those of the official repositories.
        model: The model, with any number of kv heads.
        num_kv_heads: As in :func:`convert_state_dict`.
        source: What messages call the checkpoint.
        ignore: Regular expressions: keys in which one is found are left out.
        options: Further ones of :func:`convert_state_dict`.

    Returns:
        The state_dict and the report. Keys of the model may be missing from it, except
        those of the attention modules.

    Raises:
        ValueError: As :func:`convert_state_dict`, and for keys that the model does not
            have, or tensors of another shape, naming them.
    """
    for pattern in ignore:
        check_pattern('ignore', pattern)
    state = adapt_names(checkpoint, model)
    state = {
        name: value
        for name, value in state.items()
        if not any(re.search(pattern, name) for pattern in ignore)
    }
    check_keys(state, model, source)
    converted, report = convert_state_dict(state, model, num_kv_heads, **options)
    counts = {layer.name: layer.kv_heads[1] for layer in report.layers}
    check_shapes(converted, skeleton(model, counts), source)
    return converted, report


def adapt_names(checkpoint: Mapping, model: nn.Module) -> dict[str, Tensor]:
    """The weights of a checkpoint under the names and in the table sizes of a model."""
    state = dict(unwrap_state_dict(checkpoint))
    if state and all(name.startswith(WRAPPER) for name in state):
        state = {name.removeprefix(WRAPPER): value for name, value in state.items()}
    for name, module in model.named_modules():
        if isinstance(module, DAT):
            state = _adapt_backbone(state, module, f'{name}.' if name else '')
    return state


def _adapt_backbone(state: State, backbone: DAT, prefix: str) -> dict[str, Tensor]:
    own = {
        name.removeprefix(prefix): value
        for name, value in state.items()
        if name.startswith(prefix)
    }
    rest = {name: value for name, value in state.items() if not name.startswith(prefix)}
    own = resample_tables(rename_official(own), backbone)
    return {prefix + name: value for name, value in own.items()} | rest


def check_keys(state: State, model: nn.Module, source: str) -> None:
    """Checks that the model has all keys, and that they are tensors.

    Raises:
        ValueError: Naming those that it does not have, or that are something else.
    """
    known = model.state_dict()
    unknown = [name for name in state if name not in known]
    if unknown:
        raise ValueError(
            f'{source} has {len(unknown)} of {len(state)} keys that '
            f'{type(model).__name__} does not have: {_some(unknown)}'
        )
    others = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if others:
        raise ValueError(f'{source} has keys that are no tensors: {_some(others)}')


def check_shapes(state: State, model: nn.Module, source: str) -> None:
    """Checks that all tensors have the shapes of the model's.

    Raises:
        ValueError: Naming those that have others.
    """
    target = model.state_dict()
    wrong = [
        f'{name} has shape {tuple(value.shape)}, expected {tuple(target[name].shape)}'
        for name, value in state.items()
        if value.shape != target[name].shape
    ]
    if wrong:
        raise ValueError(
            f'{source} does not fit {type(model).__name__}: {_some(wrong, "; ")}'
        )


def _some(names: list[str], separator: str = ', ') -> str:
    more = len(names) - NAMED_KEYS
    listed = separator.join(names[:NAMED_KEYS])
    return listed + (f'{separator}and {more} more' if more > 0 else '')
