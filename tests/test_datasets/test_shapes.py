import importlib.util
import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest

from deform_gqa.datasets import shapes, shapes_drawing
from deform_gqa.datasets.shapes import generate_dataset, sample_annotations
from deform_gqa.datasets.shapes_config import CLASSES, ShapesConfig
from deform_gqa.datasets.shapes_drawing import (
    make_sample,
    render_background,
    shape_polygon,
)

CLI = Path(__file__).parents[2] / 'tools/dataset_converters/make_shapes.py'
SMALL = ShapesConfig(num_train=3, num_val=2, num_test=1, image_size=(96, 64), seed=5)


def files_of(folder):
    paths = (p for p in sorted(folder.rglob('*')) if p.is_file())
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in paths}


@pytest.fixture(scope='module')
def cli():
    spec = importlib.util.spec_from_file_location('make_shapes', CLI)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope='module')
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp('shapes') / 'data'
    assert generate_dataset(SMALL, folder)
    return folder


# Outlines and images


@pytest.mark.parametrize('name', CLASSES)
def test_outline_has_area_one_around_the_origin(name):
    points = shape_polygon(name)
    area = cv2.contourArea(points.astype(np.float32))
    assert area == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(points.max(axis=0) + points.min(axis=0), 0, atol=1e-12)


def test_outlines_of_unknown_classes_are_refused():
    with pytest.raises(ValueError, match=r"name .*'ring'"):
        shape_polygon('ring')


@pytest.mark.parametrize('name', CLASSES)
def test_rasterised_area_is_the_area_asked_for(name):
    polygon = shape_polygon(name) * 50 + (7.3, -4.8)
    mask = shapes_drawing._rasterise(polygon).mask
    # fillPoly also fills the pixels that the outline only touches.
    assert 2500 <= mask.sum() <= 2500 * 1.1
    for border in (mask[0], mask[-1], mask[:, 0], mask[:, -1]):
        assert not border.any()


def test_background_has_texture():
    rng = np.random.default_rng(0)
    picture = render_background(rng, 40, 30, np.array([10.0, 100.0, 200.0]))
    assert picture.shape == (30, 40, 3)
    assert picture.dtype == np.float32
    assert picture.std(axis=(0, 1)).min() > 1


@pytest.mark.parametrize('size', [(192, 192), (96, 64), (33, 200), (32, 32)])
def test_sample(size):
    config = ShapesConfig(image_size=size, min_visible=0.4)
    for index in range(10):
        sample = make_sample(config, 'train', index)
        assert sample.image.shape == (size[1], size[0], 3)
        assert sample.image.dtype == np.uint8
        assert sample.id_map.shape == (size[1], size[0])
        visible = np.bincount(sample.id_map.ravel(), minlength=len(sample.areas) + 1)
        # Every pixel belongs to the background or to a shape with an annotation.
        assert len(visible) == len(sample.labels) + 1 == len(sample.areas) + 1
        assert 1 <= len(sample.labels) <= config.max_objects
        assert np.all(visible[1:] >= 0.4 * np.array(sample.areas))
        assert np.all(visible[1:] <= sample.areas)


def test_shapes_that_find_no_place_are_left_out():
    config = ShapesConfig(
        image_size=(64, 64), min_objects=40, max_objects=40, min_visible=1.0
    )
    sample = make_sample(config, 'train', 0)
    assert 1 <= len(sample.labels) < 40
    assert np.bincount(sample.id_map.ravel())[1:].tolist() == sample.areas


def test_images_may_be_empty():
    config = ShapesConfig(image_size=(32, 32), min_objects=0, max_objects=1)
    counts = [len(make_sample(config, 'train', i).labels) for i in range(20)]
    assert set(counts) == {0, 1}


def test_annotations_describe_the_visible_part():
    mask_api = pytest.importorskip('pycocotools.mask')
    config = ShapesConfig(image_size=(150, 120), min_objects=6, seed=1)
    occluded = 0
    for index in range(12):
        sample = make_sample(config, 'val', index)
        for i, record in enumerate(sample_annotations(sample)):
            visible = sample.id_map == i + 1
            codes = mask_api.frPyObjects(record['segmentation'], 120, 150)
            np.testing.assert_array_equal(
                mask_api.decode(mask_api.merge(codes)), visible
            )
            rows, columns = np.nonzero(visible)
            x, y, width, height = record['bbox']
            assert (x, y) == (columns.min(), rows.min())
            assert (x + width, y + height) == (columns.max() + 1, rows.max() + 1)
            assert record['area'] == visible.sum()
            assert record['category_id'] == sample.labels[i] + 1
            assert record['iscrowd'] == 0
            occluded += visible.sum() < sample.areas[i]
    assert occluded > 5


def test_default_images_have_all_sizes_and_classes():
    config = ShapesConfig()
    areas, labels = [], []
    for index in range(80):
        sample = make_sample(config, 'train', index)
        areas += np.bincount(sample.id_map.ravel())[1:].tolist()
        labels += sample.labels
    areas = np.array(areas)
    assert np.mean(areas < 32**2) > 0.25
    assert np.mean((areas >= 32**2) & (areas <= 96**2)) > 0.25
    assert np.mean(areas > 96**2) > 0.04
    assert np.bincount(labels, minlength=len(CLASSES)).min() > len(labels) / 12


def test_colour_does_not_tell_the_class():
    config = ShapesConfig()
    means = {label: [] for label in range(len(CLASSES))}
    for index in range(150):
        sample = make_sample(config, 'train', index)
        for i, label in enumerate(sample.labels):
            means[label].append(sample.image[sample.id_map == i + 1].mean(axis=0))
    for colours in means.values():
        # About the same mean and a wide spread in every channel for every class.
        assert np.all(np.abs(np.mean(colours, axis=0) - 127) < 30)
        assert np.all(np.std(colours, axis=0) > 50)


@pytest.mark.parametrize(
    ('split', 'index', 'error', 'message'),
    [
        ('rest', 0, ValueError, "split .*'rest'"),
        ('train', -1, ValueError, 'index .*-1'),
        ('train', 1.5, TypeError, 'index .*1.5'),
        ('train', False, TypeError, 'index .*False'),
    ],
)
def test_sample_refuses(split, index, error, message):
    with pytest.raises(error, match=message):
        make_sample(SMALL, split, index)


# Reproducibility


def test_same_seed_same_bytes(dataset, tmp_path):
    generate_dataset(SMALL, tmp_path / 'again')
    assert files_of(tmp_path / 'again') == files_of(dataset)


def test_bytes_do_not_depend_on_workers(dataset, tmp_path):
    generate_dataset(SMALL, tmp_path / 'parallel', workers=2)
    assert files_of(tmp_path / 'parallel') == files_of(dataset)


def test_images_do_not_depend_on_counts(dataset, tmp_path):
    config = ShapesConfig(
        num_train=0, num_val=1, num_test=0, image_size=(96, 64), seed=5
    )
    generate_dataset(config, tmp_path / 'one')
    name = 'images/val/000000.jpg'
    assert files_of(tmp_path / 'one')[name] == files_of(dataset)[name]


def test_seeds_and_splits_differ():
    images = [
        make_sample(ShapesConfig(seed=seed), split, index).image
        for seed in (0, 1)
        for split in ('train', 'val')
        for index in (0, 1)
    ]
    assert len({image.tobytes() for image in images}) == len(images)


def test_numpy_numbers_are_taken(tmp_path):
    config = ShapesConfig(
        num_train=np.int64(1),
        num_val=0,
        num_test=0,
        image_size=[np.int32(40), 40],
        min_visible=np.float32(0.5),
    )
    assert generate_dataset(config, tmp_path / 'a')


# Files


def test_dataset_loads_in_pycocotools(dataset):
    coco_api = pytest.importorskip('pycocotools.coco')
    for split, count in (('train', 3), ('val', 2)):
        coco = coco_api.COCO(dataset / 'annotations' / f'{split}.json')
        assert len(coco.imgs) == count
        assert [c['name'] for c in coco.loadCats(coco.getCatIds())] == list(CLASSES)
        for index, image in enumerate(coco.imgs.values()):
            picture = cv2.imread(str(dataset / 'images' / split / image['file_name']))
            assert picture.shape == (image['height'], image['width'], 3) == (64, 96, 3)
            id_map = make_sample(SMALL, split, index).id_map
            records = coco.imgToAnns[image['id']]
            assert len(records) == id_map.max()
            for i, record in enumerate(records):
                np.testing.assert_array_equal(coco.annToMask(record), id_map == i + 1)


def test_dataset_loads_in_mmdet(dataset):
    pytest.importorskip('mmdet')
    from mmdet.datasets import CocoDataset

    data = CocoDataset(
        ann_file='annotations/train.json',
        data_root=str(dataset),
        data_prefix=dict(img='images/train/'),
        metainfo=dict(classes=CLASSES),
    )
    assert len(data) == 3
    for index in range(3):
        info = data.get_data_info(index)
        assert Path(info['img_path']).is_file()
        labels = [instance['bbox_label'] for instance in info['instances']]
        assert labels == make_sample(SMALL, 'train', index).labels


def test_second_run_does_nothing(dataset):
    before = files_of(dataset)
    assert not generate_dataset(SMALL, dataset)
    assert files_of(dataset) == before


def test_other_parameters_need_overwrite(tmp_path):
    folder = tmp_path / 'data'
    config = ShapesConfig(num_train=1, num_val=0, num_test=0, image_size=(32, 32))
    other = ShapesConfig(num_train=2, num_val=0, num_test=0, image_size=(32, 32))
    generate_dataset(config, folder)
    before = files_of(folder)
    with pytest.raises(FileExistsError, match=r'num_train 1, wanted 2.*--overwrite'):
        generate_dataset(other, folder)
    assert files_of(folder) == before
    assert generate_dataset(other, folder, overwrite=True)
    assert len(files_of(folder)) == len(before) + 1
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize('lost', ['images/train/000000.jpg', 'annotations/val.json'])
def test_damaged_dataset_is_noticed_and_mended(tmp_path, lost):
    folder = tmp_path / 'data'
    config = ShapesConfig(num_train=1, num_val=0, num_test=0, image_size=(32, 32))
    generate_dataset(config, folder)
    before = files_of(folder)
    (folder / lost).unlink()
    with pytest.raises(FileExistsError, match=rf'{lost} is missing.*--overwrite'):
        generate_dataset(config, folder)
    assert generate_dataset(config, folder, overwrite=True)
    assert files_of(folder) == before


@pytest.mark.parametrize('text', [None, '{', '[]', '{"generator": "other"}'])
def test_foreign_folders_are_never_replaced(tmp_path, text):
    (tmp_path / 'thesis.tex').write_text('mine')
    if text is not None:
        (tmp_path / 'shapes.json').write_text(text)
    before = files_of(tmp_path)
    with pytest.raises(FileExistsError, match='not a shapes dataset'):
        generate_dataset(SMALL, tmp_path, overwrite=True)
    assert files_of(tmp_path) == before


@pytest.mark.parametrize(
    'name', ['notes.txt', 'annotations/rest.json', 'images/train/mine.jpg', 'crops/a']
)
def test_files_beside_a_dataset_are_never_deleted(tmp_path, name):
    folder = tmp_path / 'data'
    generate_dataset(ShapesConfig(1, 0, (32, 32), num_test=0), folder)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text('mine')
    before = files_of(folder)
    with pytest.raises(FileExistsError, match=f'{name} is not of a shapes dataset'):
        generate_dataset(
            ShapesConfig(2, 0, (32, 32), num_test=0), folder, overwrite=True
        )
    assert files_of(folder) == before


def test_empty_folder_is_filled(tmp_path):
    (tmp_path / 'empty').mkdir()
    config = ShapesConfig(num_train=1, num_val=0, num_test=0, image_size=(32, 32))
    assert generate_dataset(config, tmp_path / 'empty')
    assert (tmp_path / 'empty' / 'shapes.json').is_file()
    assert [p.name for p in tmp_path.iterdir()] == ['empty']


@pytest.mark.parametrize('existing', [False, True])
def test_interrupted_run_leaves_what_was_there(tmp_path, existing):
    folder = tmp_path / 'data'
    if existing:
        old = ShapesConfig(num_train=1, num_val=0, num_test=0, image_size=(32, 32))
        generate_dataset(old, folder)
    before = files_of(tmp_path)

    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate_dataset(SMALL, folder, overwrite=True, on_image=interrupt)
    assert files_of(tmp_path) == before
    assert list(tmp_path.iterdir()) == ([folder] if existing else [])


def test_failed_exchange_puts_the_old_dataset_back(tmp_path, monkeypatch):
    folder = tmp_path / 'data'
    generate_dataset(ShapesConfig(1, 0, (32, 32), num_test=0), folder)
    before = files_of(tmp_path)
    rename = Path.rename

    def fail(path, target):
        if '.tmp-' in path.name:
            raise OSError('disk gone')
        return rename(path, target)

    monkeypatch.setattr(Path, 'rename', fail)
    with pytest.raises(OSError, match='disk gone'):
        generate_dataset(
            ShapesConfig(2, 0, (32, 32), num_test=0), folder, overwrite=True
        )
    assert files_of(tmp_path) == before


def test_remains_of_a_killed_run_are_cleared(tmp_path):
    remains = tmp_path / f'.data.tmp-{os.getpid()}'
    remains.mkdir()
    (remains / 'half').write_text('x')
    generate_dataset(ShapesConfig(1, 0, (32, 32), num_test=0), tmp_path / 'data')
    assert [p.name for p in tmp_path.iterdir()] == ['data']
    assert not (tmp_path / 'data' / 'half').exists()


def test_failed_encoding_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(shapes.cv2, 'imencode', lambda *_: (False, None))
    with pytest.raises(OSError, match='image 0 of train'):
        generate_dataset(SMALL, tmp_path / 'data')
    assert not list(tmp_path.iterdir())


# Refusals


@pytest.mark.parametrize(
    ('options', 'error', 'message'),
    [
        (dict(num_train=-1), ValueError, 'num_train .*-1'),
        (dict(num_val=-3), ValueError, 'num_val .*-3'),
        (dict(num_val=2.0), TypeError, 'num_val .*2.0'),
        (dict(num_train=True), TypeError, 'num_train .*True'),
        (dict(num_test=-1), ValueError, 'num_test .*-1'),
        (
            dict(num_train=0, num_val=0, num_test=0),
            ValueError,
            'num_train, num_val, num_test are all 0',
        ),
        (dict(seed=-1), ValueError, 'seed .*-1'),
        (dict(seed='a'), TypeError, "seed .*'a'"),
        (dict(image_size=(31, 64)), ValueError, 'image_size .*31'),
        (dict(image_size=(64, 64.5)), TypeError, 'image_size .*64.5'),
        (dict(image_size=64), TypeError, 'image_size .*64'),
        (dict(image_size=(64, 64, 3)), TypeError, 'image_size .*3'),
        (dict(min_objects=-1), ValueError, 'min_objects .*-1'),
        (dict(max_objects=0), ValueError, 'max_objects .*0'),
        (dict(min_objects=5, max_objects=4), ValueError, 'max_objects .*5.*4'),
        (dict(min_visible=0), ValueError, 'min_visible .*0'),
        (dict(min_visible=1.1), ValueError, 'min_visible .*1.1'),
        (dict(min_visible=float('nan')), ValueError, 'min_visible .*nan'),
        (dict(min_visible='half'), TypeError, "min_visible .*'half'"),
        (dict(min_visible=True), TypeError, 'min_visible .*True'),
        (dict(image_size=(64, True)), TypeError, 'image_size .*True'),
    ],
)
def test_config_refuses(options, error, message):
    with pytest.raises(error, match=message):
        ShapesConfig(**options)


@pytest.mark.parametrize(
    ('workers', 'error'),
    [(0, ValueError), (1.0, TypeError), (True, TypeError)],
    ids=str,
)
def test_workers_are_checked(tmp_path, workers, error):
    with pytest.raises(error, match='workers'):
        generate_dataset(SMALL, tmp_path / 'data', workers=workers)
    assert not list(tmp_path.iterdir())


# Command line


def test_cli(cli, tmp_path, capsys):
    folder = tmp_path / 'deep' / 'data'
    argv = ['--out-dir', str(folder), '--num-train', '2', '--num-val', '1']
    argv += [
        '--num-test',
        '1',
        '--image-size',
        '40',
        '36',
        '--max-objects',
        '3',
        '--seed',
        '9',
    ]
    assert cli.main(argv) == 0
    assert (
        '2 training, 1 validation and 1 test images, 40x36' in capsys.readouterr().out
    )
    recorded = json.loads((folder / 'shapes.json').read_text())
    assert recorded['seed'] == 9
    assert recorded['image_size'] == [40, 36]
    assert recorded['max_objects'] == 3

    before = files_of(folder)
    assert cli.main(argv) == 0
    assert 'already there, nothing to do' in capsys.readouterr().out
    assert cli.main([*argv, '--seed', '10']) == 2
    assert 'seed 9, wanted 10' in capsys.readouterr().err
    assert files_of(folder) == before
    assert cli.main([*argv, '--seed', '10', '--overwrite']) == 0
    assert files_of(folder) != before


def test_cli_takes_one_number_for_square_images(cli):
    config = cli.make_config(cli.parse_args(['--image-size', '48']))
    assert config == ShapesConfig(image_size=(48, 48))


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        (['--num-train', '-1'], 'num_train must be at least 0, got -1'),
        (['--image-size', '8'], 'image_size must be at least 32, got 8'),
        (['--image-size', '40', '40', '3'], '--image-size takes one or two'),
        (['--workers', '0'], 'workers must be at least 1, got 0'),
    ],
)
def test_cli_refuses(cli, tmp_path, capsys, argv, message):
    assert cli.main(['--out-dir', str(tmp_path / 'data'), *argv]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
