"""The attention modules of a model that are converted, and their replacement."""

import copy
import dataclasses
from collections.abc import Mapping

from torch import Tensor, nn

from .adapter import (
    AttentionAdapter,
    State,
    attention_modules,
    find_adapter,
    head_counts,
)
from .kv_heads import KVHeads, resolve_num_kv_heads


@dataclasses.dataclass
class Layer:
    """One attention module that is to be converted.

    Args:
        name: Name in the model.
        module: The module, with any number of kv heads.
        head_dim: Channels of a head.
        kv_heads: Number of kv heads in the state_dict.
        new_kv_heads: Number that is wanted.
        value_heads: Which head of the values each query head then reads, if keys and
            values are grouped differently.
    """

    name: str
    module: nn.Module
    head_dim: int
    kv_heads: int
    new_kv_heads: int
    value_heads: tuple[int, ...] | None = None

    @property
    def prefix(self) -> str:
        return f'{self.name}.' if self.name else ''

    @property
    def adapter(self) -> AttentionAdapter:
        return find_adapter(self.module)

    @property
    def num_heads(self) -> int:
        return self.adapter.num_heads(self.module)

    @property
    def period(self) -> int:
        """Within how many kv heads these may change places."""
        period = self.adapter.head_period(self.module)
        share = self.num_heads // self.kv_heads
        return period // share if period % share == 0 else 1

    def state(self, state: State) -> dict[str, Tensor]:
        """The module's own entries of a state_dict of the model."""
        names = self.module.state_dict()
        return {
            name: state[self.prefix + name]
            for name in names
            if self.prefix + name in state
        }

    def make(self) -> nn.Module:
        """A module with the new number of kv heads, and any weights."""
        module = self.adapter.with_kv_heads(self.module, self.new_kv_heads)
        if self.value_heads is not None:
            find_adapter(module).set_value_heads(module, self.value_heads)
        return module


def with_kv_heads(model: nn.Module, counts: Mapping[str, int]) -> nn.Module:
    """Puts modules with these numbers of kv heads in the place of the named ones.

    The weights of a replaced module are lost. A module that stands in two places is
    replaced by one that does.

    Returns:
        The model, or the new module if the model itself is named (by '').
    """
    made: dict[int, nn.Module] = {}
    for name, module in attention_modules(model).items():
        adapter = find_adapter(module)
        if name not in counts or adapter.num_kv_heads(module) == counts[name]:
            continue
        if id(module) not in made:
            made[id(module)] = adapter.with_kv_heads(module, counts[name])
        if name == '':
            return made[id(module)]
        parent, _, child = name.rpartition('.')
        setattr(model.get_submodule(parent), child, made[id(module)])
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and made:
            module.use_nested_tensor = False  # which torch's own attention alone takes
    return model


def find_layers(
    state_dict: State, model: nn.Module, num_kv_heads: KVHeads
) -> list[Layer]:
    """The attention modules that are to be converted.

    Raises:
        ValueError: As :func:`convert_state_dict`.
    """
    modules = attention_modules(model)
    if not modules:
        raise ValueError(
            f'model {type(model).__name__} has no attention module that conversion '
            'knows; register_adapter makes one known'
        )
    adapters = {name: find_adapter(module) for name, module in modules.items()}
    counts = resolve_num_kv_heads(
        num_kv_heads,
        {
            name: (
                adapters[name].num_heads(module),
                adapters[name].num_kv_heads(module),
            )
            for name, module in modules.items()
        },
    )
    layers = []
    for name, new in counts.items():
        adapters[name].check(modules[name])
        prefix = f'{name}.' if name else ''
        head_dim, old = head_counts(modules[name], state_dict, prefix)
        if old % new:
            raise ValueError(
                f'{name or "the module"} has {old} kv heads in the state_dict, which '
                f'cannot be merged into num_kv_heads={new}'
            )
        layers.append(Layer(name, modules[name], head_dim, old, new))
    return layers


def skeleton(model: nn.Module, counts: Mapping[str, int]) -> nn.Module:
    """The model with these numbers of kv heads on the meta device: shapes alone."""
    memo = {id(x): nn.Parameter(x.to('meta')) for x in model.parameters()}
    memo |= {id(x): x.to('meta') for x in model.buffers()}
    return with_kv_heads(copy.deepcopy(model, memo), counts)
