"""Conversion at the moment when weights are loaded, for whoever loads them."""

import functools
from typing import Any

from mmdet.registry import MODELS
from torch import Tensor, nn

from .adapter import attention_modules
from .convert import convert_state_dict


@MODELS.register_module()
def convert_heads_on_load(model: dict | nn.Module, **options: Any) -> nn.Module:
    """Lets a model with grouped queries load weights of more kv heads.

    It stands in a config as a type, around the model's own dict, and adds nothing to
    the names of parameters. Each attention module then converts what it is given to
    load, whoever loads it: ``init_cfg`` of any backbone, an inferencer, or
    ``load_state_dict``. Weights with its own number of kv heads stay as they are.

    Args:
        model: Config of the model, or the model itself, which is changed.
        options: ``grouping``, ``merge`` and ``seed`` of
            :func:`deform_gqa.conversion.convert_state_dict`.

    Returns:
        The model.
    """
    model = MODELS.build(model) if isinstance(model, dict) else model
    for module in set(attention_modules(model).values()):
        module.register_load_state_dict_pre_hook(
            functools.partial(_convert, options=options)
        )
    return model


def _convert(
    module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_, options: dict
) -> None:
    own = {
        name: state_dict[prefix + name]
        for name in module.state_dict()
        if prefix + name in state_dict
    }
    if own:
        converted, _ = convert_state_dict(own, module, **options)
        state_dict.update((prefix + name, value) for name, value in converted.items())
