"""Time a sample of T5 against the number of kv heads: figure 6 of the GQA paper.

    PYTHONPATH=. python projects/text_gqa/benchmark_t5.py --out work_dirs/t5
    PYTHONPATH=. python projects/text_gqa/benchmark_t5.py --preset gqa-fig6

Models have random weights, which take as long as trained ones. As in the paper, heads
are grouped in the decoder alone; --group-encoder groups those of the encoder as well.
The run loop, the table and the curves are those of tools/benchmark.py.
"""

import argparse
import dataclasses
import functools
import shlex
import sys
from collections.abc import Mapping, Sequence

import torch

from deform_gqa.benchmark.core.cases import FORWARD, PLAIN, Case, Workload
from deform_gqa.benchmark.core.errors import OptionError
from deform_gqa.benchmark.core.kv_curves import kv_figure, kv_heads_of, kv_markdown
from deform_gqa.benchmark.core.kv_heads import SWEEP, kv_head_counts
from deform_gqa.benchmark.core.options import (
    MeasureOptions,
    Parser,
    add_output_arguments,
    one_of,
    parse_count,
    parse_device,
    parse_seconds,
    resolve_measure,
    use_threads,
)
from deform_gqa.benchmark.core.report import Report
from deform_gqa.benchmark.core.run import measure
from deform_gqa.benchmark.core.writer import publish
from deform_gqa.profiling.markdown import number, records_table
from projects.text_gqa.text_gqa import GQAT5Config, GQAT5ForConditionalGeneration
from projects.text_gqa.text_gqa.cache_size import t5_cache_bytes

GENERATE = 'generate'
DIRECTIONS = (GENERATE, FORWARD)
NOTES = (
    '`generate` encodes the input and makes all output tokens one after the other, '
    'which is what the paper times; `forward` is one pass with the output given, which '
    'is what grouped-query-attention-pytorch times. The cache of a sample is measured.'
)
VOCABULARY = 32128
EXIT_BAD_OPTION = 2


@dataclasses.dataclass(frozen=True)
class Arch:
    """Sizes of a T5."""

    channels: int
    head_dim: int
    hidden: int
    layers: int
    heads: int
    feed_forward: str = 'relu'
    vocabulary: int = VOCABULARY


ARCHS: Mapping[str, Arch] = {
    'tiny': Arch(32, 8, 64, 2, 4, vocabulary=64),
    'small': Arch(512, 64, 2048, 6, 8),
    'base': Arch(768, 64, 3072, 12, 12),
    'large': Arch(1024, 64, 4096, 24, 16),
    '3b': Arch(1024, 128, 16384, 24, 32),
    'xxl': Arch(4096, 64, 10240, 24, 64, 'gated-gelu'),
}


@dataclasses.dataclass(frozen=True)
class Preset:
    """A T5 and what it reads and writes."""

    arch: str
    batch: int
    input_length: int
    output_length: int


QUICK, CPU, PUBLISHED, FIGURE_6 = 'quick', 'cpu', 'published', 'gqa-fig6'
PRESETS: Mapping[str, Preset] = {
    QUICK: Preset('tiny', 2, 16, 4),
    CPU: Preset('small', 1, 512, 64),
    # scripts/benchmark_t5.py of grouped-query-attention-pytorch
    PUBLISHED: Preset('3b', 8, 512, 64),
    FIGURE_6: Preset('xxl', 32, 2048, 512),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        run(make_parser().parse_args(argv), shlex.join(['benchmark_t5.py', *argv]))
    except OptionError as error:
        print(f'benchmark_t5.py: error: {error}', file=sys.stderr)
        return EXIT_BAD_OPTION
    return 0


def make_parser() -> Parser:
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    default = f'default: {FIGURE_6}, {CPU} without a GPU'
    add('--preset', type=one_of(PRESETS), help=f'of {", ".join(PRESETS)} ({default})')
    add('--arch', type=one_of(ARCHS), help=f"of {', '.join(ARCHS)}, not the preset's")
    add('--batch', type=parse_count, help='samples a call')
    add('--input-length', type=parse_count, help='tokens')
    add('--output-length', type=parse_count, help='tokens')
    text = 'default: all, and halves down to one'
    add('--kv-heads', type=parse_count, nargs='+', metavar='K', help=text)
    add('--group-encoder', action='store_true', help='group heads of the encoder too')
    text = f'of {", ".join(DIRECTIONS)}'
    add('--directions', type=one_of(DIRECTIONS), nargs='+', metavar='D', help=text)
    text = "'cpu' or 'cuda[:N]' (default: cuda where there is one)"
    present = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    add('--device', type=parse_device, default=present, help=text)
    text = 'samples (default: as many as fill --min-time-s)'
    add('--repeats', type=parse_count, help=text)
    text = 'sampling time a row, at least 3 samples'
    add('--min-time-s', type=parse_seconds, help=text)
    text = 'start no measurement after that time'
    add('--time-limit-s', type=parse_seconds, help=text)
    add_output_arguments(parser, 'the tiny arch')
    parser.set_defaults(backends=None, sizes=None, batch_sizes=None)  # not of a T5
    return parser


def run(args: argparse.Namespace, command: str) -> None:
    """Measure all numbers of kv heads.

    Raises:
        OptionError: For wrong options, before anything is measured.
    """
    options, preset = resolve(args)
    arch = ARCHS[preset.arch]
    counts = kv_counts(arch.heads, args.kv_heads)
    use_threads(options.threads)
    cases = [
        make_case(preset, count, args.group_encoder, options.device) for count in counts
    ]
    # Large models do not fit side by side; a small machine drifts.
    is_gpu = options.device.type == 'cuda'
    groups = [[case] for case in cases] if is_gpu else [cases]
    subject = (
        f'T5 {preset.arch}, {preset.input_length} tokens in, {preset.output_length} '
        f'out, batch {preset.batch}, {arch.heads} query heads'
    )
    described = options.describe() | dict(
        dtype='bf16' if is_gpu else 'fp32',
        subject=subject,
        heads=arch.heads,
        group_encoder=args.group_encoder,
    )
    rows = measure(groups, options)
    report = Report.of('benchmark_t5', command, options.device, described, cases, rows)
    pictures = {}
    if report.measured_cases():
        pictures['benchmark_t5'] = functools.partial(kv_figure, report)
    text = '\n'.join([kv_markdown(report), NOTES, '', sample_table(report), ''])
    publish('benchmark_t5', report.to_json(), text, options.out, pictures)


def resolve(args: argparse.Namespace) -> tuple[MeasureOptions, Preset]:
    """Checked options, and the preset with what was given instead.

    Raises:
        OptionError: For a device that is not there.
    """
    name = args.preset
    if name is None:
        name = FIGURE_6 if args.device.type == 'cuda' else CPU
        name = QUICK if args.quick else name
    given = {
        field.name: getattr(args, field.name)
        for field in dataclasses.fields(Preset)
        if getattr(args, field.name) is not None
    }
    preset = dataclasses.replace(PRESETS[name], **given)
    fixed = dict(backends=(PLAIN,), sizes=(), batch_sizes=(preset.batch,))
    options = resolve_measure(args, DIRECTIONS, kv_heads=(), **fixed)
    return MeasureOptions(**options), preset


def kv_counts(heads: int, chosen: Sequence[int] | None) -> list[int]:
    """Numbers of kv heads, in ascending order.

    Raises:
        OptionError: For a number that does not divide the query heads.
    """
    if not chosen:
        return sorted(kv_head_counts(heads, [SWEEP]))
    for count in chosen:
        if heads % count:
            raise OptionError(
                f'--kv-heads takes divisors of the {heads} query heads, got {count}'
            )
    return sorted(set(chosen))


def make_case(
    preset: Preset, kv_heads: int, group_encoder: bool, device: torch.device
) -> Case:
    """A T5 with that number of kv heads, built when its turn comes."""
    fields = {'kv heads': kv_heads, 'batch': preset.batch, 'params': None}

    def build(_backend: str) -> Workload:
        model = build_t5(ARCHS[preset.arch], kv_heads, group_encoder, device)
        lengths = preset.input_length, preset.output_length
        fields['cache MiB a sample'] = t5_cache_bytes(model, *lengths) / 2**20
        return Workload(PLAIN, make_calls(model, preset), model=model)

    return Case(f'{kv_heads} kv heads', fields, preset.batch, build)


def build_t5(
    arch: Arch, kv_heads: int, group_encoder: bool, device: torch.device
) -> GQAT5ForConditionalGeneration:
    """With random weights, in bfloat16 on a GPU and in float32 elsewhere."""
    config = GQAT5Config(
        vocab_size=arch.vocabulary,
        d_model=arch.channels,
        d_kv=arch.head_dim,
        d_ff=arch.hidden,
        num_layers=arch.layers,
        num_heads=arch.heads,
        feed_forward_proj=arch.feed_forward,
        num_key_value_heads=kv_heads,
        encoder_num_key_value_heads=kv_heads if group_encoder else arch.heads,
        decoder_start_token_id=0,
    )
    with device:
        model = GQAT5ForConditionalGeneration(config).eval()
    return model.to(torch.bfloat16) if device.type == 'cuda' else model


def make_calls(model: GQAT5ForConditionalGeneration, preset: Preset) -> dict:
    """A call for each direction."""
    generator = torch.Generator().manual_seed(0)
    inputs, outputs = (
        torch.randint(
            2, model.config.vocab_size, (preset.batch, length), generator=generator
        ).to(model.device)
        for length in (preset.input_length, preset.output_length)
    )

    @torch.no_grad()
    def forward():
        return model(input_ids=inputs, labels=outputs, use_cache=False).loss

    def generate():
        count = preset.output_length
        return model.generate(inputs, max_new_tokens=count, min_new_tokens=count)

    return {FORWARD: forward, GENERATE: generate}


def sample_table(report: Report) -> str:
    """Time of a sample, as in the figure, and its keys and values."""
    counts = kv_heads_of(report)
    caches = {case['name']: case.get('cache MiB a sample') for case in report.cases}
    batch = report.options['batch_sizes'][0]
    return records_table(
        [
            {
                'direction': row.direction,
                'kv heads': str(counts[row.case]),
                'ms a sample': number(row.timing.median_ms / batch),
                'cache MiB a sample': number(caches[row.case]),
            }
            for row in report.rows
            if row.timing is not None
        ]
    )


if __name__ == '__main__':
    sys.exit(main())
