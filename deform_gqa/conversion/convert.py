"""Conversion of multi-head weights and models to grouped queries."""

import copy
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deform_gqa.checks import check_bool, check_int, describe
from deform_gqa.models.backbones.dat_checkpoint import HEAD_CONVERTERS

from .adapter import (
    State,
    attention_modules,
    find_adapter,
    read_heads,
    write_heads,
)
from .alignment import covariance, moment_root
from .calibration import Calibrator
from .grouping import (
    GROUPINGS,
    SeparateGrouping,
    adjacent_groups,
    check_groups,
    head_similarity,
    similar_groups,
)
from .heads import AttentionHeads, Moments
from .kv_heads import KVHeads, check_pattern
from .layers import Layer, find_layers, with_kv_heads
from .merging import MERGES, merge_heads
from .report import ConversionReport, LayerReport

ALIGNING = ('aligned', 'rotated')


@HEAD_CONVERTERS.register_module()
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
            group; ``SeparateGrouping``, or a dict with ``keys`` and ``values``, for
            torch's multi-head attention, whose values may be grouped differently; or a
            mapping from patterns of module names to one of these. Other heads than
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
    plans = [_Plan(layer, state_dict, groupings[layer.name]) for layer in layers]
    changing = [plan for plan in plans if plan.changes]
    calibrator = None
    if calibration is not None and changing:
        calibrator = Calibrator(
            state_dict, model, [plan.layer for plan in changing], calibration
        )
        if merge in ALIGNING or _mentions(grouping, 'activations'):
            moments = calibrator.moments()
            for plan in changing:
                plan.moments = moments[plan.layer.name]
    for plan in changing:
        plan.group(merge)
    weights = {}
    if merge == 'learned':
        weights = _learned_weights(calibrator, changing, state_dict)
    converted = dict(state_dict)
    for plan in changing:
        converted.update(plan.convert(merge, weights.get(plan.layer.name), seed))
    report = ConversionReport(
        [plan.report(state_dict, converted) for plan in plans],
        dict(
            grouping=grouping if isinstance(grouping, str) else 'given',
            merge=merge,
            calibrated=calibrator is not None,
            refit_output=refit_output,
            seed=seed,
        ),
    )
    if calibrator is not None:
        _compare(calibrator, converted, report, refit_output)
    return converted, report


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
    value_heads = {layer.name: layer.value_heads for layer in report.layers}
    for name, module in attention_modules(model).items():
        if name in counts:
            if value_heads[name] is not None:
                find_adapter(module).set_value_heads(module, value_heads[name])
            layer_state = {
                key: converted[f'{name}.{key}' if name else key]
                for key in module.state_dict()
            }
            module.load_state_dict(layer_state)
    return model, report


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
    return any(
        isinstance(value, str) and value == name
        for choice in _by_pattern(grouping).values()
        for value in _sides(choice)
    )


def _by_pattern(grouping: Any) -> dict[str, Any]:
    grouping = SeparateGrouping.parse(grouping)
    if not isinstance(grouping, Mapping):
        return {'': grouping}
    return {p: SeparateGrouping.parse(value) for p, value in grouping.items()}


def _sides(grouping: Any) -> list:
    """The groupings of keys and values, or the one of both."""
    if isinstance(grouping, SeparateGrouping):
        return [grouping.keys, grouping.values]
    return [grouping]


def _by_layer(grouping: Any, layers: list[Layer]) -> dict[str, Any]:
    """The grouping of each layer; 'adjacent' where no pattern of a mapping fits."""
    grouping = _by_pattern(grouping)
    for pattern, choice in grouping.items():
        check_pattern('grouping', pattern)
        for value in _sides(choice):
            if isinstance(value, str) and value not in GROUPINGS:
                raise ValueError(
                    f'grouping must be one of {GROUPINGS}, lists of heads or a '
                    f'mapping, got {value!r}'
                )
            if not isinstance(value, Sequence):
                raise TypeError(
                    'grouping must be a name, lists of heads or a mapping, got '
                    f'{describe(value)}'
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


class _Plan:
    """The conversion of one layer.

    Args:
        layer: The layer.
        state_dict: Weights of the model.
        grouping: Name of a grouping, or lists of heads.
    """

    def __init__(self, layer: Layer, state_dict: State, grouping: Any):
        self.layer = layer
        self.state_dict = state_dict
        self.grouping = grouping
        self.groups = adjacent_groups(layer.kv_heads, layer.kv_heads)
        self.value_groups: list[list[int]] | None = None
        self.moments = Moments()
        self.changes = layer.kv_heads != layer.new_kv_heads
        self.heads: AttentionHeads | None = None
        if self.changes:
            self.heads = read_heads(layer.module, state_dict, layer.prefix)

    def group(self, merge: str) -> None:
        """Chooses which heads are merged.

        Raises:
            ValueError: For groups that the module cannot have.
        """
        layer, grouping = self.layer, self.grouping
        if isinstance(grouping, SeparateGrouping):
            self.groups = self._groups(grouping.keys, 'k', layer.period, merge)
            self.value_groups = self._groups(grouping.values, 'v', None, merge)
            layer.value_heads = self._value_heads()
            layer.make()  # an error unless the module can have them
        else:
            self.groups = self._groups(grouping, 'kv', layer.period, merge)
        has = layer.adapter.value_heads(layer.module)
        if has is not None and has != layer.value_heads:
            raise ValueError(
                f'value_heads of {layer.name or "the module"} must be '
                f'{layer.value_heads} with this grouping, got {has}'
            )

    def _groups(
        self, grouping: Any, sides: str, period: int | None, merge: str
    ) -> list[list[int]]:
        old, new = self.layer.kv_heads, self.layer.new_kv_heads
        if not isinstance(grouping, str):
            return check_groups(grouping, old, new, period)
        if grouping == 'adjacent':
            return adjacent_groups(old, new)
        moments = self.moments if grouping == 'activations' else Moments()
        return similar_groups(self._similarity(sides, moments, merge), new, period)

    def _similarity(self, sides: str, moments: Moments, merge: str) -> Tensor:
        """(Hkv, Hkv): of keys ('k'), of values ('v'), or the mean of both ('kv')."""
        heads, freedom = self.heads, self.layer.adapter.freedom(self.layer.module)
        aligned = merge in ALIGNING
        roots = dict(k=covariance(moments.k), v=moments.v)
        rotate = dict(k=aligned and freedom.query == 'any', v=aligned and freedom.value)
        similarities = []
        for side in sides:
            columns = getattr(heads, side).columns
            columns = columns @ moment_root(columns, roots[side])
            similarities.append(head_similarity(columns, rotate[side]))
        return sum(similarities) / len(similarities)

    def _value_heads(self) -> tuple[int, ...]:
        """The new head of the values that each query head reads, in the new order."""
        new_head = {
            head: index
            for index, group in enumerate(self.value_groups)
            for head in group
        }
        share = self.heads.queries_per_kv_head
        return tuple(
            new_head[head]
            for group in self.groups
            for head in group
            for _ in range(share)
        )

    def convert(
        self,
        merge: str,
        weights: tuple[Tensor, Tensor] | None,
        seed: int,
    ) -> dict[str, Tensor]:
        """The parameters of the layer that change, by their names in the model."""
        layer = self.layer
        merged = merge_heads(
            self.heads,
            self.groups,
            merge,
            value_groups=self.value_groups,
            freedom=layer.adapter.freedom(layer.module),
            moments=self.moments,
            weights=weights,
            generator=_generator(self.heads, seed),
        )
        new = write_heads(layer.module, merged, self.state_dict, layer.prefix)
        order = self.heads.query_order([h for group in self.groups for h in group])
        if order != sorted(order):
            rest = layer.adapter.reorder_rest(
                layer.module, layer.state(self.state_dict), order
            )
            new.update((layer.prefix + name, value) for name, value in rest.items())
        return new

    def report(self, old: State, new: State) -> LayerReport:
        layer = self.layer
        names = layer.adapter.names(layer.module)
        parameters = [name for name, _ in layer.module.named_parameters()]
        weight = old[layer.prefix + names.k[0]]
        columns = 0
        for role in 'kv':
            name, bias = getattr(names, role)
            columns += math.prod(old[layer.prefix + name].shape[1:])
            columns += bias is not None
        pair = layer.kv_heads, layer.new_kv_heads
        return LayerReport(
            name=layer.name,
            type=type(layer.module).__name__,
            num_heads=layer.num_heads,
            kv_heads=pair,
            params=tuple(
                sum(state[layer.prefix + name].numel() for name in parameters)
                for state in (old, new)
            ),
            kv_params=tuple(n * layer.head_dim * columns for n in pair),
            kv_bytes=tuple(
                2 * n * layer.head_dim * weight.element_size() for n in pair
            ),
            groups=self.groups,
            value_groups=self.value_groups,
            value_heads=layer.value_heads,
        )


def _generator(heads: AttentionHeads, seed: int) -> torch.Generator:
    """Seeded by the layer's weights too: names differ between a file and a model."""
    own = zlib.crc32(heads.k.weight.numpy().tobytes())
    return torch.Generator().manual_seed((own << 16) ^ seed)


def _learned_weights(
    calibrator: Calibrator, plans: list[_Plan], state_dict: State
) -> dict[str, tuple[Tensor, Tensor]]:
    """Weights of the heads of each layer, for keys and for values."""
    by_name = {plan.layer.name: plan for plan in plans}
    means = dict(state_dict)
    for plan in plans:
        means.update(plan.convert('mean', None, 0))
    start = {
        name: torch.full(
            (2, plan.layer.kv_heads), plan.layer.new_kv_heads / plan.layer.kv_heads
        )
        for name, plan in by_name.items()
    }

    def parameters(layer: Layer, weights: Tensor) -> dict[str, Tensor]:
        new = by_name[layer.name].convert('learned', tuple(weights), 0)
        return {name.removeprefix(layer.prefix): value for name, value in new.items()}

    learned = calibrator.learn(means, start, parameters)
    return {name: tuple(weights) for name, weights in learned.items()}


def _compare(
    calibrator: Calibrator,
    converted: dict[str, Tensor],
    report: ConversionReport,
    refit_output: bool,
) -> None:
    """Notes the errors of the outputs, after refitting the projections if wanted."""
    statistics = calibrator.compare(converted)
    entries = {layer.name: layer for layer in report.layers}
    for layer in calibrator.layers:
        sums, entry = statistics[layer.name], entries[layer.name]
        entry.error = sums.error
        if not refit_output:
            continue
        weight_name, bias_name = (
            None if name is None else layer.prefix + name
            for name in layer.adapter.names(layer.module).out
        )
        old = converted[weight_name]
        bias = None if bias_name is None else converted[bias_name].double().cpu()
        weight, bias, error, held_out = sums.refit(old.double().cpu().flatten(1), bias)
        entry.error_before_refit = entry.error
        entry.error, entry.error_held_out = error, held_out
        converted[weight_name] = weight.reshape(old.shape).to(old)
        if bias_name is not None:
            converted[bias_name] = bias.to(converted[bias_name])
