"""Pictures of a training: curves from its logs, panels of drawn images."""

import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from deform_gqa.visualization.run import (
    PANEL_GAP,
    draw_training,
    picture_panel,
    read_scalars,
)

TOOL = Path(__file__).parents[2] / 'tools/draw_run.py'


def log(folder, run, *records, end=''):
    file = folder / run / 'vis_data/scalars.json'
    file.parent.mkdir(parents=True)
    file.write_text(''.join(json.dumps(r) + '\n' for r in records) + end)
    return file


def train(step, loss, **more):
    return dict(loss=loss, step=step, **more)


def val(step, value):
    return {'coco/bbox_mAP': value, 'coco/bbox_mAP_50': value + 0.1, 'step': step}


@pytest.fixture
def work_dir(tmp_path):
    log(tmp_path, '1', train(10, 2.0), val(1, 0.2), train(20, 1.5), end='{"loss": 1')
    log(tmp_path, '2', train(20, 1.0), train(30, 0.5), val(2, 0.3))
    return tmp_path


def test_later_runs_replace_what_they_repeat(work_dir):
    trained, validated = read_scalars(work_dir)
    assert [(r['step'], r['loss']) for r in trained] == [
        (10, 2.0),
        (20, 1.0),
        (30, 0.5),
    ]
    assert [r['step'] for r in validated] == [1, 2]


def test_curves_hold_the_logged_values(work_dir):
    losses, metrics = draw_training(work_dir).axes
    (line,) = losses.get_lines()
    np.testing.assert_array_equal(line.get_xydata(), [[10, 2.0], [20, 1.0], [30, 0.5]])
    drawn = {li.get_label(): li.get_ydata().tolist() for li in metrics.get_lines()}
    assert drawn == {
        'bbox_mAP': [0.2, 0.3],
        'bbox_mAP_50': pytest.approx([0.3, 0.4]),
    }
    assert {t.get_text() for t in metrics.texts} == {'0.300', '0.400'}


def test_parts_of_the_loss_that_come_late_are_drawn(tmp_path):
    log(tmp_path, '1', train(10, 2.0), train(20, 1.0, loss_cls=0.4))
    (losses,) = draw_training(tmp_path).axes
    parts = {li.get_label(): li.get_xydata().tolist() for li in losses.get_lines()}
    assert parts['loss_cls'] == [[20, 0.4]]


def test_logs_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'scalars\.json'):
        read_scalars(tmp_path)
    log(tmp_path, '1', val(1, 0.2))
    with pytest.raises(FileNotFoundError, match='logged no loss'):
        read_scalars(tmp_path)


def test_a_broken_line_is_named(tmp_path):
    file = log(tmp_path, '1', train(1, 1.0))
    file.write_text('nonsense\n' + file.read_text())
    with pytest.raises(ValueError, match=r"scalars.json:1 is no record: 'nonsense'"):
        read_scalars(tmp_path)


def draw(folder, name, height, width, value):
    folder.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(folder / name), np.full((height, width, 3), value, np.uint8))


def test_panel(tmp_path):
    draw(tmp_path / 'deep', 'a.png', 20, 30, 10)
    draw(tmp_path / 'deep', 'b.png', 10, 40, 20)
    draw(tmp_path / 'deep', 'c.png', 20, 30, 30)
    draw(tmp_path / 'deep', 'd.png', 20, 30, 40)
    (tmp_path / 'deep/notes.txt').write_text('no picture')
    panel = picture_panel(tmp_path, count=3)
    height, width = 20 + PANEL_GAP, 40 + PANEL_GAP
    assert panel.shape == (2 * height - PANEL_GAP, 2 * width - PANEL_GAP, 3)
    assert (panel[:20, :30] == 10).all() and (panel[:20, 30:width] == 255).all()
    assert (panel[:10, width:] == 20).all() and (panel[10:height, width:] == 255).all()
    assert (panel[height:, :30] == 30).all() and (panel[height:, 30:] == 255).all()
    assert picture_panel(tmp_path, count=1).shape == (20, 30, 3)


def test_panels_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match='holds no pictures'):
        picture_panel(tmp_path)
    for options in (dict(count=0), dict(columns=-1)):
        with pytest.raises(ValueError, match='must be positive, got'):
            picture_panel(tmp_path, **options)
    (tmp_path / 'x.png').write_text('no picture')
    with pytest.raises(ValueError, match=r'x\.png is no picture'):
        picture_panel(tmp_path)


def test_tool(work_dir):
    draw(work_dir / 'pictures', 'a.png', 20, 30, 10)
    argv = [sys.executable, str(TOOL), str(work_dir)]
    subprocess.run([*argv, '--pictures', str(work_dir / 'pictures')], check=True)
    assert cv2.imread(str(work_dir / 'training.png')).shape[2] == 3
    assert cv2.imread(str(work_dir / 'predictions.png')).shape == (20, 30, 3)
    options = [
        *argv,
        '--pictures',
        str(work_dir / 'none'),
        '--out',
        str(work_dir / 'o'),
    ]
    failed = subprocess.run(options, capture_output=True, text=True)
    assert failed.returncode == 2 and 'holds no pictures' in failed.stderr
    assert not (work_dir / 'o').exists()
