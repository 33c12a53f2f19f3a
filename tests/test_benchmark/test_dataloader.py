from pathlib import Path

import pytest

from deform_gqa.benchmark.core.report import Report
from deform_gqa.benchmark.dataloader import dataloader_figure
from deform_gqa.datasets.shapes import generate_dataset
from deform_gqa.datasets.shapes_config import ShapesConfig

CONFIG = 'configs/quickstart/mask-rcnn_dat-gqa-mini_fpn_shapes.py'
TINY = ['--batches', '3', '--images', '4']


@pytest.fixture(scope='module')
def data_options(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp('data') / 'shapes'
    config = ShapesConfig(num_train=5, num_val=2, num_test=0, image_size=(64, 64))
    generate_dataset(config, folder)
    return options_for(folder)


def options_for(folder: Path) -> list[str]:
    return [
        '--cfg-options',
        *(
            f'{split}_dataloader.dataset.data_root={folder}/'
            for split in ('train', 'val', 'test')
        ),
    ]


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ('no.py', "config file 'no.py' does not exist"),
        (f'{CONFIG} --split all', "--split: unknown 'all'; there are train, val, test"),
        (f'{CONFIG} --workers -1', '--workers: must be 0 or more, got -1'),
        (f'{CONFIG} --batch-sizes 0', '--batch-sizes: must be positive, got 0'),
        (f'{CONFIG} --batches 0', '--batches: must be positive, got 0'),
        (f'{CONFIG} --images 0', '--images: must be positive, got 0'),
        (f'{CONFIG} --out setup.cfg', "--out: 'setup.cfg' cannot be a folder"),
        ('configs/_base_/default_runtime.py', 'has no train_dataloader'),
    ],
)
def test_wrong_options(benchmark_tool, capsys, options, message):
    assert benchmark_tool.main(['dataloader', *options.split()]) == 2
    out, err = capsys.readouterr()
    assert out == ''
    assert message in err.splitlines()[-1]


def test_missing_data(benchmark_tool, capsys, tmp_path):
    argv = ['dataloader', CONFIG, *TINY, '--workers', '0', *options_for(tmp_path)]
    assert benchmark_tool.main(argv) == 2
    assert 'the data cannot be read: ' in capsys.readouterr().err


def test_batches_and_transforms(benchmark_tool, capsys, tmp_path, data_options):
    pytest.importorskip('matplotlib')
    argv = ['dataloader', CONFIG, *TINY, *data_options, '--workers', '0', '1']
    argv += ['--batch-sizes', '2', '--out', str(tmp_path), '--threads', '1']
    assert benchmark_tool.main(argv) == 0
    assert capsys.readouterr().out.startswith('# Data: ')
    report = Report.load(tmp_path / 'dataloader.json')
    batches = [row for row in report.rows if row.direction == 'batch']
    assert [row.case for row in batches] == [
        'dataloader/train/b2/w0',
        'dataloader/train/b2/w1',
    ]
    # the data set of 5 images has less than the 5 batches: it is read again
    assert all(len(row.timing.samples_ms) == 3 for row in batches)
    cases = report.cases
    assert all(c['first_batch_ms'] > 0 and c['dataset_images'] == 5 for c in cases[:2])
    transforms = [case['transform'] for case in cases[2:]]
    assert transforms == [
        'get_data_info',
        'LoadImageFromFile',
        'LoadAnnotations',
        'Resize',
        'RandomFlip',
        'PackDetInputs',
    ]
    assert all(len(row.timing.samples_ms) == 4 for row in report.rows[2:])
    figure = dataloader_figure(report)
    left, right = figure.axes
    assert (left.get_xlabel(), right.get_xlabel()) == ('images a second', 'ms an image')
    assert report.environment['device'] in figure.get_suptitle()
    assert (tmp_path / 'dataloader.png').exists()


def test_validation_data(benchmark_tool, tmp_path, data_options):
    argv = ['dataloader', CONFIG, *TINY, *data_options, '--workers', '0']
    argv += ['--split', 'val', '--out', str(tmp_path)]
    assert benchmark_tool.main(argv) == 0
    case = Report.load(tmp_path / 'dataloader.json').cases[0]
    assert (case['split'], case['batch'], case['dataset_images']) == ('val', 4, 2)
