"""Models with grouped queries, from configs that do not know of them."""

import functools
from typing import Any

from mmdet.registry import MODELS
from torch import Tensor, nn

from .adapter import attention_modules
from .convert import convert_model, convert_state_dict
from .kv_heads import KVHeads


@MODELS.register_module()
def convert_heads(
    model: dict | nn.Module, num_kv_heads: KVHeads = None, **options: Any
) -> nn.Module:
    """Builds a model, gives it grouped queries, and lets it load multi-head weights.

    It stands in a config as a type, around the model's own dict, and adds nothing to
    the names of parameters. From then on each attention module converts what it is
    given to load, whoever loads it: ``init_cfg`` of any backbone, ``load_from``, an
    inferencer. Weights with its own number of kv heads stay as they are.

    Args:
        model: Config of the model, or the model itself, which is changed.
        num_kv_heads: As in :func:`deform_gqa.conversion.convert_state_dict`; None if
            the model has grouped queries already.
        options: ``grouping``, ``merge`` and ``seed`` of that function.

    Returns:
        The model.

    Raises:
        ValueError: As ``convert_state_dict``; also when weights are loaded.
    """
    model = MODELS.build(model) if isinstance(model, dict) else model
    model, _ = convert_model(model, num_kv_heads, inplace=True, **options)
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
