"""``benchmark.py gqa-sweep``: time and memory against the number of kv heads.

The figure 6 of the GQA paper (arXiv 2305.13245) for any op, layer, backbone or
detector of ours: the cases of their suites along the axis of kv heads, in turns.
"""

import argparse
import dataclasses
import functools

import torch

from deform_gqa.archs import ARCHS
from deform_gqa.ops.common.backends import choose_backend

from .core.cases import (
    FORWARD,
    FORWARD_BACKWARD,
    PLAIN,
    PREDICT,
    TRAIN,
    Case,
    NotRun,
    Workload,
)
from .core.errors import OptionError
from .core.fields import field_text
from .core.kv_curves import kv_figure, kv_markdown
from .core.kv_heads import SWEEP, Heads, join, kv_head_counts
from .core.options import one_of
from .core.report import Report
from .core.run import measure
from .core.writer import publish
from .models.options import ModelOptions, add_model_arguments, resolve_model
from .ops import gqa
from .ops.case import STAGES, OpCase
from .ops.registry import OP_CASES
from .ops.workload import build_workload, op_calls

DESCRIPTION = (
    'Time and memory against the number of kv heads: figure 6 of the GQA paper.'
)
DIRECTIONS = (FORWARD, TRAIN)
# What other suites call these.
_RENAMED = {PREDICT: FORWARD, FORWARD_BACKWARD: TRAIN}
OPS: dict[str, type[OpCase]] = {**OP_CASES, gqa.OP: gqa.DecodingCase}
PAPER, FIGURE_6 = 'deformable-gqa-paper', 'gqa-fig6'
PRESETS = (PAPER, FIGURE_6)
STAGE = 3  # has 9 of the 14 deformable layers of DAT-T++
SIZE, QUICK_SIZE = (800, 1333), (224, 224)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        'target',
        nargs='?',
        metavar='TARGET',
        help=f'an op ({", ".join(OPS)}), a type of layer, a DAT arch, or a config of a '
        'detector',
    )
    add(
        '--preset',
        type=one_of(PRESETS),
        metavar='NAME',
        help=f'{PAPER}: the layer of the deformable GQA repository at its settings; '
        f'{FIGURE_6}: a decoding step of T5-XXL; both with a smaller batch on a CPU',
    )
    add(
        '--stage',
        type=one_of(STAGES),
        help=f'of DAT-T++, for ops and layers (default: {STAGE})',
    )
    add_model_arguments(
        parser,
        DIRECTIONS,
        'small maps',
        str,
        'divisors of the query heads (default: all, and halves down to one)',
    )


def run(args: argparse.Namespace, command: str) -> None:
    """Measure, print the table, and write the files if --out is given.

    Raises:
        OptionError: For wrong options, before anything is measured.
    """
    options = resolve_options(args)
    cases = sweep_cases(args, options)
    described = options.describe()
    if op_of(args):  # a bare op has tensors of the dtype, models autocast
        described['dtype'] = options.amp or 'fp32'
    described |= dict(
        batch_sizes=[cases[0].images],
        subject=cases[0].subject or subject_of(cases[0]),
        heads=max(cases[0].heads.query),
    )
    cases = [in_sweep(case) for case in cases]
    rows = measure([cases], options)
    report = Report.of('gqa-sweep', command, options.device, described, cases, rows)
    draw = functools.partial(kv_figure, report)
    pictures = {'gqa-sweep': draw} if report.measured_cases() else {}
    publish('gqa-sweep', report.to_json(), kv_markdown(report), options.out, pictures)


# Options


def op_of(args: argparse.Namespace) -> type[OpCase] | None:
    """The op that is measured; None for a model, which needs the mm packages."""
    return gqa.DecodingCase if args.preset == FIGURE_6 else OPS.get(args.target)


def resolve_options(args: argparse.Namespace) -> ModelOptions:
    """Options that the target has a use for; it chooses a batch size of none.

    Raises:
        OptionError: For wrong options; none is silently ignored.
    """
    if (args.target is None) == (args.preset is None):
        raise OptionError(
            f'give a TARGET or --preset, got {args.target}, {args.preset}'
        )
    is_config = args.preset is None and args.target.endswith('.py')
    useful = {'sizes', 'cfg_options', 'checkpoint'}
    if args.preset is not None:
        useful = set()
    elif args.target in OPS:
        useful = set(OPS[args.target].sweep_options)
    elif args.target not in ARCHS and not is_config:  # a layer
        useful.add('stage')
    for name in ('cfg_options', 'checkpoint', 'sizes', 'stage'):
        if getattr(args, name) and name not in useful:
            option = '--' + name.replace('_', '-')
            raise OptionError(f'{option} has no effect on {args.target or args.preset}')
    for option, values in (('sizes', args.sizes), ('batch-sizes', args.batch_sizes)):
        if values and len(values) > 1:
            raise OptionError(f'--{option} takes one value in a sweep')
    sizes = () if is_config else (SIZE,)  # that of the config
    sizes = (QUICK_SIZE,) if args.quick else sizes
    options = resolve_model(args, DIRECTIONS, sizes, batch_sizes=())
    if args.preset == FIGURE_6 and args.directions is None:
        options = dataclasses.replace(options, directions=(FORWARD,))
    return options


# Cases


def sweep_cases(args: argparse.Namespace, options: ModelOptions) -> list[Case]:
    """The target's cases, those of the fewest kv heads first.

    Raises:
        OptionError: For a number that does not divide the query heads.
    """
    chosen = args.kv_heads or [SWEEP]
    known = [x for x in chosen if x == SWEEP or (x.isdecimal() and int(x))]
    make = op_cases if op_of(args) else model_cases
    cases = make(args, dataclasses.replace(options, kv_heads=(*known,) or (SWEEP,)))
    heads = max(cases[0].heads.query)
    for text in chosen:
        if text != SWEEP and (text not in known or heads % int(text)):
            raise OptionError(
                f'--kv-heads takes divisors of the {heads} query heads, got {text!r}'
            )
    return sorted(cases, key=lambda case: max(case.heads.kv))


def in_sweep(case: Case) -> Case:
    """The case with the fields and directions of a sweep."""

    def build(backend: str) -> Workload:
        workload = case.build(backend)
        calls = workload.calls.items()
        return dataclasses.replace(
            workload, calls={_RENAMED.get(name, name): call for name, call in calls}
        )

    fields = {
        'target': next(iter(case.fields.values())),
        'kv heads': max(case.heads.kv),
        'batch': case.images,
        'params': None,
    }
    return dataclasses.replace(case, fields=fields, build=build)


def op_cases(args: argparse.Namespace, options: ModelOptions) -> list[Case]:
    """An op of ours at the shape of a stage of DAT-T++, or of its own benchmark."""
    full = op_of(args).for_sweep(
        stage=args.stage or STAGE,
        size=options.sizes[0],
        batch=options.batch_sizes[0] if options.batch_sizes else None,
        quick=args.quick,
        cuda=options.device.type == 'cuda',
    )
    cases = [
        dataclasses.replace(full, num_kv_heads=count)
        for count in kv_head_counts(full.num_heads, options.kv_heads)
    ]
    return [
        Case(
            case.name,
            {'op': case.op},
            case.batch,
            functools.partial(build_op, case, options),
            heads=Heads((case.num_heads,), (case.num_kv_heads,)),
            subject=full.subject,
        )
        for case in cases
    ]


def build_op(case: OpCase, options: ModelOptions, backend: str) -> Workload:
    """The op, whose tensors are part of the memory that kv heads save.

    Raises:
        NotRun: If the backend cannot run it.
    """
    device, dtype = options.device, options.amp_dtype or torch.float32
    if case.op != gqa.OP:
        where = dict(device=device, dtype=dtype, head_dim=case.head_dim)
        if backend == 'auto':
            backend = choose_backend(case.op, backend, **where)
        workload = build_workload(case, device, dtype, backend)
    elif backend == 'auto':
        inputs = case.make_inputs(device, dtype)
        calls = op_calls(gqa.attend, inputs, case.make_grad_out(device, dtype))
        workload = Workload(PLAIN, calls)
    else:
        reason = f'{gqa.OP} runs torch SDPA and has no backends'
        raise NotRun('unsupported', reason)
    workload.resident_mib = sum(case.input_bytes(dtype).values()) / 2**20
    return workload


def model_cases(args: argparse.Namespace, options: ModelOptions) -> list[Case]:
    """A layer, backbone or detector, or the published layer of the preset.

    Raises:
        OptionError: For an unknown target, or one whose kv heads cannot be set.
    """
    # Imported here, as these need the mm packages.
    if args.preset == PAPER:
        from .models.published_layer import HEADS, default_batch, published_case

        [batch] = options.batch_sizes or (default_batch(options, args.quick),)
        counts = kv_head_counts(HEADS, options.kv_heads)
        return [published_case(count, batch, options) for count in counts]
    options = dataclasses.replace(options, batch_sizes=options.batch_sizes or (1,))
    if args.target.endswith('.py'):
        from .models.detector import OBJECTS, detector_cases

        return detector_cases(args.target, options, [], OBJECTS)
    if args.target in ARCHS:
        from .models.backbone import backbone_cases

        return backbone_cases([args.target], options)
    from .models.layer import ARCH, layer_cases

    return layer_cases([args.target], ARCH, [args.stage or STAGE], options)


def subject_of(case: Case) -> str:
    """What the title says of a model and its shapes; layers are those of DAT-T++."""
    texts = {
        name: field_text(name, value)
        for name, value in case.fields.items()
        if name not in ('kv heads', 'params')
    }
    if 'stage' in texts:
        texts['stage'] += ' of DAT-T++'
    by_stage = ' by stage' if len(case.heads.query) > 1 else ''
    heads = f'{join(case.heads.query)} query heads{by_stage}'
    return ', '.join([*texts.values(), heads])
