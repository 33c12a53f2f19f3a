"""Ops that ``benchmark.py gqa-sweep`` takes over their numbers of kv heads.

Imports torch alone.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import torch

from deform_gqa import ops
from deform_gqa.ops.common.backends import choose_backend

from .common_options import one_of
from .errors import OptionError
from .model_measure import FORWARD, PLAIN, TRAIN, ModelCase, Unsupported, Workload
from .model_options import ModelOptions
from .op_cases import CASES, STAGES_OF, OpCase, kv_head_counts
from .op_suite import timed_call
from .sdpa_cases import GROUP_SWEEP, SdpaSweep, sdpa_cases
from .sdpa_cases import OP as SDPA

PAPER_BATCH = 32
GQA_OP = 'scaled_dot_product_gqa'
OPS = (*CASES, SDPA, GQA_OP)
QUICK_SDPA = SdpaSweep(
    maps=((18, 18),), heads=(16,), views=(2,), points=(12,), batch_sizes=(1,)
)
_DIRECTIONS = {FORWARD: 'forward', TRAIN: 'forward+backward'}


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A target at several numbers of kv heads.

    Attributes:
        subject: What the title says of the target and its shapes.
        heads: Query heads: the number of kv heads of multi-head attention.
        cases: Number of kv heads -> case.
    """

    subject: str
    heads: int
    cases: dict[int, ModelCase]


def kv_counts(heads: int, chosen: Sequence[str]) -> list[int]:
    """Numbers of kv heads in ascending order: those chosen, or halvings down to one.

    Raises:
        OptionError: For a number that does not divide the query heads.
    """
    if not chosen:
        return sorted(kv_head_counts(heads, ['sweep']))
    for text in chosen:
        if not text.isdecimal() or not int(text) or heads % int(text):
            raise OptionError(
                f'--kv-heads takes divisors of the {heads} query heads, got {text!r}'
            )
    return sorted({int(text) for text in chosen})


# Ops


def op_sweep(
    op: str, stage: int, options: ModelOptions, chosen: Sequence[str], quick: bool
) -> Sweep:
    """An op of ours at the shape of a stage of DAT-T++, or of its own benchmark."""
    if op == GQA_OP:
        return gqa_sweep(decoding_case(options), options, chosen)
    make: Callable[[int], OpCase | None]
    if op == SDPA:
        shape = QUICK_SDPA if quick else GROUP_SWEEP
        shape = dataclasses.replace(shape, batch_sizes=options.batch_sizes)
        [full] = sdpa_cases(shape, ['full'])

        def make(count: int) -> OpCase:
            return dataclasses.replace(full, num_kv_heads=count)

        subject = (
            f'{op}, {full.grid_size[0]}x{full.grid_size[1]} maps, {full.views} views, '
            f'{full.points} points'
        )
    else:
        one_of(f'--stage of {op}', [stage], sorted(STAGES_OF[op]))
        size, batch = options.sizes[0], options.batch_sizes[0]
        make = functools.partial(CASES[op], size, stage, batch)
        full = make('full')
        subject = f'{op}, stage {stage} of DAT-T++, {size[0]}x{size[1]} px'
    cases = {
        count: _op_model_case(make(count), options)
        for count in kv_counts(full.num_heads, chosen)
    }
    subject += f', batch {full.batch}, {full.num_heads} query heads of {full.head_dim}'
    return Sweep(subject, full.num_heads, cases)


def _op_model_case(case: OpCase, options: ModelOptions) -> ModelCase:
    fields = {'target': case.op, 'kv heads': case.num_kv_heads}
    build = functools.partial(_build_op, case, options)
    return ModelCase(case.name, fields, case.batch, build)


def _build_op(case: OpCase, options: ModelOptions, backend: str) -> Workload:
    device, dtype = options.device, options.amp_dtype or torch.float32
    if backend != 'auto':
        reason = ops.unsupported_reason(
            case.op, backend, device=device, dtype=dtype, head_dim=case.head_dim
        )
        if reason is not None:
            raise Unsupported(reason)
    used = choose_backend(
        case.op, backend, device=device, dtype=dtype, head_dim=case.head_dim
    )
    op = getattr(ops, case.op)

    def call(tensors):
        return op(**tensors, **case.options(), backend=used)

    inputs = case.make_inputs(device, dtype)
    calls = {
        name: timed_call(call, inputs, direction)
        for name, direction in _DIRECTIONS.items()
    }
    return Workload(None, calls, used, arguments=list(inputs.values()))


# Plain attention in the (b, n, h, d) layout


@dataclasses.dataclass(frozen=True)
class DecodingCase:
    """One decoding step: a query a sequence and head reads all keys so far."""

    batch: int
    keys: int
    heads: int = 64
    head_dim: int = 64
    queries: int = 1

    @property
    def subject(self) -> str:
        smaller = '' if self.batch == PAPER_BATCH else f' (paper: {PAPER_BATCH})'
        return (
            f'{GQA_OP}, decoding: batch {self.batch}{smaller}, {self.queries} query on '
            f'{self.keys} keys, {self.heads} query heads of {self.head_dim}'
        )


# T5-XXL of the GQA paper's figure 6: batch 32, 2048 input tokens, 64 heads of 64.
FIGURE_6 = DecodingCase(batch=PAPER_BATCH, keys=2048)
CPU_FIGURE_6 = DecodingCase(batch=4, keys=2048)


def decoding_case(options: ModelOptions) -> DecodingCase:
    """Figure 6, with a smaller batch on a CPU."""
    case = FIGURE_6 if options.device.type == 'cuda' else CPU_FIGURE_6
    return dataclasses.replace(case, batch=options.batch_sizes[0])


def gqa_sweep(
    shape: DecodingCase, options: ModelOptions, chosen: Sequence[str]
) -> Sweep:
    cases = {}
    for count in kv_counts(shape.heads, chosen):
        name = f'{GQA_OP}/b{shape.batch}/s{shape.keys}/kv{count}of{shape.heads}'
        build = functools.partial(_build_gqa, shape, count, options)
        fields = {'target': GQA_OP, 'kv heads': count}
        cases[count] = ModelCase(name, fields, shape.batch, build)
    return Sweep(shape.subject, shape.heads, cases)


def _build_gqa(
    shape: DecodingCase, count: int, options: ModelOptions, backend: str
) -> Workload:
    if backend != 'auto':
        raise Unsupported(f'{GQA_OP} runs torch SDPA and has no backends')
    dtype = options.amp_dtype or torch.float32

    def tensor(length: int, heads: int) -> torch.Tensor:
        size = (shape.batch, length, heads, shape.head_dim)
        x = torch.randn(size, device=options.device).to(dtype)
        return x.requires_grad_()

    q = tensor(shape.queries, shape.heads)
    inputs = {'q': q, 'k': tensor(shape.keys, count), 'v': tensor(shape.keys, count)}

    def call(x):
        return ops.scaled_dot_product_gqa(x['q'], x['k'], x['v'])[0]

    calls = {
        name: timed_call(call, inputs, direction)
        for name, direction in _DIRECTIONS.items()
    }
    return Workload(None, calls, PLAIN, arguments=list(inputs.values()))
