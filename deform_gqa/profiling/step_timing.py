"""Where the time of one training, validation or test step goes.

Works on anything that has the interface of an mmengine model: a ``data_preprocessor``
and a call that computes losses or predictions, and optimizer wrappers with
``backward``, ``step`` and ``zero_grad``. Imports torch alone.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .clock import Spans, make_clock
from .module_timing import ModuleTime, ModuleTimer

# Parts of a step, in their order. What is in none of them, such as adding up the
# losses or merging the predictions of a test-time augmentation, is 'other'.
PARTS = ('preprocess', 'forward', 'backward', 'optimizer')
_MISSING = object()


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Times of one step.

    Attributes:
        total_ms: Wall-clock time of the step, until the device is done.
        parts_ms: Time by part: ``PARTS`` and 'other', which is the rest.
        modules: Times of groups of modules, which are within those of the parts.
    """

    total_ms: float
    parts_ms: dict[str, float]
    modules: dict[str, ModuleTime]


class StepTimer:
    """Times the one step that is made while it is entered.

    Everything that it installs on the model and the optimizer wrappers is gone when
    it is left, also by an exception. Gradients, losses and predictions are the same
    with and without it. It waits for a CUDA device when it is left, and not before.

    Args:
        model: What the runner calls, wrapped or not.
        device: Device that computes, 'cpu' or 'cuda'.
        groups: Modules to time by name of the group; see :class:`ModuleTimer`.
        optim_wrappers: All wrappers of the model's optimizers; none outside training.

    Raises:
        ValueError: For a device of another type.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        groups: Mapping[str, Sequence[nn.Module]],
        optim_wrappers: Iterable[Any] = (),
    ) -> None:
        self._model = model
        self._optim_wrappers = list(optim_wrappers)
        self._clock = make_clock(device)
        self._parts = {name: Spans(self._clock) for name in PARTS}
        self._modules = ModuleTimer(groups, device, self._clock)
        self._installed = contextlib.ExitStack()

    def __enter__(self) -> 'StepTimer':
        with contextlib.ExitStack() as stack:
            for model in wrapped_models(self._model):
                self._time_call(stack, model, 'forward')
                preprocessor = getattr(model, 'data_preprocessor', None)
                if isinstance(preprocessor, nn.Module):
                    self._time_call(stack, preprocessor, 'preprocess')
            for wrapper in self._optim_wrappers:
                self._time_method(stack, wrapper, 'backward', 'backward')
                self._time_method(stack, wrapper, 'step', 'optimizer')
                self._time_method(stack, wrapper, 'zero_grad', 'optimizer')
            stack.enter_context(self._modules)
            self._installed = stack.pop_all()
        self._clock.start()
        self._start_s = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._clock.synchronize()
            self._total_ms = (time.perf_counter() - self._start_s) * 1e3
        finally:
            self._installed.close()

    def result(self) -> StepTime:
        """Times of the step that was made."""
        parts = {name: spans.covered_ms() for name, spans in self._parts.items()}
        # Times of events and of the wall clock differ by microseconds.
        parts['other'] = max(self._total_ms - sum(parts.values()), 0.0)
        return StepTime(self._total_ms, parts, self._modules.result())

    def _time_call(self, stack: contextlib.ExitStack, module: nn.Module, part: str):
        spans = self._parts[part]
        calls = []

        def before(_module: nn.Module, _args: Any) -> None:
            calls.append(spans.begin())

        def after(_module: nn.Module, _args: Any, _output: Any) -> None:
            spans.end(calls.pop())

        for handle in (
            module.register_forward_pre_hook(before, prepend=True),
            module.register_forward_hook(after, always_call=True),
        ):
            stack.callback(handle.remove)

    def _time_method(self, stack: contextlib.ExitStack, owner: Any, name: str, part):
        method = _timed(getattr(owner, name), self._parts[part])
        stack.callback(replace_method(owner, name, method))


class SampledStep:
    """Stands in for a model's step, for one call.

    The loops of mmengine offer no place around the step. This one takes itself off
    before it calls the step, so that no exception leaves it there.

    Args:
        model: What the runner calls.
        name: Name of the step, such as 'train_step'.
        timer: Times the call.

    Attributes:
        time: The time of the call; None until it has returned.
        end_s: ``time.perf_counter()`` at its end.
    """

    def __init__(self, model: nn.Module, name: str, timer: StepTimer) -> None:
        self._timer = timer
        self._step = getattr(model, name)
        self._restore = replace_method(model, name, self._call)
        self._is_installed = True
        self.time: StepTime | None = None
        self.end_s = 0.0

    def remove(self) -> None:
        """Takes it off, if it is still there."""
        if self._is_installed:
            self._is_installed = False
            self._restore()

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        self.remove()
        with self._timer:
            outputs = self._step(*args, **kwargs)
        self.time = self._timer.result()
        self.end_s = time.perf_counter()
        return outputs


def wrapped_models(model: nn.Module) -> Iterator[nn.Module]:
    """A model and those inside it that data parallelism or augmentation wraps."""
    inner: Any = model
    while isinstance(inner, nn.Module):
        yield inner
        inner = getattr(inner, 'module', None)


def _timed(function: Callable, spans: Spans) -> Callable:
    @functools.wraps(function)
    def timed(*args: Any, **kwargs: Any) -> Any:
        span = spans.begin()
        try:
            return function(*args, **kwargs)
        finally:
            spans.end(span)

    return timed


def replace_method(owner: Any, name: str, function: Callable) -> Callable[[], None]:
    """Gives one object another method; returns what takes it off again."""
    previous = vars(owner).get(name, _MISSING)  # such as a compiled step
    setattr(owner, name, function)

    def restore() -> None:
        if previous is _MISSING:
            vars(owner).pop(name, None)
        else:
            setattr(owner, name, previous)

    return restore
