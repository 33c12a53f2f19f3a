"""Another attention in a detector that names its attention classes in code."""

import copy
import functools
import inspect
import re

from mmdet.registry import MODELS
from torch import nn


@MODELS.register_module()
def swap_attention(model: dict | nn.Module, rules: list[dict]) -> nn.Module:
    """Builds a model, and puts modules of other classes in the place of some.

    It stands in a config as a type, around the model's own dict; nothing is added to
    the names of parameters. What a module and its successor have in common, options
    and weights, is kept: a swapped module gets each option of its class that the old
    one has as an attribute, and the old state_dict.

    Args:
        model: Config of the model, or the model itself, which is then changed.
        rules: For each, ``pattern``, a regular expression that is searched for in the
            names of modules; ``type``, a class in MODELS; further keys are its
            options. ``replaces`` names the class of the modules to be swapped, without
            its package (default 'MultiScaleDeformableAttention').

    Returns:
        The model. A swapped module is an instance of the old class as well: detectors
        initialise their attention modules by that.

    Raises:
        ValueError: For a rule without ``pattern`` or ``type``, or one that fits no
            module, or if the weights do not fit (as with fewer value heads, unless the
            rule says ``keep_weights=False``).
    """
    model = MODELS.build(model) if isinstance(model, dict) else model
    for rule in rules:
        _apply(model, rule)
    return model


def _apply(model: nn.Module, rule: dict) -> None:
    options = dict(rule)
    for name in ('pattern', 'type'):
        if name not in options:
            raise ValueError(f'a rule of swap_attention needs {name!r}, got {rule}')
    pattern = re.compile(options.pop('pattern'))
    replaced = options.pop('replaces', 'MultiScaleDeformableAttention')
    keep_weights = options.pop('keep_weights', True)
    found = [
        name
        for name, module in model.named_modules()
        if type(module).__name__ == replaced and pattern.search(name)
    ]
    if not found:
        raise ValueError(f'no {replaced} of the model has a name that fits {rule}')
    for name in found:
        parent, _, child = name.rpartition('.')
        old = model.get_submodule(name)
        new = _successor(old, options)
        if keep_weights:
            _copy_weights(name, old, new)
        setattr(model.get_submodule(parent), child, new)


def _successor(old: nn.Module, options: dict) -> nn.Module:
    options = copy.deepcopy(options)
    cls = MODELS.get(options['type'])
    if cls is None:
        raise ValueError(f'{options["type"]!r} is not registered in MODELS')
    for name in inspect.signature(cls).parameters:
        if hasattr(old, name):
            options.setdefault(name, _option(getattr(old, name)))
    new = MODELS.build(options)
    new.__class__ = _instance_of_both(type(new), type(old))
    parameter = next(old.parameters())
    return new.to(parameter.device, parameter.dtype).train(old.training)


def _option(attribute):
    """Dropout is kept as a module, and given as a rate."""
    return attribute.p if isinstance(attribute, nn.Dropout) else attribute


@functools.cache
def _instance_of_both(new: type, old: type) -> type:
    members = dict(__doc__=new.__doc__, __reduce__=_reduce)
    return type(new.__name__, (new, old), members)


def _reduce(module: nn.Module):
    """For pickle, which finds no class that is made at run time."""
    return _unpickled, type(module).__bases__, module.__dict__


def _unpickled(new: type, old: type) -> nn.Module:
    cls = _instance_of_both(new, old)
    return cls.__new__(cls)


def _copy_weights(name: str, old: nn.Module, new: nn.Module) -> None:
    try:
        new.load_state_dict(old.state_dict())
    except RuntimeError as error:
        raise ValueError(
            f'the weights of {name} do not fit {type(new).__name__}; a rule with '
            f'keep_weights=False draws new ones: {error}'
        ) from error
