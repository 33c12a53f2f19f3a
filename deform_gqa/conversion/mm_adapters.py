"""Adapters of torch's multi-head attention and of mmdet's window attention.

mmcv's ``MultiheadAttention``, in DETR, DINO and the decoder of Deformable DETR, holds
torch's module, which is what is converted.
"""

import inspect

from torch import nn

from deform_gqa.models.layers import GroupedMultiheadAttention, GroupedWindowMSA

from .adapter import AttentionAdapter, Names, full_name, register_adapter

WINDOW_MSA = 'mmdet.models.backbones.swin.WindowMSA'


def replace(module: nn.Module, new_class: type, num_kv_heads: int) -> nn.Module:
    """A new module of our class; parameters that were frozen are so."""
    new = new_class.from_module(module, num_kv_heads)
    for name, parameter in module.named_parameters():
        new.get_parameter(name).requires_grad_(parameter.requires_grad)
    return new


def check_forward(module: nn.Module, base: str) -> None:
    """Checks that a module computes what the class of this full name does.

    Raises:
        ValueError: For a subclass with a ``forward`` of its own, which would be lost.
    """
    [original] = [cls for cls in type(module).__mro__ if full_name(cls) == base]
    if type(module).forward is not original.forward:
        raise ValueError(
            f'{type(module).__name__} has a forward of its own, which the module that '
            f'takes the place of {original.__name__} would not have; register_adapter '
            'makes a class known'
        )


@register_adapter(nn.MultiheadAttention, GroupedMultiheadAttention)
class MultiheadAttentionAdapter(AttentionAdapter):
    """torch's module, and ours of the same interface."""

    def names(self, module: nn.Module) -> Names:
        bias = None if module.in_proj_bias is None else 'in_proj_bias'
        if module.in_proj_weight is not None:
            weights = ('in_proj_weight',) * 3
        else:
            weights = ('q_proj_weight', 'k_proj_weight', 'v_proj_weight')
        out_bias = None if module.out_proj.bias is None else 'out_proj.bias'
        return Names(
            *((weight, bias) for weight in weights), out=('out_proj.weight', out_bias)
        )

    def num_kv_heads(self, module: nn.Module) -> int:
        return getattr(module, 'num_kv_heads', module.num_heads)

    def check(self, module: nn.Module) -> None:
        if not isinstance(module, GroupedMultiheadAttention):
            check_forward(module, full_name(nn.MultiheadAttention))
            GroupedMultiheadAttention.check_original(module)

    def with_kv_heads(self, module: nn.Module, num_kv_heads: int) -> nn.Module:
        if isinstance(module, GroupedMultiheadAttention):
            return super().with_kv_heads(module, num_kv_heads)
        return replace(module, GroupedMultiheadAttention, num_kv_heads)

    def value_heads(self, module: nn.Module) -> tuple[int, ...] | None:
        return getattr(module, 'value_heads', None)

    def set_value_heads(self, module: nn.Module, value_heads: tuple[int, ...]) -> None:
        module.value_heads = value_heads

    def inputs(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
        call = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        return call['query'], call['key'], call['value']


@register_adapter(WINDOW_MSA, GroupedWindowMSA)
class WindowMSAAdapter(AttentionAdapter):
    """The attention of Swin."""

    def names(self, module: nn.Module) -> Names:
        bias = None if module.qkv.bias is None else 'qkv.bias'
        qkv = ('qkv.weight', bias)
        return Names(qkv, qkv, qkv, ('proj.weight', 'proj.bias'))

    def num_kv_heads(self, module: nn.Module) -> int:
        return getattr(module, 'num_kv_heads', module.num_heads)

    def check(self, module: nn.Module) -> None:
        if not isinstance(module, GroupedWindowMSA):
            check_forward(module, WINDOW_MSA)

    def tables(self, module: nn.Module) -> dict[str, int]:
        return {'relative_position_bias_table': 1}

    def with_kv_heads(self, module: nn.Module, num_kv_heads: int) -> nn.Module:
        if isinstance(module, GroupedWindowMSA):
            return super().with_kv_heads(module, num_kv_heads)
        return replace(module, GroupedWindowMSA, num_kv_heads)
