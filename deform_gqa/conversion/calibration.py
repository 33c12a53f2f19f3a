"""What the heads of a trained model do with calibration data.

The trained model is run, and each attention module is looked at by itself: the
converted module gets the inputs of the trained one, and its output is compared.
"""

import contextlib
import copy
import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from deform_gqa.checks import describe

from .adapter import State
from .heads import Moments
from .layers import Layer

# Ridges of the refit, relative to the mean square of the projection's inputs, of which
# cross-validation over the calls of a module chooses one. A single call gets the last.
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 1e2)
FOLDS = 4
LEARNING_STEPS = 60
LEARNING_RATE = 0.02

Batches = Iterable[Tensor | Mapping[str, Any]] | Callable[[nn.Module], Any]


class Calibrator:
    """The trained model and the data that it is run on.

    Args:
        state_dict: Weights of the trained model.
        model: A model with modules of the same names.
        layers: The attention modules in question.
        batches: For each, the model is called with a tensor; of a dict, a mmengine
            model makes a ``test_step``, another model is called with its entries. Or a
            function that is called with the model and runs it.

    Raises:
        TypeError: For batches of another type.
        ValueError: If there are none, an attention module does not run, or what it
            gets or returns is not finite.
    """

    def __init__(
        self,
        state_dict: State,
        model: nn.Module,
        layers: list[Layer],
        batches: Batches,
    ):
        if not callable(batches):
            if isinstance(batches, (Tensor, Mapping, str)) or not isinstance(
                batches, Iterable
            ):
                raise TypeError(
                    'calibration must be a list of batches or a function, got '
                    f'{describe(type(batches))}'
                )
            batches = list(batches)
            if not batches:
                raise ValueError('calibration must hold batches, got none')
        self.layers = layers
        self.batches = batches
        self.model = _trained_model(state_dict, model, layers)
        self.device = next(iter(self.model.parameters())).device

    def moments(self) -> dict[str, Moments]:
        """Second moments of the inputs of each layer's projections."""
        sums = {
            layer.name: {role: _Moment() for role in 'qkv'} for layer in self.layers
        }
        with contextlib.ExitStack() as hooks:
            for layer in self.layers:
                self._watch_inputs(layer, sums[layer.name], hooks)
            self._run()
        self._check_ran({name: moment['k'].count for name, moment in sums.items()})
        for name, roles in sums.items():
            _check_finite(name, sum(float(x.sum.sum()) for x in roles.values()))
        return {
            name: Moments(**{role: moment.mean for role, moment in roles.items()})
            for name, roles in sums.items()
        }

    def compare(self, state_dict: State) -> dict[str, 'OutputStatistics']:
        """How the outputs of converted layers differ from those of the trained ones."""
        statistics = {layer.name: OutputStatistics() for layer in self.layers}

        def add(layer: Layer, new: '_Watched', call: tuple, wanted: Tensor) -> None:
            with torch.no_grad():
                new(call)
            statistics[layer.name].add(new.inputs, new.output, wanted)

        self._run_beside(state_dict, add)
        self._check_ran({name: sums.count for name, sums in statistics.items()})
        for name, sums in statistics.items():
            _check_finite(name, sums.error)
        return statistics

    def learn(
        self,
        state_dict: State,
        start: dict[str, Tensor],
        parameters: Callable[[Layer, Tensor], dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        """Tensors for which each layer comes close to the output of the trained one.

        Args:
            state_dict: Weights in which everything else is that the layers need.
            start: First value for each layer.
            parameters: Maps a layer and its tensor to parameters of its module; it is
                differentiated.

        Returns:
            The tensors after ``LEARNING_STEPS`` steps of Adam on the squared error.
        """
        values = {name: x.clone().requires_grad_() for name, x in start.items()}
        optimizers = {
            name: torch.optim.Adam([x], lr=LEARNING_RATE) for name, x in values.items()
        }
        steps = dict.fromkeys(start, 0)

        def step(layer: Layer, new: '_Watched', call: tuple, wanted: Tensor) -> None:
            if steps[layer.name] == LEARNING_STEPS:
                return
            optimizers[layer.name].zero_grad()
            with torch.enable_grad():
                _backward(new, call, wanted, parameters(layer, values[layer.name]))
            optimizers[layer.name].step()
            steps[layer.name] += 1

        while min(steps.values()) < LEARNING_STEPS:
            self._run_beside(state_dict, step)
            self._check_ran(steps)
        return {name: x.detach() for name, x in values.items()}

    def _watch_inputs(self, layer: Layer, moments: dict, hooks) -> None:
        module = self.model.get_submodule(layer.name)

        def add_call(module: nn.Module, args: tuple, kwargs: dict) -> None:
            for role, x in zip(
                'qkv', layer.adapter.inputs(module, args, kwargs), strict=True
            ):
                moments[role].add(x)

        names = layer.adapter.names(module)
        owners = {role: getattr(names, role)[0].rpartition('.')[0] for role in 'qkv'}
        if '' in owners.values():  # the parameters are the module's own
            hook = module.register_forward_pre_hook(add_call, with_kwargs=True)
            hooks.callback(hook.remove)
            return
        for role, owner in owners.items():
            projection = module.get_submodule(owner)
            hook = projection.register_forward_pre_hook(
                lambda projection, args, role=role: moments[role].add(
                    _tokens(projection, args[0])
                )
            )
            hooks.callback(hook.remove)

    def _run_beside(self, state_dict: State, function: Callable) -> None:
        """Runs the trained model, and ``function`` after each call of a layer.

        It gets the layer, its converted module, the arguments of the call, and what
        the trained module's output projection returned.
        """
        with contextlib.ExitStack() as hooks:
            for layer in self.layers:
                module = self.model.get_submodule(layer.name)
                old = _Watched(layer, module, hooks)
                new = _Watched(layer, _converted(layer, state_dict, self.device), hooks)

                def after(module, args, kwargs, out, layer=layer, old=old, new=new):
                    function(layer, new, (args, kwargs), old.output)

                hook = module.register_forward_hook(after, with_kwargs=True)
                hooks.callback(hook.remove)
            self._run()

    @torch.no_grad()
    def _run(self) -> None:
        if callable(self.batches):
            self.batches(self.model)
            return
        for batch in self.batches:
            if isinstance(batch, Tensor):
                self.model(batch.to(self.device))
            elif not isinstance(batch, Mapping):
                raise TypeError(
                    'a calibration batch must be a tensor or a dict, got '
                    f'{describe(type(batch))}'
                )
            elif hasattr(self.model, 'test_step'):
                self.model.test_step(batch)
            else:
                self.model(**batch)

    def _check_ran(self, counts: dict[str, int]) -> None:
        for name, count in counts.items():
            if count == 0:
                raise ValueError(f'calibration: the model does not run {name}')


@dataclasses.dataclass
class _Sums:
    """Over tokens: inputs x of an output projection, with a last 1, and outputs y.

    Args:
        gram: Of x x^T, (C + 1, C + 1).
        product: Of x y^T, (C + 1, Cout), for the wanted outputs.
        squares: Of the squares of the wanted outputs.
    """

    gram: Tensor
    product: Tensor
    squares: float

    def __add__(self, other: '_Sums') -> '_Sums':
        return _Sums(
            self.gram + other.gram,
            self.product + other.product,
            self.squares + other.squares,
        )

    def change(self, weight: Tensor, bias: Tensor | None) -> float:
        """Sum of the squared errors of a projection."""
        bias = weight.new_zeros(len(weight)) if bias is None else bias
        w = torch.cat([weight.T, bias[None]])
        return max(
            float((w * (self.gram @ w - 2 * self.product)).sum()) + self.squares, 0.0
        )

    def fits(
        self, weight: Tensor, bias: Tensor | None
    ) -> list[tuple[Tensor, Tensor | None]]:
        """The projection of least error, drawn to the given one, for each ridge.

        A bias is free: inputs and outputs are then taken about their means.
        """
        gram, product = self.gram[:-1, :-1], self.product[:-1]
        mean, wanted = self.gram[-1, :-1], self.product[-1]
        count = self.gram[-1, -1]
        if bias is not None:
            gram = gram - torch.outer(mean, mean) / count
            product = product - torch.outer(mean, wanted) / count
        start = weight.T
        values, vectors = torch.linalg.eigh(gram)
        pull = vectors.T @ (product - gram @ start)
        size = gram.diagonal().mean().clamp_min(1e-300)
        fits = []
        for ridge in RIDGES:
            damped = values.clamp_min(0) + ridge * size
            new = start + vectors @ (pull / damped[:, None])
            shift = None if bias is None else (wanted - mean @ new) / count
            fits.append((new.T, shift))
        return fits


class OutputStatistics:
    """How the outputs of a converted module differ from those of the trained one."""

    def __init__(self):
        self.folds: list[_Sums | None] = [None] * FOLDS
        self.count = 0  # calls
        self._change = 0.0

    def add(self, inputs: Tensor, output: Tensor, wanted: Tensor) -> None:
        """Adds a call.

        Args:
            inputs: (T, C), what the converted heads give the output projection.
            output: (T, Cout), what that returns.
            wanted: (T, Cout), what the trained module's returned.
        """
        x = torch.cat([inputs, torch.ones_like(inputs[:, :1])], dim=1).double()
        wanted = wanted.double()
        new = _Sums((x.T @ x).cpu(), (x.T @ wanted).cpu(), float(wanted.square().sum()))
        fold = self.count % FOLDS
        old = self.folds[fold]
        self.folds[fold] = new if old is None else old + new
        self._change += float((output.double() - wanted).square().sum())
        self.count += 1

    @property
    def error(self) -> float:
        """Relative error of the converted module."""
        return self._relative(self._change)

    def _relative(self, change: float) -> float:
        squares = sum(sums.squares for sums in self._used())
        return (change / max(squares, 1e-300)) ** 0.5

    def _used(self) -> list[_Sums]:
        return [sums for sums in self.folds if sums is not None]

    def refit(
        self, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None, float, float | None]:
        """Fits the output projection to the calls, by ridge regression.

        Args:
            weight: (Cout, C), to which the ridge draws.
            bias: (Cout,) or None.

        Returns:
            Weight and bias; their relative error; and the error of such a fit on calls
            that it was not made with, None for a single call.
        """
        folds = self._used()
        total = _total(folds)
        fits = total.fits(weight, bias)
        if len(folds) == 1:
            return *fits[-1], self._relative(total.change(*fits[-1])), None
        changes = torch.zeros(len(RIDGES), dtype=torch.float64)
        for index, held_out in enumerate(folds):
            rest = _total(folds[:index] + folds[index + 1 :])
            changes += torch.tensor(
                [held_out.change(*fit) for fit in rest.fits(weight, bias)]
            )
        best = int(changes.argmin())
        return (
            *fits[best],
            self._relative(total.change(*fits[best])),
            self._relative(float(changes[best])),
        )


def _total(folds: list[_Sums]) -> _Sums:
    return functools.reduce(operator.add, folds)


class _Moment:
    """Mean of x x^T over tokens x that end with 1."""

    def __init__(self):
        self.sum: Tensor | float = 0.0
        self.count = 0

    def add(self, x: Tensor) -> None:
        x = x.flatten(0, -2).double()
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        self.sum = self.sum + (x.T @ x).cpu()
        self.count += len(x)

    @property
    def mean(self) -> Tensor:
        return self.sum / self.count


class _Watched:
    """A module, and what its output projection got and returned in its last call."""

    def __init__(self, layer: Layer, module: nn.Module, hooks):
        self.module = module
        self.inputs: Tensor | None = None
        self.output: Tensor | None = None
        owner = layer.adapter.names(module).out[0].rpartition('.')[0]
        hook = module.get_submodule(owner).register_forward_hook(self._keep)
        hooks.callback(hook.remove)

    def __call__(self, call: tuple) -> None:
        args, kwargs = call
        self.module(*args, **kwargs)

    def _keep(self, projection: nn.Module, args: tuple, out: Tensor) -> None:
        self.inputs = _tokens(projection, args[0]).flatten(0, -2)
        self.output = _tokens(projection, out).flatten(0, -2)


def _backward(
    new: _Watched, call: tuple, wanted: Tensor, parameters: dict[str, Tensor]
) -> None:
    """Differentiates the relative error of a module with these parameters.

    In two steps: modules that recompute their activations in backward need parameters
    that are still in place then.
    """
    learned = {name: x for name, x in parameters.items() if x.requires_grad}
    own = [new.module.get_parameter(name) for name in learned]
    with torch.no_grad():
        for parameter, value in zip(own, learned.values(), strict=True):
            parameter.copy_(value)
    new.module.zero_grad()
    new(call)
    error = (new.output - wanted).square().mean() / wanted.square().mean()
    error.backward()
    gradients = [
        parameter.grad.to(value)
        for parameter, value in zip(own, learned.values(), strict=True)
    ]
    torch.autograd.backward(list(learned.values()), gradients)


def _check_finite(name: str, value: float) -> None:
    if not math.isfinite(value):
        raise ValueError(
            f'calibration: inputs or outputs of {name or "the module"} are not finite'
        )


def _tokens(projection: nn.Module, x: Tensor) -> Tensor:
    """A map or tokens, with channels last."""
    return x.movedim(1, -1) if isinstance(projection, nn.Conv2d) else x


def _trained_model(
    state_dict: State, model: nn.Module, layers: list[Layer]
) -> nn.Module:
    """The trained model, whose attention modules are ours and can be watched."""
    model = copy.deepcopy(model)
    made: dict[int, nn.Module] = {}
    for layer in layers:
        old = model.get_submodule(layer.name)
        if id(old) not in made:
            made[id(old)] = layer.adapter.with_kv_heads(old, layer.kv_heads)
    for layer in layers:
        if layer.name == '':
            model = made[id(model)]
            break
        parent, _, child = layer.name.rpartition('.')
        owner = model.get_submodule(parent)
        setattr(
            owner, child, made.get(id(getattr(owner, child)), getattr(owner, child))
        )
    model.load_state_dict(state_dict, strict=False)
    return model.eval()


def _converted(layer: Layer, state_dict: State, device: torch.device) -> nn.Module:
    """A layer's module with the converted weights, on the device of the model."""
    module = layer.make()
    module.load_state_dict(layer.state(state_dict), strict=False)
    return module.to(device).eval().requires_grad_()
