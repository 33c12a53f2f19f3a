"""What the conversions of T5 and BERT share.

Grouping and merging of heads are those of :mod:`deform_gqa.conversion`, which learns
here how models of transformers are converted.
"""

import copy
import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from deform_gqa.checks import check_int
from deform_gqa.conversion import convert_model, find_adapter


def check_kv_heads(name: str, kv_heads: int, heads: int) -> None:
    """A number of kv heads to which that many heads can be merged.

    Raises:
        TypeError: If it is not an integer.
        ValueError: If it does not divide the heads.
    """
    check_int(name, kv_heads, least=1)
    if heads % kv_heads:
        raise ValueError(f'{name} must divide the {heads} heads, got {kv_heads}')


def find_attentions(root: nn.Module, kind: type[nn.Module]) -> dict[str, nn.Module]:
    """All modules of a kind by name, the root included (as '').

    Raises:
        TypeError: If there is none.
    """
    found = {
        name: module
        for name, module in root.named_modules()
        if isinstance(module, kind)
    }
    if not found:
        raise TypeError(
            f'module must be or hold a {kind.__name__}, got {type(root).__name__}'
        )
    return found


def convert(
    root: nn.Module, counts: Mapping[str, int], inplace: bool, **options: Any
) -> nn.Module:
    """The root, or a copy, in which the named attentions have that many kv heads.

    Args:
        root: A model, a part of one, or an attention.
        counts: Numbers of kv heads by name.
        inplace: Whether attentions are replaced in the root itself.
        options: Of :func:`deform_gqa.conversion.convert_model`.
    """
    patterns = {f'^{re.escape(name)}$': count for name, count in counts.items()}
    root, _ = convert_model(root, patterns, inplace=inplace, **options)
    return with_kv_heads(root, counts)


def with_kv_heads(root: nn.Module, counts: Mapping[str, int]) -> nn.Module:
    """Put grouped-query attention in the place of the named modules.

    Those that have their number of kv heads keep their weights; of others, the first
    heads are taken.
    """
    for name, count in counts.items():
        module = root.get_submodule(name)
        new = find_adapter(module).with_kv_heads(module, count)
        if name == '':
            return new
        parent, _, child = name.rpartition('.')
        setattr(root.get_submodule(parent), child, new)
    return root


def take_children(
    new: nn.Module, old: nn.Module, projections: Collection[str], num_rows: int
) -> None:
    """Give an attention the children of another that has more kv heads.

    Args:
        new: Has weights on the device meta.
        old: Shares its children with the new one.
        projections: Names of the projections of keys and values, of which the new one
            has the first rows.
        num_rows: Their number.
    """
    new.train(old.training)
    for name, child in old.named_children():
        if name in projections and child.out_features != num_rows:
            child = _first_rows(child, num_rows)
        setattr(new, name, child)


def _first_rows(linear: nn.Linear, num_rows: int) -> nn.Linear:
    has_bias = linear.bias is not None
    new = nn.Linear(linear.in_features, num_rows, has_bias, device='meta')
    for name, old in linear.named_parameters():
        rows = old.detach()[:num_rows].clone()
        setattr(new, name, nn.Parameter(rows, requires_grad=old.requires_grad))
    return new.train(linear.training)


def replace_configs(
    root: nn.Module, kind: type[PreTrainedConfig], **fields: int
) -> None:
    """Make the configs of the models in a module ones of another class.

    Parts of a model share its config: each is replaced once, for all who have it.
    Configs of other models, which may be around these, stay.

    Args:
        root: A model, or a part of one.
        kind: Class of the new configs, derived from that of the old ones.
        fields: What they get besides the attributes of the old ones.
    """
    models = [part for part in root.modules() if isinstance(part, PreTrainedModel)]
    made = {
        id(model.config): _derived(model.config, kind)
        for model in models
        if isinstance(model.config, kind.__base__)
    }
    for config in made.values():
        for name, value in fields.items():
            setattr(config, name, value)
    for part in root.modules():
        config = getattr(part, 'config', None)
        if id(config) in made:
            part.config = made[id(config)]


def _derived(
    config: PreTrainedConfig, kind: type[PreTrainedConfig]
) -> PreTrainedConfig:
    """A config with all attributes of another, also those that no file holds."""
    new = kind()
    new.__dict__.update(copy.deepcopy(vars(config)))
    return new
