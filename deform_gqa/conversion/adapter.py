"""What conversion knows about a class of attention modules.

An adapter says where the projections of a module are in its state_dict, which changes
of them are exact, and how the module with fewer kv heads is made. Grouping and merging
work on the plain tensors that it reads.
"""

import abc
import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from .heads import AttentionHeads, Freedom, Projection

State = Mapping[str, Tensor]
_ADAPTERS: dict[str, 'AttentionAdapter'] = {}


@dataclasses.dataclass(frozen=True)
class Names:
    """Names of the parameters of a module: (weight, bias), the bias possibly None.

    Projections that share a parameter are packed in it in the order q, k, v.
    """

    q: tuple[str, str | None]
    k: tuple[str, str | None]
    v: tuple[str, str | None]
    out: tuple[str, str | None]


class AttentionAdapter(abc.ABC):
    """Base class of adapters; its defaults fit a module with the attributes it names.

    A subclass defines :meth:`names`, and what differs from these defaults: any
    invertible matrix may be put between queries and keys and between values and the
    output projection, query heads may change places freely, and a module with fewer kv
    heads is a copy whose k and v parameters and attribute ``num_kv_heads`` are smaller.
    """

    @abc.abstractmethod
    def names(self, module: nn.Module) -> Names:
        """Where the projections are, relative to the module."""

    def num_heads(self, module: nn.Module) -> int:
        """Query heads Hq."""
        return module.num_heads

    def num_kv_heads(self, module: nn.Module) -> int:
        """Key/value heads that the module has."""
        return module.num_kv_heads

    def freedom(self, module: nn.Module) -> Freedom:
        """Which changes of the heads leave the module's output as it is."""
        return Freedom()

    def head_period(self, module: nn.Module) -> int:
        """Query heads may change places within consecutive blocks of so many heads.

        All blocks are reordered alike. The number of heads sets no limit; 1 allows no
        change.
        """
        return self.num_heads(module)

    def tables(self, module: nn.Module) -> dict[str, int]:
        """Parameters with an entry for each query head, and the dimension of that."""
        return {}

    def reorder_rest(
        self, module: nn.Module, state: dict[str, Tensor], order: Sequence[int]
    ) -> dict[str, Tensor]:
        """The remaining parameters when query head i was ``order[i]`` before."""
        return {
            name: state[name].index_select(
                dim, torch.as_tensor(order, device=state[name].device)
            )
            for name, dim in self.tables(module).items()
        }

    def value_heads(self, module: nn.Module) -> tuple[int, ...] | None:
        """Which head of the values each query head reads, if not as the keys."""
        return None

    def set_value_heads(self, module: nn.Module, value_heads: tuple[int, ...]) -> None:
        """Sets that; the module is a new one.

        Raises:
            ValueError: If modules of this class read keys and values alike.
        """
        raise ValueError(
            f'{type(module).__name__} cannot group keys and values differently'
        )

    def check(self, module: nn.Module) -> None:  # noqa: B027  most have none
        """Raises ValueError for options of a module that cannot be converted."""

    def with_kv_heads(self, module: nn.Module, num_kv_heads: int) -> nn.Module:
        """A module like this one with another number of kv heads, and any weights."""
        module = resize_kv(module, self, num_kv_heads)
        module.num_kv_heads = num_kv_heads
        return module

    def inputs(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
        """The inputs, channels last, of q, k and v in a call of the module.

        None if the projections are submodules that are called: these are watched.
        """
        return None


def register_adapter(*classes: type | str) -> Callable[[type], type]:
    """Registers an adapter class for classes of attention modules.

    Args:
        classes: Classes, or their full names ('package.module.Class'), which are not
            imported. The adapter serves their subclasses as well, unless these have
            one of their own.
    """

    def register(adapter: type) -> type:
        for cls in classes:
            _ADAPTERS[cls if isinstance(cls, str) else full_name(cls)] = adapter()
        return adapter

    return register


def full_name(cls: type) -> str:
    return f'{cls.__module__}.{cls.__qualname__}'


def find_adapter(module: nn.Module) -> AttentionAdapter | None:
    """The adapter of a module's class, or of the nearest base class that has one."""
    for cls in type(module).__mro__:
        adapter = _ADAPTERS.get(full_name(cls))
        if adapter is not None:
            return adapter
    return None


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The attention modules that conversion knows, by name.

    Modules within one of them are its own affair. A module that stands in two places
    comes twice, as in the state_dict.
    """
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        inside = any(outer == '' or name.startswith(f'{outer}.') for outer in found)
        if not inside and find_adapter(module) is not None:
            found[name] = module
    return found


def head_counts(module: nn.Module, state: State, prefix: str) -> tuple[int, int]:
    """The head dimension and the number of kv heads of the weights in a state_dict.

    Raises:
        ValueError: If a parameter is missing, or does not fit the query heads.
    """
    adapter = find_adapter(module)
    names, num_heads = adapter.names(module), adapter.num_heads(module)
    out = _get(state, prefix, names.out[0])
    head_dim, rest = divmod(out.shape[1], num_heads)
    if rest or head_dim == 0:
        raise ValueError(
            f'{prefix}{names.out[0]} has shape {tuple(out.shape)}, which does not fit '
            f'{num_heads} query heads'
        )
    rows = _get(state, prefix, names.k[0]).shape[0]
    packed = [role for role in 'qkv' if getattr(names, role)[0] == names.k[0]]
    rows -= num_heads * head_dim if 'q' in packed else 0
    kv_heads, rest = divmod(rows, head_dim * (2 if 'v' in packed else 1))
    if rest or kv_heads < 1 or num_heads % kv_heads:
        raise ValueError(
            f'{prefix}{names.k[0]} has shape '
            f'{tuple(state[prefix + names.k[0]].shape)}, which does not fit '
            f'{num_heads} query heads of {head_dim} channels'
        )
    return head_dim, kv_heads


def read_heads(module: nn.Module, state: State, prefix: str = '') -> AttentionHeads:
    """The projections of a module, from its weights in a state_dict.

    Raises:
        ValueError: If a parameter is missing, has a shape that does not fit, or holds
            numbers that are not finite.
    """
    adapter = find_adapter(module)
    names, num_heads = adapter.names(module), adapter.num_heads(module)
    head_dim, kv_heads = head_counts(module, state, prefix)
    counts = dict(q=num_heads, k=kv_heads, v=kv_heads)

    def part(role: str, kind: int) -> Tensor | None:
        name = getattr(names, role)[kind]
        if name is None:
            return None
        heads = {r: counts[r] for r in 'qkv' if getattr(names, r)[kind] == name}
        tensor = _get_finite(state, prefix, name)
        if tensor.shape[0] != sum(heads.values()) * head_dim:
            raise ValueError(
                f'{prefix}{name} has shape {tuple(tensor.shape)}, expected '
                f'{sum(heads.values())} heads of {head_dim} channels'
            )
        tensor = tensor.unflatten(0, (-1, head_dim)).split(list(heads.values()))
        tensor = tensor[list(heads).index(role)]
        return tensor.flatten(2) if kind == 0 else tensor

    out = _get_finite(state, prefix, names.out[0]).flatten(1)
    out_bias = None
    if names.out[1] is not None:
        out_bias = _get_finite(state, prefix, names.out[1])
    return AttentionHeads(
        *(Projection(part(role, 0), part(role, 1)) for role in 'qkv'),
        out=out.T.unflatten(0, (num_heads, head_dim)),
        out_bias=out_bias,
    )


def write_heads(
    module: nn.Module, heads: AttentionHeads, like: State, prefix: str = ''
) -> dict[str, Tensor]:
    """The parameters that hold these heads, with dtype and device of ``like``."""
    names = find_adapter(module).names(module)
    parts: dict[str, list[Tensor]] = {}
    for role in 'qkv':
        weight, bias = getattr(names, role)
        projection = getattr(heads, role)
        parts.setdefault(weight, []).append(projection.weight.flatten(0, 1))
        if bias is not None:
            parts.setdefault(bias, []).append(projection.bias.flatten())
    parts[names.out[0]] = [heads.out.flatten(0, 1).T]
    if names.out[1] is not None:
        parts[names.out[1]] = [heads.out_bias]
    written = {}
    for name, tensors in parts.items():
        old = like[prefix + name]
        tensor = torch.cat(tensors)
        tensor = tensor.reshape(*tensor.shape, *old.shape[tensor.ndim :])
        written[prefix + name] = tensor.to(old).contiguous()
    return written


def resize_kv(
    module: nn.Module, adapter: AttentionAdapter, num_kv_heads: int
) -> nn.Module:
    """A copy whose parameters of keys and values have another number of heads."""
    module = copy.deepcopy(module)
    names = adapter.names(module)
    state = module.state_dict()
    head_dim, kv_heads = head_counts(module, state, '')
    shared = {}
    for name in (*names.k, *names.v):
        if name is not None:
            shared[name] = shared.get(name, 0) + num_kv_heads - kv_heads
    for name, extra in shared.items():
        owner_name, _, leaf = name.rpartition('.')
        owner = module.get_submodule(owner_name)
        old = getattr(owner, leaf)
        shape = (old.shape[0] + extra * head_dim, *old.shape[1:])
        new = nn.Parameter(old.new_zeros(shape), requires_grad=old.requires_grad)
        setattr(owner, leaf, new)
        for size in ('out_features', 'out_channels'):
            if hasattr(owner, size):
                setattr(owner, size, shape[0])
    return module


def _get(state: State, prefix: str, name: str) -> Tensor:
    if prefix + name not in state:
        raise ValueError(f'the state_dict has no {prefix + name}')
    return state[prefix + name]


def _get_finite(state: State, prefix: str, name: str) -> Tensor:
    tensor = _get(state, prefix, name).double().cpu()
    if not tensor.isfinite().all():
        raise ValueError(f'{prefix}{name} holds numbers that are not finite')
    return tensor
