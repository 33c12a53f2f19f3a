"""projects/text_gqa: the benchmark, the fine-tuning and its tasks."""

import json

import pytest
import torch

from projects.text_gqa import benchmark_t5, finetune_t5
from projects.text_gqa.text_gqa.sequence_tasks import EOS, PAD, TASKS, make_batch


@pytest.fixture(autouse=True)
def threads():
    """The scripts choose a number of threads; the tests after them do not."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize('task', TASKS)
def test_tasks(task):
    batch = make_batch(task, 50, 6, 5, torch.Generator().manual_seed(0))
    rewrite = {'copy': list, 'reverse': lambda x: x[::-1], 'sort': sorted}[task]
    lengths = set()
    for row, mask, wanted in zip(*batch.values(), strict=True):
        length = mask.sum().item() - 1
        letters = row[:length].tolist()
        assert row[length:].tolist() == [EOS] + [PAD] * (5 - length)
        assert all(2 <= letter < 8 for letter in letters)
        assert wanted.tolist() == [*rewrite(letters), EOS] + [-100] * (5 - length)
        lengths.add(length)
    assert lengths == {3, 4, 5}
    again = make_batch(task, 50, 6, 5, torch.Generator().manual_seed(0))
    assert all(batch[name].equal(again[name]) for name in batch)


@pytest.mark.parametrize(
    ('options', 'error', 'message'),
    [
        (dict(task='shuffle'), ValueError, "task must be one of .*, got 'shuffle'"),
        (dict(batch=0), ValueError, 'batch must be at least 1, got 0'),
        (dict(num_letters=0), ValueError, 'num_letters must be at least 1, got 0'),
        (dict(max_length=2.5), TypeError, 'max_length must be an integer'),
    ],
)
def test_wrong_tasks(options, error, message):
    values = dict(task='copy', batch=1, num_letters=3, max_length=4)
    with pytest.raises(error, match=message):
        make_batch(**values | options, generator=torch.Generator())


SMALL = '--layers 1 --width 16 --batch 4 --length 4 --letters 3 --test-sequences 16'


def test_finetuning(tmp_path, capsys):
    """Numbers of the converted model stand beside those of the baselines."""
    command = f'--steps 10 --alphas 0.2 0.5 --kv-heads 4 1 {SMALL} --out {tmp_path}'
    finetune_t5.main(command.split())
    record = json.loads((tmp_path / 'finetune_t5.json').read_text())
    rows = [(row['model'], row['kv heads'], row['steps']) for row in record['rows']]
    assert rows == [
        ('multi-head', 8, '10'),
        *(('multi-head, trained on', 8, f'10 + {n}') for n in (2, 5)),
        *(
            row
            for count in (4, 1)
            for row in (
                ('converted', count, '10 + 0'),
                ('converted, uptrained', count, '10 + 2'),
                ('converted, uptrained', count, '10 + 5'),
                ('grouped from the start', count, '15'),
            )
        ),
    ]
    sizes = {row['kv heads']: row['cache bytes'] for row in record['rows']}
    assert sizes[8] == 2 * sizes[4] == 8 * sizes[1]
    assert all(0 <= row['right'] <= 1 and row['loss'] > 0 for row in record['rows'])
    text = (tmp_path / 'finetune_t5.md').read_text()
    assert text.count('converted, uptrained') == 4
    assert text in capsys.readouterr().out


def test_finetuning_learns():
    options, out = finetune_t5.parse(
        f'--task copy --steps 60 --alphas 0 {SMALL} --batch 32 --width 32'.split()
    )
    assert out is None and options.further_steps == [0]
    untrained, model = (
        finetune_t5.trained_from_random_weights(options.t5_config(), options, steps)
        for steps in (0, options.steps)
    )
    before, after = (finetune_t5.evaluate(x, options) for x in (untrained, model))
    assert after['loss'] < before['loss'] / 2
    assert after['right'] > before['right']


@pytest.mark.parametrize(
    ('command', 'message'),
    [
        ('--task shuffle', '--task: invalid choice'),
        ('--width 12', '--width must be a multiple of 8, got 12'),
        ('--kv-heads 2 3', '--kv-heads takes divisors of 8, got 3'),
        ('--alphas -0.1', '--alphas must not be negative, got -0.1'),
    ],
)
def test_wrong_options_of_the_finetuning(command, message, capsys):
    with pytest.raises(SystemExit):
        finetune_t5.main(command.split())
    assert message in capsys.readouterr().err


def test_benchmark(tmp_path, capsys):
    command = f'--quick --device cpu --repeats 1 --kv-heads 4 1 --out {tmp_path}'
    assert benchmark_t5.main(command.split()) == 0
    record = json.loads((tmp_path / 'benchmark_t5.json').read_text())
    measured = {(row['case'], row['direction']) for row in record['rows']}
    assert measured == {
        (f'{count} kv heads', direction)
        for count in (1, 4)
        for direction in ('generate', 'forward')
    }
    assert all(row['status'] == 'ok' for row in record['rows'])
    one, all_heads = record['cases']
    assert one['kv heads'] == 1 and all_heads['kv heads'] == 4
    assert all_heads['cache MiB a sample'] == 4 * one['cache MiB a sample']
    # keys and values of self- and cross-attention in the two layers of the decoder
    assert all_heads['params'] - one['params'] == 2 * 2 * 2 * 3 * 8 * 32
    assert 'ms a sample' in capsys.readouterr().out
    assert (tmp_path / 'benchmark_t5.png').stat().st_size > 10_000


def test_encoder_is_grouped_on_demand():
    arch, cpu = benchmark_t5.ARCHS['tiny'], torch.device('cpu')
    plain, grouped = (
        benchmark_t5.build_t5(arch, 1, group, cpu) for group in (False, True)
    )
    assert plain.num_parameters() - grouped.num_parameters() == 2 * 2 * 3 * 8 * 32


def test_generate_makes_all_tokens():
    preset = benchmark_t5.PRESETS['quick']
    model = benchmark_t5.build_t5(
        benchmark_t5.ARCHS[preset.arch], 2, False, torch.device('cpu')
    )
    calls = benchmark_t5.make_calls(model, preset)
    made = calls['generate']()
    assert made.shape == (preset.batch, 1 + preset.output_length)
    assert calls['forward']().ndim == 0


def test_presets_are_those_of_the_paper_and_of_the_published_script():
    paper = benchmark_t5.PRESETS['gqa-fig6']
    assert (paper.input_length, paper.output_length) == (2048, 512)
    assert benchmark_t5.ARCHS[paper.arch].heads == 64
    published = benchmark_t5.PRESETS['published']
    assert published.batch * published.input_length == 4096
    args = benchmark_t5.make_parser().parse_args(['--device', 'cpu', '--batch', '3'])
    _, preset = benchmark_t5.resolve(args)
    assert (preset.arch, preset.batch) == ('small', 3)


@pytest.mark.parametrize(
    ('command', 'message'),
    [
        ('--kv-heads 3', '--kv-heads takes divisors of the 4 query heads, got 3'),
        ('--kv-heads 0', '--kv-heads: must be positive, got 0'),
        ('--preset fig7', "--preset: unknown 'fig7'"),
        ('--arch huge', "--arch: unknown 'huge'"),
        ('--directions train', "--directions: unknown 'train'"),
        ('--batch 0', '--batch: must be positive, got 0'),
        ('--input-length -1', '--input-length: must be positive, got -1'),
        ('--device tpu', "--device: must be 'cpu' or 'cuda"),
    ],
)
def test_wrong_options_of_the_benchmark(command, message, capsys):
    assert benchmark_t5.main(['--quick', '--device', 'cpu', *command.split()]) == 2
    assert message in capsys.readouterr().err
