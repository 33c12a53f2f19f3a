"""``benchmark.py gqa-sweep``: time and memory against the number of kv heads.

The figure 6 of the GQA paper (arXiv 2305.13245) for any op, layer, backbone or
detector of ours: the cases of their suites along the axis of kv heads, in turns.
"""

import argparse
import dataclasses
import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from deform_gqa.archs import ARCHS
from deform_gqa.ops.common.backends import choose_backend
from deform_gqa.profiling.environment import describe_environment

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
from .core.kv_curves import kv_figure, kv_markdown
from .core.kv_heads import SWEEP, kv_head_counts
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
SIZE, QUICK_SIZE = '800x1333', '224x224'


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
        metavar='NAME',
        help=f'{PAPER}: the layer of the deformable GQA repository at its settings; '
        f'{FIGURE_6}: a decoding step of T5-XXL; both with a smaller batch on a CPU',
    )
    add(
        '--stage',
        type=int,
        help=f'of DAT-T++, for ops and layers (default: {STAGE})',
    )
    add_model_arguments(
        parser,
        DIRECTIONS,
        quick='small maps',
        kv_heads='divisors of the query heads (default: all, and halves down to one)',
    )


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A target at several numbers of kv heads.

    Attributes:
        subject: What the title says of the target and its shapes.
        heads: Query heads: the number of kv heads of multi-head attention.
        batch: Of a call.
        cases: In the order of the numbers of kv heads.
    """

    subject: str
    heads: int
    batch: int
    cases: list[Case]


def run(args: argparse.Namespace, command: str) -> None:
    """Measure, print the table, and write the files if --out is given.

    Raises:
        OptionError: For wrong options, before anything is measured.
    """
    options = resolve_options(args)
    options.use_threads()
    op = op_of(args)
    sweep = model_sweep(args, options) if op is None else op_sweep(op, args, options)
    options = dataclasses.replace(options, batch_sizes=(sweep.batch,))
    rows = measure([sweep.cases], options)
    described = options.describe()
    versions: dict[str, str] = {}
    if op is None:
        versions = _module('report').mm_versions()
    else:  # a bare op has tensors of the dtype, models autocast
        described['dtype'] = options.amp or 'fp32'
    report = Report(
        suite='gqa-sweep',
        command=command,
        environment={**describe_environment(options.device), **versions},
        options={**described, 'subject': sweep.subject, 'heads': sweep.heads},
        cases=[case.describe() for case in sweep.cases],
        rows=rows,
    )
    draw = functools.partial(kv_figure, report)
    pictures = {'gqa-sweep': draw} if report.measured_cases() else {}
    publish('gqa-sweep', report.to_json(), kv_markdown(report), options.out, pictures)


# Options


def op_of(args: argparse.Namespace) -> str | None:
    """The op that is measured; None for a model, which needs the mm packages."""
    if args.preset == FIGURE_6:
        return gqa.OP
    return args.target if args.target in OPS else None


def takes_stage(args: argparse.Namespace) -> bool:
    """Whether the target is measured at the shapes of one stage."""
    if args.preset is not None:
        return False
    if args.target in OPS:
        return 'stage' in OPS[args.target].sweep_options
    return not args.target.endswith('.py') and args.target not in ARCHS


def refuse_without_effect(args: argparse.Namespace) -> None:
    """No option is silently ignored.

    Raises:
        OptionError: For the first that the target or preset has no use for.
    """
    op, useless = op_of(args), []
    if op or args.preset is not None:
        useless += ['cfg_options', 'checkpoint']
    if args.preset is not None or (op and 'sizes' not in OPS[op].sweep_options):
        useless += ['sizes']
    if args.stage is not None and not takes_stage(args):
        useless += ['stage']
    for name in useless:
        if getattr(args, name):
            option = '--' + name.replace('_', '-')
            raise OptionError(f'{option} has no effect on {args.target or args.preset}')


def resolve_options(args: argparse.Namespace) -> ModelOptions:
    """Checked options; the target chooses the batch size where none is given.

    Raises:
        OptionError: For wrong options.
    """
    if (args.target is None) == (args.preset is None):
        raise OptionError(
            f'give a TARGET or --preset, got {args.target}, {args.preset}'
        )
    if args.preset is not None:
        one_of('--preset', [args.preset], PRESETS)
    if args.stage is not None:
        one_of('--stage', [args.stage], STAGES)
    refuse_without_effect(args)
    for name in ('sizes', 'batch_sizes'):
        if len(getattr(args, name) or [0]) > 1:
            option = '--' + name.replace('_', '-')
            raise OptionError(f'{option} takes one value in a sweep')
    is_config = args.target is not None and args.target.endswith('.py')
    sizes = (SIZE,) if not is_config else ()  # that of the config
    arguments = argparse.Namespace(**{**vars(args), 'kv_heads': None})
    options = resolve_model(
        arguments, DIRECTIONS, (QUICK_SIZE,) if args.quick else sizes, ()
    )
    if args.preset == FIGURE_6 and args.directions is None:
        options = dataclasses.replace(options, directions=(FORWARD,))
    return options


def kv_counts(heads: int, chosen: Sequence[str] | None) -> list[int]:
    """Numbers of kv heads in ascending order: those chosen, or halvings down to one.

    Raises:
        OptionError: For a number that does not divide the query heads.
    """
    if not chosen:
        return sorted(kv_head_counts(heads, [SWEEP]))
    for text in chosen:
        if not text.isdecimal() or not int(text) or heads % int(text):
            raise OptionError(
                f'--kv-heads takes divisors of the {heads} query heads, got {text!r}'
            )
    return sorted({int(text) for text in chosen})


# Targets


def along_kv_heads(
    target: str, counts: Sequence[int], make: Callable[[int], Case]
) -> list[Case]:
    """The case of each number, with the fields and directions of a sweep."""
    cases = []
    for count in counts:
        case = make(count)
        batch = case.fields['batch']
        case.fields = dict(target=target, **{'kv heads': count}, batch=batch)
        case.fields['params'] = None
        case.build = functools.partial(_build_renamed, case.build)
        cases.append(case)
    return cases


def _build_renamed(build: Callable[[str], Workload], backend: str) -> Workload:
    workload = build(backend)
    calls = {_RENAMED.get(name, name): call for name, call in workload.calls.items()}
    return dataclasses.replace(workload, calls=calls)


def op_sweep(op: str, args: argparse.Namespace, options: ModelOptions) -> Sweep:
    """An op of ours at the shape of a stage of DAT-T++, or of its own benchmark."""
    full = OPS[op].for_sweep(
        stage=args.stage or STAGE,
        size=options.sizes[0],
        batch=options.batch_sizes[0] if options.batch_sizes else None,
        quick=args.quick,
        cuda=options.device.type == 'cuda',
    )

    def make(count: int) -> Case:
        case = dataclasses.replace(full, num_kv_heads=count)
        build = functools.partial(build_op, case, options)
        return Case(case.name, case.describe(), case.batch, build)

    counts = kv_counts(full.num_heads, args.kv_heads)
    cases = along_kv_heads(op, counts, make)
    return Sweep(full.subject, full.num_heads, full.batch, cases)


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


def _module(name: str) -> Any:
    """A module of the suites of models, which need the mm packages."""
    return importlib.import_module(f'.models.{name}', __package__)


def model_sweep(args: argparse.Namespace, options: ModelOptions) -> Sweep:
    """A layer, backbone or detector, or the published layer of the preset.

    Raises:
        OptionError: For an unknown target, or numbers of kv heads that do not fit.
    """
    chosen, batch = args.kv_heads, (options.batch_sizes or (1,))[0]
    if args.preset == PAPER:
        layer, batches = _module('published_layer'), options.batch_sizes
        batch = batches[0] if batches else layer.default_batch(options, args.quick)
        counts = kv_counts(layer.HEADS, chosen)
        make = functools.partial(layer.published_case, batch=batch, options=options)
        cases = along_kv_heads(PAPER, counts, make)
        return Sweep(layer.subject(batch), layer.HEADS, batch, cases)
    if args.target.endswith('.py') or args.target in ARCHS:
        return dat_sweep(args.target, options, chosen, batch)
    layers, stage, size = _module('layer'), args.stage or STAGE, options.sizes[0]
    kind = args.target
    config = layers.layer_config(kind, layers.ARCH, stage, options.cfg_options)
    heads = config[layers.option_names(kind)[1]]

    def make_layer(count: int) -> Case:
        [chosen_config] = layers.with_kv_heads(config, [str(count)])
        return layers.layer_case(chosen_config, stage, size, batch, options)

    subject = (
        f'{kind}, stage {stage} of DAT-T++, {size[0]}x{size[1]} px, batch {batch}, '
        f'{heads} query heads'
    )
    cases = along_kv_heads(kind, kv_counts(heads, chosen), make_layer)
    return Sweep(subject, heads, batch, cases)


def dat_sweep(
    target: str, options: ModelOptions, chosen: Sequence[str] | None, batch: int
) -> Sweep:
    """A model with a DAT: each stage has the largest divisor of its heads.

    Raises:
        OptionError: For a model without a DAT backbone.
    """
    build = _module('build')
    name = build.short_name(target)
    make: Callable[[dict[str, Any]], Case]
    if target in ARCHS:
        backbone, size = _module('backbone'), options.sizes[0]
        config = backbone.backbone_config(target, options.cfg_options)
        make = functools.partial(
            backbone.backbone_case, target, size=size, batch=batch, options=options
        )
    else:
        detector, inputs = _module('detector'), _module('detector_inputs')
        cfg = detector.load_detector(target, options)
        config = cfg.model.to_dict()
        size = options.sizes[0] if options.sizes else inputs.config_size(cfg)
        source = detector.BatchSource(cfg, size, batch, (), detector.OBJECTS)
        options = dataclasses.replace(options, directions=(PREDICT, TRAIN))
        make = functools.partial(
            detector.detector_case, name, source=source, options=options
        )
    heads = build.query_heads(config)
    cases = along_kv_heads(
        name,
        kv_counts(max(heads), chosen),
        lambda count: make(build.with_kv_heads(config, str(count))),
    )
    subject = (
        f'{name}, {size[0]}x{size[1]} px, batch {batch}, '
        f'{build.join(heads)} query heads by stage'
    )
    return Sweep(subject, max(heads), batch, cases)
