"""Adapters of torch's multi-head attention and of mmdet's window attention.

mmcv's ``MultiheadAttention``, in DETR, DINO and the decoder of Deformable DETR, holds
torch's module, which is what is converted.
"""

import inspect

from torch import nn

from deform_gqa.models.layers import GroupedMultiheadAttention, GroupedWindowMSA

from .adapter import AttentionAdapter, Names, register_adapter


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
            GroupedMultiheadAttention.check_original(module)

    def with_kv_heads(self, module: nn.Module, num_kv_heads: int) -> nn.Module:
        if isinstance(module, GroupedMultiheadAttention):
            return super().with_kv_heads(module, num_kv_heads)
        return GroupedMultiheadAttention.from_module(module, num_kv_heads)

    def value_heads(self, module: nn.Module) -> tuple[int, ...] | None:
        return getattr(module, 'value_heads', None)

    def set_value_heads(self, module: nn.Module, value_heads: tuple[int, ...]) -> None:
        module.value_heads = value_heads

    def inputs(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
        call = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        return call['query'], call['key'], call['value']


@register_adapter('mmdet.models.backbones.swin.WindowMSA', GroupedWindowMSA)
class WindowMSAAdapter(AttentionAdapter):
    """The attention of Swin."""

    def names(self, module: nn.Module) -> Names:
        bias = None if module.qkv.bias is None else 'qkv.bias'
        qkv = ('qkv.weight', bias)
        return Names(qkv, qkv, qkv, ('proj.weight', 'proj.bias'))

    def num_kv_heads(self, module: nn.Module) -> int:
        return getattr(module, 'num_kv_heads', module.num_heads)

    def tables(self, module: nn.Module) -> dict[str, int]:
        return {'relative_position_bias_table': 1}

    def with_kv_heads(self, module: nn.Module, num_kv_heads: int) -> nn.Module:
        if isinstance(module, GroupedWindowMSA):
            return super().with_kv_heads(module, num_kv_heads)
        return GroupedWindowMSA.from_module(module, num_kv_heads)
