"""tools/infer.py on images, a folder, a video and large images by windows."""

import importlib.util
import json
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmdet.apis import DetInferencer
from mmdet.registry import MODELS
from mmengine.config import Config

from deform_gqa.engine.detector_files import find_config, load_weights

ROOT = Path(__file__).parents[2]
FOLDER = Path(__file__).parent
CONFIG = FOLDER / 'tiny_dat.py'


@pytest.fixture(scope='module')
def tool():
    spec = importlib.util.spec_from_file_location('infer', ROOT / 'tools' / 'infer.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """A checkpoint, a folder of two images, one of none, a video."""
    folder = tmp_path_factory.mktemp('infer')
    torch.manual_seed(0)
    for name in ('tiny_dat', 'tiny_retinanet'):
        model = MODELS.build(Config.fromfile(FOLDER / f'{name}.py').model)
        meta = dict(dataset_meta=dict(classes=tuple('abcdef')))
        file = folder / f'{name}.pth'
        torch.save(dict(state_dict=model.state_dict(), meta=meta), file)
    (folder / 'images').mkdir()
    (folder / 'empty').mkdir()
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 255, (3, 48, 80, 3), dtype=np.uint8)
    for name, frame in zip(('a.png', 'b.jpg'), frames, strict=False):
        cv2.imwrite(str(folder / 'images' / name), frame)
    code, size = cv2.VideoWriter_fourcc(*'MJPG'), (80, 48)
    writer = cv2.VideoWriter(str(folder / 'film.avi'), code, 5, size)
    for frame in frames:
        writer.write(frame)
    writer.release()
    return folder


def run(tool, monkeypatch, files, source, *options, config=CONFIG, weights='tiny_dat'):
    argv = ['infer.py', config, files / f'{weights}.pth', source, *options]
    monkeypatch.setattr(sys, 'argv', [str(arg) for arg in argv])
    tool.main()


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder(tool, files, monkeypatch, tmp_path):
    run(tool, monkeypatch, files, files / 'images', '--out', tmp_path)
    assert names(tmp_path / 'vis') == ['a.png', 'b.jpg']
    assert names(tmp_path / 'preds') == ['a.json', 'b.json']
    found = json.loads((tmp_path / 'preds' / 'a.json').read_text())
    assert len(found['bboxes']) == len(found['scores']) == len(found['labels']) == 3
    assert cv2.imread(str(tmp_path / 'vis' / 'a.png')).shape == (48, 80, 3)


def test_an_image_by_windows(tool, files, monkeypatch, tmp_path):
    """Windows as large as the image find what the image as a whole shows."""
    image = files / 'images' / 'a.png'
    found = {}
    for side in (80, 79, 32):
        out = tmp_path / str(side)
        options = ('--slice-size', side, '--slice-iou', '0.9', '--out', out)
        run(tool, monkeypatch, files, image, *options)
        found[side] = json.loads((out / 'preds' / 'a.json').read_text())
    whole = tmp_path / 'whole'
    run(tool, monkeypatch, files, image, '--out', whole)
    assert found[80] == json.loads((whole / 'preds' / 'a.json').read_text())
    assert len(found[32]['scores']) > 3  # three at most of each window
    boxes = np.array(found[32]['bboxes'])
    assert boxes[:, 2].max() > 64  # in pixels of the image, not of a window
    assert (boxes <= [80, 48, 80, 48]).all()


def test_det_inferencer_by_path_writes_the_same(tool, files, monkeypatch, tmp_path):
    run(tool, monkeypatch, files, files / 'images', '--out', tmp_path / 'ours')
    inferencer = DetInferencer(str(CONFIG), str(files / 'tiny_dat.pth'), device='cpu')
    theirs = tmp_path / 'theirs'
    inferencer(str(files / 'images'), out_dir=str(theirs), no_save_pred=False)
    for folder in ('vis', 'preds'):
        assert names(theirs / folder) == names(tmp_path / 'ours' / folder)
        for file in (theirs / folder).iterdir():
            ours = tmp_path / 'ours' / folder / file.name
            assert ours.read_bytes() == file.read_bytes()


def test_bad_images_among_good_ones(tool, files, monkeypatch, tmp_path, capsys):
    folder = tmp_path / 'mixed'
    folder.mkdir()
    (folder / 'a.jpg').write_text('no image')
    good = (files / 'images' / 'a.png').read_bytes()
    for name in ('b.png', 'c.png'):
        (folder / name).write_bytes(good)
    (folder / 'c.jpg').write_bytes((files / 'images' / 'b.jpg').read_bytes())
    with pytest.raises(SystemExit) as error:
        run(tool, monkeypatch, files, folder, '--out', tmp_path / 'out')
    assert error.value.code == 1
    out, err = capsys.readouterr()
    assert f'skipped: {folder / "a.jpg"} is not an image that can be read' in out
    assert '1 of 4 images were skipped' in err
    assert names(tmp_path / 'out' / 'preds') == ['b.json', 'c.jpg.json', 'c.png.json']


def test_a_video(tool, files, monkeypatch, tmp_path, capsys):
    run(tool, monkeypatch, files, files / 'film.avi', '--out', tmp_path)
    lines = (tmp_path / 'film.jsonl').read_text().splitlines()
    assert len(lines) == 3
    assert set(json.loads(lines[0])) == {'bboxes', 'labels', 'scores'}
    written = cv2.VideoCapture(str(tmp_path / 'film.mp4'))
    assert written.get(cv2.CAP_PROP_FRAME_COUNT) == 3
    assert written.get(cv2.CAP_PROP_FPS) == 5
    assert 'written: 3 frames' in capsys.readouterr().out


def test_a_webcam_that_is_shown(tool, files, monkeypatch, tmp_path):
    """A file stands for the webcam, and a key ends it after two frames."""
    film, capture = str(files / 'film.avi'), cv2.VideoCapture
    shown = []
    monkeypatch.setattr(cv2, 'VideoCapture', lambda source: capture(film))
    monkeypatch.setattr(cv2, 'imshow', lambda name, frame: shown.append(name))
    monkeypatch.setattr(cv2, 'waitKey', lambda ms: ord('q') if len(shown) == 2 else -1)
    run(tool, monkeypatch, files, '0', '--show', '--out', tmp_path)
    assert shown == ['webcam0'] * 2
    assert len((tmp_path / 'webcam0.jsonl').read_text().splitlines()) == 2


def test_an_interruption_keeps_what_is_written(tool, files, monkeypatch, tmp_path):
    def interrupt(ms):
        raise KeyboardInterrupt

    monkeypatch.setattr(cv2, 'imshow', lambda name, frame: None)
    monkeypatch.setattr(cv2, 'waitKey', interrupt)
    run(tool, monkeypatch, files, files / 'film.avi', '--show', '--out', tmp_path)
    assert len((tmp_path / 'film.jsonl').read_text().splitlines()) == 1


def test_max_frames(tool, files, monkeypatch, tmp_path, capsys):
    options = ('--max-frames', 1, '--out', tmp_path)
    run(tool, monkeypatch, files, files / 'film.avi', *options)
    assert 'written: 1 frames' in capsys.readouterr().out


def test_a_video_without_frames(tool, files, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tool, '_frames', lambda capture, most: iter(()))
    with pytest.raises(SystemExit):
        run(tool, monkeypatch, files, files / 'film.avi', '--out', tmp_path)
    assert 'holds no frame that can be read' in capsys.readouterr().err


def test_a_video_that_cannot_be_written(tool, files, monkeypatch, tmp_path):
    monkeypatch.setattr(cv2.VideoWriter, 'isOpened', lambda self: False, raising=False)
    capture = cv2.VideoCapture(str(files / 'film.avi'))
    with pytest.raises(ValueError, match=r"video '.*none.mp4' cannot be written"):
        tool._open_writer(
            tmp_path / 'folder' / 'none.mp4', capture, np.zeros((4, 4, 3), np.uint8)
        )


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(source='none.jpg'), "image, folder or video 'none.jpg' not found"),
        (dict(source=CONFIG), 'is not an image that can be read'),
        (dict(source='empty'), 'holds no images (.jpg, '),
        (dict(source='bad.mp4'), "video '"),
        (dict(source='97'), 'webcam 97 cannot be opened'),
        (dict(weights='none'), "none.pth' does not exist"),
        (dict(weights='tiny_retinanet'), 'is of another model than the config'),
        (dict(config='dat_mini'), "config 'dat_mini' is neither a file nor the name"),
        (dict(options=['--slice-size', '0']), 'side must be at least 1, got 0'),
        (dict(options=['--slice-iou', '2']), '--slice-iou must be in (0, 1], got 2'),
        (dict(options=['--batch-size', '0']), '--batch-size must be at least 1, got 0'),
        (dict(options=['--max-frames', '0']), '--max-frames must be at least 1, got 0'),
    ],
)
def test_bad_input(tool, files, monkeypatch, tmp_path, capsys, change, message):
    (files / 'bad.mp4').write_text('no video')
    source = change.get('source', files / 'images')
    source = files / source if source in ('empty', 'bad.mp4') else source
    options = ('--out', tmp_path / 'out', *change.get('options', []))
    change = {k: v for k, v in change.items() if k in ('config', 'weights')}
    with pytest.raises(SystemExit) as error:
        run(tool, monkeypatch, files, source, *options, **change)
    assert error.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()


def test_configs_by_name():
    name = 'retinanet_dat-gqa-mini_fpn_shapes'
    for given in (name, f'{name}.py', f'{ROOT}/configs/quickstart/{name}.py'):
        assert find_config(given).model.backbone.type == 'DAT'
    config = find_config('mmdet::retinanet/retinanet_r50_fpn_1x_coco.py')
    assert config.model.backbone.type == 'ResNet'
    with pytest.raises(ValueError, match=f'close to it: .*{name}'):
        find_config(name.replace('mini', 'min'))


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(removed='weight'), r'1 are missing in the checkpoint \(weight\)'),
        (dict(extra='head.bias'), r'1 are unknown to the config \(head.bias\)'),
        (dict(shape=(5, 5)), r'1 have another shape \(size mismatch for weight'),
    ],
)
def test_weights_of_another_model(change, message, tmp_path):
    state = torch.nn.Linear(3, 2).state_dict()
    state.pop(change.get('removed'), None)
    if 'extra' in change:
        state[change['extra']] = torch.zeros(1)
    if 'shape' in change:
        state['weight'] = torch.zeros(change['shape'])
    file = tmp_path / 'other.pth'
    torch.save(dict(state_dict=state), file)
    with pytest.raises(ValueError, match=message) as error:
        load_weights(torch.nn.Linear(3, 2), file)
    assert "other.pth' is of another model" in str(error.value)


def test_weights_that_fit():
    source, target = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    state = {f'module.{key}': value for key, value in source.state_dict().items()}
    state['module.attn_mask'] = state['data_preprocessor.mean'] = torch.zeros(1)
    load_weights(target, dict(state_dict=state))
    assert torch.equal(source.weight, target.weight)
