"""Forward and backward times of chosen modules inside a running model.

::

    timer = ModuleTimer(attention_groups(model), torch.device('cuda'))
    with timer:  # hooks are installed here and nowhere else
        model(x).sum().backward()
    for name, time in timer.result().items():  # waits for the device, once
        print(name, time.forward_ms, time.backward_ms, time.calls)

Imports torch alone.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .clock import Clock, Span, Spans, make_clock

# How attention modules are called in mmcv, mmdet, torch and here; the classes are not
# imported, so that this file needs no mm package.
ATTENTION_SUFFIXES = ('Attention', 'GQA', 'MSA', 'MHA', 'MQA')
# The list in which a stage of DAT has what its block letters built, of any class.
ATTENTION_LIST = 'attns'


@dataclasses.dataclass(frozen=True)
class ModuleTime:
    """Time of a group of modules.

    Attributes:
        forward_ms: Time within forward passes.
        backward_ms: Time within backward passes; what activation checkpointing
            computes again is part of it.
        calls: Forward calls, recomputations not counted.
    """

    forward_ms: float
    backward_ms: float
    calls: int


class ModuleTimer:
    """Times forward and backward of groups of modules while it is entered.

    The backward pass of a call begins when the gradient of one of its outputs is
    complete and ends after the last autograd node that the call made and that leads
    out of it. So modules whose input needs no gradient are measured, and modules that
    are called several times; the graph and its results stay what they are. A group's
    time is that of the union of its modules' intervals: what runs inside or beside
    another member is not counted twice. Groups that contain each other both count.

    With CUDA, times lie between events on the current stream, recorded without waiting
    for the device. A module whose calls torch.compile traced without hooks has none.

    Args:
        groups: Name -> modules, as :func:`attention_groups` or :func:`select_modules`
            make them.
        device: Device that computes, 'cpu' or 'cuda'.
        clock: Clock to share with other measurements of the same iteration; by default
            one of ``device`` that starts when the timer is entered.

    Raises:
        ValueError: For a device of another type.
        RuntimeError: When a timer that is active is entered again.
    """

    def __init__(
        self,
        groups: Mapping[str, Sequence[nn.Module]],
        device: torch.device,
        clock: Clock | None = None,
    ) -> None:
        self._own_clock = clock is None
        self._clock = make_clock(device) if clock is None else clock
        self._records = {name: _Record(self._clock) for name in groups}
        self._groups = {name: tuple(modules) for name, modules in groups.items()}
        self._handles: list[Any] = []

    def __enter__(self) -> 'ModuleTimer':
        if self._handles:
            raise RuntimeError('ModuleTimer is active already')
        if self._own_clock:
            self._clock.start()
        for name, modules in self._groups.items():
            record = self._records[name]
            record.clear()
            for module in modules:
                self._handles += _install(module, record)
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def result(self) -> dict[str, ModuleTime]:
        """Times since the timer was entered, by group; waits for the device."""
        self._clock.synchronize()
        return {name: record.time() for name, record in self._records.items()}


class _Record:
    """The spans of one group."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.clear()

    def clear(self) -> None:
        self.forward = Spans(self._clock)
        self.backward = Spans(self._clock)
        self.calls = 0

    def enter(self) -> Callable[[], None]:
        """Begins a forward call, which is part of backward when it recomputes.

        Returns:
            What to call at its end.
        """
        spans = self.forward
        if _in_backward():
            spans = self.backward
        else:
            self.calls += 1
        return functools.partial(spans.end, spans.begin())

    def time(self) -> ModuleTime:
        return ModuleTime(
            self.forward.covered_ms(), self.backward.covered_ms(), self.calls
        )


class _BackwardOfCall:
    """Marks where the backward pass of one call begins and ends."""

    def __init__(self, spans: Spans) -> None:
        self._spans = spans
        self._span: Span | None = None

    def begin(self, _: Tensor) -> None:
        # Further outputs of a call that has begun bring nothing new; after its last
        # node they begin another part of it, as a second pass over the graph does.
        if self._span is None or self._span.end is not None:
            self._span = self._spans.begin()

    def end(self, *_: object) -> None:
        """After every node that may be the last: the last of them counts."""
        if self._span is not None:
            self._spans.end(self._span)


def _install(module: nn.Module, record: _Record) -> list[Any]:
    """Forward hooks of one module; those of the graph go with the graph."""
    calls: list[tuple] = []  # a stack: modules may call themselves

    def before(_module: nn.Module, _args: Any) -> None:
        first = _next_sequence_number()
        calls.append((record.enter(), first))

    def after(_module: nn.Module, _args: Any, output: Any) -> None:
        leave, first = calls.pop()
        leave()
        if first is not None:
            _watch_backward(output, first, record.backward)

    return [
        module.register_forward_pre_hook(before, prepend=True),
        # also when forward raises, as a recomputation that has all it needs does
        module.register_forward_hook(after, always_call=True),
    ]


def _in_backward() -> bool:
    """Whether autograd is running, as torch's own checkpointing asks."""
    return torch._C._current_graph_task_id() != -1


def _next_sequence_number() -> int | None:
    """A number that autograd nodes made from now on exceed; None without gradients."""
    if not torch.is_grad_enabled():
        return None
    probe = torch.empty((), requires_grad=True).view(())
    return None if probe.grad_fn is None else probe.grad_fn._sequence_nr()


def _watch_backward(output: Any, first: int, spans: Spans) -> None:
    """Hooks into the nodes that a call made, whose numbers exceed ``first``."""
    tensors = [t for t in tensors_of(output) if _is_inside(t.grad_fn, first)]
    if not tensors:
        return
    call = _BackwardOfCall(spans)
    for tensor in tensors:
        tensor.register_hook(call.begin)
    for node in _exits([tensor.grad_fn for tensor in tensors], first):
        node.register_hook(call.end)


def _is_inside(node: Any, first: int) -> bool:
    """Not so a parameter's node, which outlives the graph and would keep the hook."""
    if node is None or hasattr(node, 'variable'):
        return False
    return node._sequence_nr() > first


def _exits(nodes: Sequence[Any], first: int) -> Iterator[Any]:
    """The nodes of the call from which an edge leads out of it."""
    waiting = list(nodes)
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        followers = [follower for follower, _ in node.next_functions]
        inner = [n for n in followers if _is_inside(n, first)]
        if len(inner) < len(followers) or not followers:
            yield node
        waiting += [n for n in dict.fromkeys(inner) if n not in seen]
        seen.update(inner)


def tensors_of(output: Any) -> list[Tensor]:
    """All floating tensors of an output, whatever lists and dicts they are in."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        output = list(output.values())
    parts = output if isinstance(output, (list, tuple)) else ()
    return [tensor for part in parts for tensor in tensors_of(part)]


# Choosing modules


def is_attention(name: str, module: nn.Module) -> bool:
    """Whether ``module``, called ``name`` by the model, is an attention module.

    That is one whose class name ends as in ``ATTENTION_SUFFIXES``, such as
    DeformableGQA, torch's MultiheadAttention, mmcv's MultiScaleDeformableAttention or
    mmdet's ShiftWindowMSA, or one of any class that a stage of DAT has as a block's
    attention.
    """
    if type(module).__name__.endswith(ATTENTION_SUFFIXES):
        return True
    return name.split('.')[-2:-1] == [ATTENTION_LIST]


def attention_groups(model: nn.Module) -> dict[str, list[nn.Module]]:
    """Attention modules of a model by class name, in the order of the model.

    A module inside another attention module is left to that one. Empty for a model
    without attention.
    """
    groups: dict[str, list[nn.Module]] = {}
    inside: str | None = None
    for name, module in model.named_modules():
        if inside is not None and name.startswith(inside):
            continue
        inside = None
        if is_attention(name, module):
            groups.setdefault(type(module).__name__, []).append(module)
            inside = f'{name}.' if name else ''
    return groups


def select_modules(model: nn.Module, choice: str) -> list[nn.Module]:
    """The modules of a class, or at a path of a model.

    Args:
        model: The model.
        choice: A class name, such as 'FPN', or a module's path, such as
            'backbone.stages.0'. A list of modules, which is never called itself,
            stands for its members.

    Raises:
        ValueError: If there is neither; names the classes and the top-level paths.
    """
    named = dict(model.named_modules())
    if choice in named and choice:
        return callable_modules(named[choice])
    found = [m for m in named.values() if type(m).__name__ == choice]
    if not found:
        classes = sorted({type(module).__name__ for module in named.values()})
        raise ValueError(
            f'the model has no module at {choice!r} and none of such a class; at its '
            f'top level are {[name for name, _ in model.named_children()]}, and there '
            f'are the classes {classes}'
        )
    return [member for module in found for member in callable_modules(module)]


def callable_modules(module: nn.Module) -> list[nn.Module]:
    """The module, or the members of a list, which is never called itself."""
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        members = module.children()
        return [m for member in members for m in callable_modules(member)]
    return [module]
