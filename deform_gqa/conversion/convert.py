"""Conversion of multi-head weights and models to grouped queries."""

import copy
import dataclasses
import math
import re
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from deform_gqa.checks import check_bool, check_int

from .adapter import (
    AttentionAdapter,
    State,
    attention_modules,
    find_adapter,
    head_counts,
    read_heads,
    write_heads,
)
from .grouping import (
    GROUPINGS,
    adjacent_groups,
    check_groups,
    head_similarity,
    similar_groups,
)
from .heads import AttentionHeads
from .kv_heads import KVHeads, resolve_num_kv_heads
from .merging import MERGES, merge_heads
from .report import ConversionReport, LayerReport


@dataclasses.dataclass
class Layer:
    """One attention module that is to be converted.

    Args:
        name: Name in the model.
        module: The module, with any number of kv heads.
        head_dim: Channels of a head.
        kv_heads: Number of kv heads in the state_dict.
        new_kv_heads: Number that is wanted.
    """

    name: str
    module: nn.Module
    head_dim: int
    kv_heads: int
    new_kv_heads: int

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


def convert_state_dict(
    state_dict: State,
    model: nn.Module,
    num_kv_heads: KVHeads = None,
    grouping: Any = 'adjacent',
    merge: str = 'mean',
    calibration: Any = None,
    *,
    refit_output: bool = False,
    seed: int = 0,
) -> tuple[dict[str, Tensor], ConversionReport]:
    """Converts the weights of a trained model to fewer key/value heads.

    Args:
        state_dict: Weights of the model, with at least as many kv heads as are wanted.
            They are not changed.
        model: A model with the modules that the weights belong to. Neither its weights
            nor its numbers of kv heads matter.
        num_kv_heads: A number (int); a fraction of the query heads (float, or string
            such as '1/4'); a mapping from patterns of module names (regular
            expressions) to such numbers, which leaves other modules as they are; or
            None, for the numbers that ``model`` has.
        grouping: 'adjacent'; 'similarity', of the heads' weights; 'activations', of
            what the heads make of the calibration data; lists of the kv heads of each
            group; or a mapping from patterns to one of these. Other heads than
            neighbours can be merged as far as the module's heads may change places.
        merge: 'mean', 'first', 'random', 'norm' (mean weighted by norms), 'aligned',
            'rotated' (see :mod:`deform_gqa.conversion.alignment`), or 'learned'
            (weights fitted to the calibration data).
        calibration: Calibration data: batches for which the model is run, tensors or
            dicts, or a function that is called with the model and runs it. 'aligned'
            and 'rotated' use it if it is given.
        refit_output: Whether the output projections are then fitted to the calibration
            data by ridge regression.
        seed: For ``merge='random'``.

    Returns:
        The converted state_dict, in the order of the old one, and the report. Modules
        that have their number of kv heads already stay as they are.

    Raises:
        TypeError: For an argument of the wrong type.
        ValueError: For numbers of heads that do not divide, an unknown grouping or
            merge, weights that do not fit the model, or missing calibration data.

    Source: Ainslie et al., "GQA" (arXiv 2305.13245), for 'adjacent' and 'mean'.
    """
    _check_options(grouping, merge, calibration, refit_output, seed)
    layers = find_layers(state_dict, model, num_kv_heads)
    groupings = _by_layer(grouping, layers)
    statistics = None
    if calibration is not None:
        raise NotImplementedError
    converted, reports = dict(state_dict), []
    for layer in layers:
        groups, new = _convert_layer(
            layer, state_dict, groupings[layer.name], merge, statistics, seed
        )
        converted.update(new)
        reports.append(_report(layer, state_dict, converted, groups))
    options = dict(grouping=grouping, merge=merge, refit_output=refit_output, seed=seed)
    return converted, ConversionReport(reports, options)


def convert_model(
    model: nn.Module,
    num_kv_heads: KVHeads,
    grouping: Any = 'adjacent',
    merge: str = 'mean',
    calibration: Any = None,
    *,
    refit_output: bool = False,
    seed: int = 0,
    inplace: bool = False,
) -> tuple[nn.Module, ConversionReport]:
    """Converts a model with its weights.

    Attention modules are replaced by modules with fewer kv heads: of the same class if
    it can have them, else of one with the same interface. It must happen before an
    optimizer or a wrapper such as DDP is given the parameters.

    Args:
        model: The model, or an attention module.
        inplace: Whether the modules are replaced in the model itself. Else a copy is
            converted.

    Other arguments, errors: As in :func:`convert_state_dict`.

    Returns:
        The converted model, and the report.
    """
    state = model.state_dict()
    converted, report = convert_state_dict(
        state,
        model,
        num_kv_heads,
        grouping,
        merge,
        calibration,
        refit_output=refit_output,
        seed=seed,
    )
    model = model if inplace else copy.deepcopy(model)
    counts = {layer.name: layer.kv_heads[1] for layer in report.layers}
    model = with_kv_heads(model, counts)
    for name, module in attention_modules(model).items():
        if name in counts:
            layer_state = {
                key: converted[f'{name}.{key}' if name else key]
                for key in module.state_dict()
            }
            module.load_state_dict(layer_state)
    return model, report


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


def _check_options(grouping, merge, calibration, refit_output, seed) -> None:
    check_bool('refit_output', refit_output)
    check_int('seed', seed)
    if merge not in MERGES:
        raise ValueError(f'merge must be one of {MERGES}, got {merge!r}')
    needs = {
        "grouping='activations'": _mentions(grouping, 'activations'),
        "merge='learned'": merge == 'learned',
        'refit_output=True': refit_output,
    }
    for option, needed in needs.items():
        if needed and calibration is None:
            raise ValueError(f'{option} needs calibration data, got calibration=None')


def _mentions(grouping: Any, name: str) -> bool:
    values = grouping.values() if isinstance(grouping, Mapping) else [grouping]
    return any(value == name for value in values)


def _by_layer(grouping: Any, layers: list[Layer]) -> dict[str, Any]:
    """The grouping of each layer; 'adjacent' where no pattern of a mapping fits."""
    if not isinstance(grouping, Mapping):
        grouping = {'': grouping}
    for pattern, value in grouping.items():
        if isinstance(value, str) and value not in GROUPINGS:
            raise ValueError(
                f'grouping must be one of {GROUPINGS}, lists of heads or a mapping, '
                f'got {value!r}'
            )
        if not any(re.search(pattern, layer.name) for layer in layers):
            raise ValueError(
                f'grouping: the pattern {pattern!r} fits none of the attention modules '
                f'{[layer.name for layer in layers]}'
            )
    return {
        layer.name: next(
            (v for p, v in grouping.items() if re.search(p, layer.name)), 'adjacent'
        )
        for layer in layers
    }


def _convert_layer(
    layer: Layer,
    state_dict: State,
    grouping: Any,
    merge: str,
    statistics: Any,
    seed: int,
) -> tuple[list[list[int]], dict[str, Tensor]]:
    """The groups of a layer, and those of its parameters that change."""
    given = not isinstance(grouping, str)
    if layer.new_kv_heads == layer.kv_heads and not given:
        return adjacent_groups(layer.kv_heads, layer.kv_heads), {}
    heads = read_heads(layer.module, state_dict, layer.prefix)
    freedom = layer.adapter.freedom(layer.module)
    if given:
        groups = check_groups(
            grouping, layer.kv_heads, layer.new_kv_heads, layer.period
        )
    elif grouping == 'adjacent':
        groups = adjacent_groups(layer.kv_heads, layer.new_kv_heads)
    else:
        similarity = _similarity(heads, merge in ('aligned', 'rotated'))
        groups = similar_groups(similarity, layer.new_kv_heads, layer.period)
    merged = merge_heads(
        heads,
        groups,
        merge,
        freedom=freedom,
        generator=_generator(heads, seed),
    )
    new = write_heads(layer.module, merged, state_dict, layer.prefix)
    order = heads.query_order([head for group in groups for head in group])
    if order != sorted(order):
        rest = layer.adapter.reorder_rest(layer.module, layer.state(state_dict), order)
        new.update((layer.prefix + name, value) for name, value in rest.items())
    return groups, new


def _similarity(heads: AttentionHeads, rotate: bool) -> Tensor:
    """(Hkv, Hkv): mean of the similarities of keys and of values."""
    similarities = [head_similarity(x.columns, rotate) for x in (heads.k, heads.v)]
    return sum(similarities) / 2


def _generator(heads: AttentionHeads, seed: int) -> torch.Generator:
    """Seeded by the layer's weights too: names differ between a file and a model."""
    own = zlib.crc32(heads.k.weight.numpy().tobytes())
    return torch.Generator().manual_seed((own << 16) ^ seed)


def _report(
    layer: Layer, old: State, new: State, groups: list[list[int]]
) -> LayerReport:
    names = layer.adapter.names(layer.module)
    parameters = [name for name, _ in layer.module.named_parameters()]
    weight = old[layer.prefix + names.k[0]]
    pair = layer.kv_heads, layer.new_kv_heads
    inputs = [
        math.prod(old[layer.prefix + getattr(names, role)[0]].shape[1:])
        + (getattr(names, role)[1] is not None)
        for role in 'kv'
    ]
    return LayerReport(
        name=layer.name,
        type=type(layer.module).__name__,
        num_heads=layer.num_heads,
        kv_heads=pair,
        params=tuple(
            sum(state[layer.prefix + name].numel() for name in parameters)
            for state in (old, new)
        ),
        kv_params=tuple(n * layer.head_dim * sum(inputs) for n in pair),
        kv_bytes=tuple(2 * n * layer.head_dim * weight.element_size() for n in pair),
        groups=groups,
    )
