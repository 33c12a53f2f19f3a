"""``benchmark.py gqa-sweep``: time and memory against the number of kv heads.

The figure 6 of the GQA paper (arXiv 2305.13245) for any op, layer, backbone or
detector of ours.
"""

import argparse
import dataclasses
import functools
import importlib
from typing import Any

from deform_gqa.profiling.environment import describe_environment

from . import sweep_ops
from .common_options import one_of
from .errors import OptionError
from .model_measure import FORWARD, TRAIN
from .model_options import ModelOptions, add_model_arguments, resolve_model
from .model_report import mm_versions, publish
from .op_cases import CASES, STAGES
from .report import Report
from .sweep_measure import measure_interleaved
from .sweep_ops import Sweep
from .sweep_report import sweep_figure, sweep_markdown

DESCRIPTION = (
    'Time and memory against the number of kv heads: figure 6 of the GQA paper.'
)
DIRECTIONS = (FORWARD, TRAIN)
PAPER, FIGURE_6 = 'deformable-gqa-paper', 'gqa-fig6'
PRESETS = (PAPER, FIGURE_6)
STAGE = 3  # has 9 of the 14 deformable layers of DAT-T++
SIZE, QUICK_SIZE = '800x1333', '224x224'
QUICK_PAPER_BATCH = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        'target',
        nargs='?',
        metavar='TARGET',
        help=f'an op ({", ".join(sweep_ops.OPS)}), a type of layer, a DAT arch, or a '
        'config of a detector',
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


def run(args: argparse.Namespace, command: str) -> None:
    """Measure, print the table, and write the files if --out is given.

    Raises:
        OptionError: For wrong options, before anything is measured.
    """
    options = resolve_options(args)
    options.use_threads()
    sweep = make_sweep(args, options)
    measurement = measure_interleaved(list(sweep.cases.values()), options)
    versions = {} if is_op(args) else mm_versions()
    report = Report(
        suite='gqa-sweep',
        command=command,
        environment={**describe_environment(options.device), **versions},
        options=describe(args, options, sweep),
        **measurement.as_report(),
    )
    markdown = sweep_markdown(report)
    name = 'gqa-sweep'
    publish(
        report, markdown, options.out, [(name, functools.partial(sweep_figure, report))]
    )


def describe(
    args: argparse.Namespace, options: ModelOptions, sweep: Sweep
) -> dict[str, Any]:
    """For the report; a bare op has tensors of the dtype, models autocast."""
    values = options.describe()
    if is_op(args):
        values['dtype'] = options.amp or 'fp32'
    return {**values, 'subject': sweep.subject, 'heads': sweep.heads}


def refuse_without_effect(args: argparse.Namespace) -> None:
    """No option is silently ignored.

    Raises:
        OptionError: For the first that the target or preset has no use for.
    """
    useless = []
    if is_op(args) or args.preset is not None:
        useless += ['cfg_options', 'checkpoint']
    if args.preset is not None or args.target in (sweep_ops.SDPA, sweep_ops.GQA_OP):
        useless += ['sizes']
    if args.stage is not None and not takes_stage(args):
        useless += ['stage']
    for name in useless:
        if getattr(args, name):
            option = '--' + name.replace('_', '-')
            raise OptionError(f'{option} has no effect on {args.target or args.preset}')


def takes_stage(args: argparse.Namespace) -> bool:
    """Whether the target is measured at the shapes of one stage."""
    if is_op(args) or args.preset is not None:
        return args.target in CASES
    if args.target.endswith('.py'):
        return False
    models = importlib.import_module('.sweep_models', __package__)
    return args.target not in models.backbone_suite.ARCHS


def is_op(args: argparse.Namespace) -> bool:
    return args.preset == FIGURE_6 or args.target in sweep_ops.OPS


def resolve_options(args: argparse.Namespace) -> ModelOptions:
    """Checked options with the shapes that the target has by default.

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
    arguments: dict[str, Any] = {**vars(args), 'kv_heads': None}
    options = resolve_model(
        argparse.Namespace(**arguments),
        DIRECTIONS,
        default_sizes(args),
        (1,),
    )
    if args.batch_sizes is None:
        batch = default_batch(args, options)
        options = dataclasses.replace(options, batch_sizes=(batch,))
    if args.preset == FIGURE_6 and args.directions is None:
        options = dataclasses.replace(options, directions=(FORWARD,))
    return options


def default_sizes(args: argparse.Namespace) -> tuple[str, ...]:
    """The image size; none for a detector, which its config tells."""
    if args.quick:
        return (QUICK_SIZE,)
    is_config = args.target is not None and args.target.endswith('.py')
    return () if is_config else (SIZE,)


def default_batch(args: argparse.Namespace, options: ModelOptions) -> int:
    cuda = options.device.type == 'cuda'
    if args.preset == PAPER:
        layer = importlib.import_module('.published_layer', __package__)
        if args.quick:
            return QUICK_PAPER_BATCH
        return layer.BATCH if cuda else layer.CPU_BATCH
    if args.preset == FIGURE_6 or args.target == sweep_ops.GQA_OP:
        case = sweep_ops.FIGURE_6 if cuda else sweep_ops.CPU_FIGURE_6
        return case.batch
    if args.target == sweep_ops.SDPA and not args.quick:
        return sweep_ops.GROUP_SWEEP.batch_sizes[0]
    return 1


def make_sweep(args: argparse.Namespace, options: ModelOptions) -> Sweep:
    """What the target or the preset names.

    Raises:
        OptionError: For an unknown target, or numbers of kv heads that do not fit.
    """
    chosen = args.kv_heads or ()
    stage = STAGE if args.stage is None else args.stage
    if is_op(args):
        op = sweep_ops.GQA_OP if args.preset == FIGURE_6 else args.target
        return sweep_ops.op_sweep(op, stage, options, chosen, args.quick)
    models = importlib.import_module('.sweep_models', __package__)
    if args.preset == PAPER:
        return models.published_sweep(options, chosen)
    if args.target.endswith('.py'):
        return models.detector_sweep(args.target, options, chosen)
    if args.target in models.backbone_suite.ARCHS:
        return models.backbone_sweep(args.target, options, chosen)
    return models.layer_sweep(args.target, stage, options, chosen)
