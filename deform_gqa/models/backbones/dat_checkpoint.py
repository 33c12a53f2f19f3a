"""Loading of official DAT checkpoints into the backbone."""

import math
from collections.abc import Mapping

import torch.nn.functional as F
from mmengine.logging import print_log
from mmengine.registry import Registry
from mmengine.runner import CheckpointLoader
from torch import Tensor, nn

from deform_gqa.checks import describe

# Buffers of the originals that are computed from the configuration here.
DROPPED_BUFFERS = ('attn_mask', 'relative_position_index')
CLASSIFIER = 'cls_'
# Functions that convert weights to fewer kv heads. Conversion stands above models: the
# registry imports it when a checkpoint needs it.
HEAD_CONVERTERS = Registry('head converter', locations=['deform_gqa.conversion'])


def load_dat_checkpoint(
    model: nn.Module,
    checkpoint: str | Mapping,
    prefix: str | None = None,
    map_location: str = 'cpu',
    convert_heads: str | Mapping | None = None,
) -> tuple[list[str], list[str]]:
    """Loads weights into a DAT backbone and logs what was missing or left over.

    Args:
        model: The backbone.
        checkpoint: A path or URL that mmengine can load, or the loaded dict: a
            state_dict, or one under 'model' or 'state_dict', of a classifier, a
            backbone or a whole detector (prefix 'backbone.').
        prefix: What the names of the wanted weights begin with; None for 'backbone.',
            if there are such names, else for all weights.
        map_location: Device on which a file is read.
        convert_heads: How weights of more kv heads become those of the backbone: the
            ``merge`` of :func:`deform_gqa.conversion.convert_state_dict`, or a dict
            with options of that function. None if they are to fit as they are.

    Returns:
        Missing and unexpected keys: for an official classification checkpoint the
        missing ones are the ``norms.*``.

    Raises:
        ValueError: If a tensor has another shape and cannot be resampled, as with
            projections for another number of kv heads or a bias that is 'fixed' to its
            map size, or if the checkpoint holds no weight of this backbone; with
            ``convert_heads``, for options or weights that conversion does not take.
        TypeError: If ``convert_heads`` is neither a string nor a dict.
    """
    source = 'checkpoint'
    if not isinstance(checkpoint, Mapping):
        source = str(checkpoint)
        checkpoint = CheckpointLoader.load_checkpoint(source, map_location)
    state = _under_prefix(unwrap_state_dict(checkpoint), prefix)
    state = resample_tables(rename_official(state), model)
    if convert_heads is not None:
        if isinstance(convert_heads, str):
            convert_heads = dict(merge=convert_heads)
        elif not isinstance(convert_heads, Mapping):
            raise TypeError(
                'convert_heads must be the name of a merge or a dict of options, got '
                f'{describe(convert_heads)}'
            )
        convert = HEAD_CONVERTERS.get('convert_state_dict')
        state, report = convert(state, model, **convert_heads)
        print_log(f'{source}: heads converted\n{report}', logger='current')
    check_shapes(state, model, source)
    missing, unexpected = model.load_state_dict(state, strict=False)
    if len(unexpected) == len(state):
        raise ValueError(f'{source} holds no weight of this backbone')
    print_log(
        f'{source}: {len(state) - len(unexpected)} tensors loaded; missing: {missing}; '
        f'unexpected: {unexpected}',
        logger='current',
    )
    return missing, unexpected


def unwrap_state_dict(checkpoint: Mapping) -> Mapping:
    """The weights of a checkpoint: its entry 'model' or 'state_dict', or all of it."""
    for wrapper in ('model', 'state_dict'):
        if wrapper in checkpoint and isinstance(checkpoint[wrapper], Mapping):
            checkpoint = checkpoint[wrapper]
    return checkpoint


def rename_official(state: Mapping) -> dict[str, Tensor]:
    """A backbone's weights under the names of this package.

    Buffers that are computed here, and the classifier, are left out.
    """
    renamed = {}
    for name, value in state.items():
        parts = name.split('.')
        if parts[-1] in DROPPED_BUFFERS or name.startswith(CLASSIFIER):
            continue
        if 'layer_scales' in parts and parts[-1] == 'gamma':
            name = '.'.join([*parts[:-1], 'weight'])  # the detection repository's name
        renamed[name] = value
    return renamed


def _under_prefix(state: Mapping, prefix: str | None) -> Mapping:
    """The entries under a prefix, which may end with a dot or not, as in mmengine."""
    start = 'backbone.' if prefix is None else prefix.removesuffix('.') + '.'
    if prefix is None and not any(name.startswith(start) for name in state):
        return state
    return {
        name[len(start) :]: value
        for name, value in state.items()
        if name.startswith(start)
    }


def resample_tables(state: Mapping, model: nn.Module) -> dict[str, Tensor]:
    """The weights, with bias tables of another size resampled as the model needs."""
    target = model.state_dict()
    return {
        name: _resample(name, value, target[name], model)
        if name in target
        and isinstance(value, Tensor)
        and value.shape != target[name].shape
        else value
        for name, value in state.items()
    }


def check_shapes(state: Mapping, model: nn.Module, source: str) -> None:
    """Checks the weights whose names the model has.

    Raises:
        ValueError: Naming a tensor of another shape than the model's.
    """
    target = model.state_dict()
    for name, value in state.items():
        if name in target and value.shape != target[name].shape:
            raise ValueError(
                f'{source}: {name} has shape {tuple(value.shape)}, the backbone needs '
                f'{tuple(target[name].shape)}'
            )


def _resample(name: str, value: Tensor, like: Tensor, model: nn.Module) -> Tensor:
    """Bicubic resampling, as in the official loader; other tensors as they are."""
    owner_name, _, leaf = name.rpartition('.')
    if leaf == 'relative_position_bias_table' and value.shape[1] == like.shape[1]:
        side, new_side = (math.isqrt(t.shape[0]) for t in (value, like))
        if side**2 == value.shape[0] and new_side**2 == like.shape[0]:
            table = value.T.reshape(1, -1, side, side)
            table = F.interpolate(table, (new_side, new_side), mode='bicubic')
            return table.reshape(-1, new_side**2).T
    # A dense bias has the same name as a table, but only a table's sides are 2 n - 1.
    owner = model.get_submodule(owner_name)
    is_table = getattr(owner, 'position_bias', None) != 'fixed' and all(
        side % 2 for side in value.shape[-2:]
    )
    if leaf in ('rpe_table', 'rpb') and is_table and value.shape[0] == like.shape[0]:
        return F.interpolate(value[None], like.shape[-2:], mode='bicubic')[0]
    return value
