"""Loading of official DAT checkpoints into the backbone."""

import math
from collections.abc import Mapping

import torch.nn.functional as F
from mmengine.logging import print_log
from mmengine.runner import CheckpointLoader
from torch import Tensor, nn

# Buffers of the originals that are computed from the configuration here.
DROPPED_BUFFERS = ('attn_mask', 'relative_position_index')
CLASSIFIER = 'cls_'


def load_dat_checkpoint(
    model: nn.Module,
    checkpoint: str | Mapping,
    prefix: str | None = None,
    map_location: str = 'cpu',
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

    Returns:
        Missing and unexpected keys: for an official classification checkpoint the
        missing ones are the ``norms.*``.

    Raises:
        ValueError: If a tensor has another shape and cannot be resampled, as with
            projections for another number of kv heads or a bias that is 'fixed' to its
            map size, or if the checkpoint holds no weight of this backbone.
    """
    source = 'checkpoint'
    if not isinstance(checkpoint, Mapping):
        source = str(checkpoint)
        checkpoint = CheckpointLoader.load_checkpoint(source, map_location)
    state = adapt_state_dict(checkpoint, model, source, prefix)
    missing, unexpected = model.load_state_dict(state, strict=False)
    if len(unexpected) == len(state):
        raise ValueError(f'{source} holds no weight of this backbone')
    print_log(
        f'{source}: {len(state) - len(unexpected)} tensors loaded; missing: {missing}; '
        f'unexpected: {unexpected}',
        logger='current',
    )
    return missing, unexpected


def adapt_state_dict(
    checkpoint: Mapping, model: nn.Module, source: str, prefix: str | None
) -> dict[str, Tensor]:
    """The checkpoint's weights under this backbone's names and in its table sizes."""
    state = checkpoint
    for wrapper in ('model', 'state_dict'):
        if wrapper in state and isinstance(state[wrapper], Mapping):
            state = state[wrapper]
    state = _under_prefix(state, prefix)
    target = model.state_dict()
    adapted = {}
    for name, value in state.items():
        parts = name.split('.')
        if parts[-1] in DROPPED_BUFFERS or name.startswith(CLASSIFIER):
            continue
        if 'layer_scales' in parts and parts[-1] == 'gamma':
            name = '.'.join([*parts[:-1], 'weight'])  # the detection repository's name
        if name in target and value.shape != target[name].shape:
            owner = model.get_submodule(name.rpartition('.')[0])
            value = _resample(name, value, target[name], owner, source)
        adapted[name] = value
    return adapted


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


def _resample(
    name: str, value: Tensor, like: Tensor, owner: nn.Module, source: str
) -> Tensor:
    """Bicubic resampling of a bias table, as in the official loader."""
    leaf = name.rsplit('.', 1)[-1]
    if leaf == 'relative_position_bias_table' and value.shape[1] == like.shape[1]:
        side, new_side = (math.isqrt(t.shape[0]) for t in (value, like))
        if side**2 == value.shape[0] and new_side**2 == like.shape[0]:
            table = value.T.reshape(1, -1, side, side)
            table = F.interpolate(table, (new_side, new_side), mode='bicubic')
            return table.reshape(-1, new_side**2).T
    # A dense bias has the same name as a table, but only a table's sides are 2 n - 1.
    is_table = getattr(owner, 'position_bias', None) != 'fixed' and all(
        side % 2 for side in value.shape[-2:]
    )
    if leaf in ('rpe_table', 'rpb') and is_table and value.shape[0] == like.shape[0]:
        return F.interpolate(value[None], like.shape[-2:], mode='bicubic')[0]
    raise ValueError(
        f'{source}: {name} has shape {tuple(value.shape)}, the backbone needs '
        f'{tuple(like.shape)}'
    )
