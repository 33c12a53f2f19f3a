"""Adapters of the attention modules of this package."""

import torch
from torch import Tensor, nn

from deform_gqa.models.layers import (
    DeformableGQA,
    MultiheadGQA,
    NeighborhoodAttention,
    PyramidAttention,
    WindowAttention,
)

from .adapter import AttentionAdapter, Names, register_adapter, resize_kv
from .heads import Freedom


def both(name: str) -> tuple[str, str]:
    """Weight and bias of a submodule."""
    return f'{name}.weight', f'{name}.bias'


def channels_of(heads: list[int], head_dim: int) -> Tensor:
    """Indices of the channels of these heads, in their order."""
    return (torch.as_tensor(heads)[:, None] * head_dim + torch.arange(head_dim)).ravel()


class BaseAttentionAdapter(AttentionAdapter):
    """Modules derived from BaseAttention."""

    def with_kv_heads(self, module: nn.Module, num_kv_heads: int) -> nn.Module:
        module = super().with_kv_heads(module, num_kv_heads)
        module.kv_dim = module.head_dim * num_kv_heads
        return module


@register_adapter(WindowAttention)
class WindowAdapter(BaseAttentionAdapter):
    """Block letters L and S."""

    def names(self, module: nn.Module) -> Names:
        qkv = both('proj_qkv')
        return Names(qkv, qkv, qkv, both('proj_out'))

    def tables(self, module: nn.Module) -> dict[str, int]:
        return {'relative_position_bias_table': 1}


@register_adapter(NeighborhoodAttention)
class NeighborhoodAdapter(BaseAttentionAdapter):
    """Block letter N."""

    def names(self, module: nn.Module) -> Names:
        return Names(both('qkv'), both('qkv'), both('qkv'), both('proj'))

    def tables(self, module: nn.Module) -> dict[str, int]:
        return {'rpb': 0}


@register_adapter(PyramidAttention)
class PyramidAdapter(BaseAttentionAdapter):
    """Block letter P."""

    def names(self, module: nn.Module) -> Names:
        return Names(both('q'), both('kv'), both('kv'), both('proj'))


@register_adapter(DeformableGQA)
class DeformableAdapter(BaseAttentionAdapter):
    """Block letter D.

    The offset network reads the queries, and a position bias of type 'dwc' adds them
    to the values: there, neither may be changed.
    """

    def names(self, module: nn.Module) -> Names:
        return Names(both('proj_q'), both('proj_k'), both('proj_v'), both('proj_out'))

    def freedom(self, module: nn.Module) -> Freedom:
        return Freedom(
            query='none' if module.use_offset else 'any',
            value=module.position_bias != 'dwc',
        )

    def head_period(self, module: nn.Module) -> int:
        """The offset groups share one network, so their heads are reordered alike."""
        if not module.use_offset:
            return module.num_heads
        return module.num_heads // module.offset_groups

    def reorder_rest(
        self, module: nn.Module, state: dict[str, Tensor], order: list[int]
    ) -> dict[str, Tensor]:
        period = self.head_period(module)
        channels = channels_of(order, module.head_dim)
        first = channels_of(order[:period], module.head_dim)  # of one offset group
        moved = self._offset_network(state, first) if module.use_offset else {}
        heads = torch.as_tensor(order)
        if module.position_bias in ('table', 'fixed'):
            moved['rpe_table'] = state['rpe_table'][heads]
        elif module.position_bias == 'log_cpb':
            moved['rpe_table.2.weight'] = state['rpe_table.2.weight'][heads[:period]]
        elif module.position_bias == 'dwc':
            for name in both('rpe_table'):
                moved[name] = state[name][channels]
        return moved

    def _offset_network(
        self, state: dict[str, Tensor], channels: Tensor
    ) -> dict[str, Tensor]:
        """The network for permuted channels: a filter a channel, a norm, a sum."""
        names = (*both('conv_offset.0'), *both('conv_offset.1.norm'))
        moved = {name: state[name][channels] for name in names}
        moved['conv_offset.3.weight'] = state['conv_offset.3.weight'][:, channels]
        return moved


@register_adapter(MultiheadGQA)
class MultiheadGQAAdapter(AttentionAdapter):
    """Its optional norm before the output projection sees the values' channels."""

    def names(self, module: nn.Module) -> Names:
        biased = module.q_proj.bias is not None
        return Names(
            *(
                (f'{name}.weight', f'{name}.bias' if biased else None)
                for name in ('q_proj', 'k_proj', 'v_proj', 'out_proj')
            )
        )

    def num_heads(self, module: nn.Module) -> int:
        return module.query_heads

    def num_kv_heads(self, module: nn.Module) -> int:
        return module.kv_heads

    def freedom(self, module: nn.Module) -> Freedom:
        plain = module.norm is None
        return Freedom(value=plain, value_bias=plain)

    def reorder_rest(
        self, module: nn.Module, state: dict[str, Tensor], order: list[int]
    ) -> dict[str, Tensor]:
        channels = channels_of(order, module.embed_dim // module.query_heads)
        names = () if module.norm is None else both('norm')
        return {name: state[name][channels] for name in names}

    def with_kv_heads(self, module: nn.Module, num_kv_heads: int) -> nn.Module:
        module = resize_kv(module, self, num_kv_heads)
        module.kv_heads = num_kv_heads
        return module
