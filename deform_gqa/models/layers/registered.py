"""The attention modules that are registered, for messages that say what there is."""

from mmdet.registry import MODELS

from .base_attention import BaseAttention


def describe_kinds() -> str:
    """A sentence part that lists the modules with the interface of the blocks."""
    names = sorted(
        name
        for name, cls in MODELS.module_dict.items()
        if isinstance(cls, type) and issubclass(cls, BaseAttention)
    )
    return f'attention modules for blocks are {", ".join(names)}'
