import importlib.util
import json
from pathlib import Path

import cv2
import numpy as np
import pytest

CLI = Path(__file__).parents[2] / 'tools/dataset_converters/voc2coco.py'

OBJECT = """
  <object>
    <name>{name}</name>
    {difficult}
    <bndbox><xmin>{0}</xmin><ymin>{1}</ymin><xmax>{2}</xmax><ymax>{3}</ymax></bndbox>
    <part><name>head</name>
      <bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox>
    </part>
  </object>"""


def obj(name, *box, difficult='<difficult>0</difficult>'):
    return OBJECT.format(*box, name=name, difficult=difficult)


def write_image(root, name, objects=(), size=(20, 12), suffix='.jpg'):
    width, height = size
    for folder in ('Annotations', 'ImageSets/Main', 'JPEGImages'):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / 'Annotations' / f'{name}.xml').write_text(
        f'<annotation><size><width>{width}</width><height>{height}</height></size>'
        f'{"".join(objects)}</annotation>'
    )
    picture = np.full((12, 20, 3), 90, np.uint8)
    (root / 'JPEGImages' / f'{name}{suffix}').write_bytes(
        cv2.imencode(suffix, picture)[1].tobytes()
    )


def write_split(root, split, *lines):
    text = ''.join(f'{line}\n' for line in lines)
    (root / 'ImageSets/Main' / f'{split}.txt').write_text(text)


@pytest.fixture(scope='module')
def cli():
    spec = importlib.util.spec_from_file_location('voc2coco', CLI)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def voc(tmp_path):
    root = tmp_path / 'voc'
    write_image(
        root,
        'a',
        [
            obj('dog', 1, 2, 11, 8),
            obj('cat', 3, 3, 5, 9, difficult='<difficult>1</difficult>'),
        ],
    )
    write_image(root, 'b', [obj('ape', '4.7', 1, 20, 12, difficult='')], suffix='.png')
    write_image(root, 'c')
    write_split(root, 'train', 'a', 'c  -1', '')
    write_split(root, 'val', 'b')
    return root


@pytest.fixture
def run(cli, voc, tmp_path):
    def run(*argv):
        return cli.main([str(voc), '--out-dir', str(tmp_path / 'out'), *argv])

    return run


def load(tmp_path, split):
    return json.loads((tmp_path / 'out' / f'{split}.json').read_text())


def test_converts_all_splits_with_sorted_classes(run, tmp_path, capsys):
    assert run() == 0
    assert 'classes: ape, cat, dog' in capsys.readouterr().out
    assert {p.name for p in (tmp_path / 'out').iterdir()} == {'train.json', 'val.json'}
    train, val = load(tmp_path, 'train'), load(tmp_path, 'val')
    names = [(c['id'], c['name']) for c in train['categories']]
    assert names == [(1, 'ape'), (2, 'cat'), (3, 'dog')]
    assert val['categories'] == train['categories']
    assert train['images'] == [
        {'id': 1, 'file_name': 'a.jpg', 'width': 20, 'height': 12},
        {'id': 2, 'file_name': 'c.jpg', 'width': 20, 'height': 12},
    ]
    assert val['images'][0]['file_name'] == 'b.png'


def test_boxes_count_from_zero_and_difficult_ones_are_crowds(run, tmp_path):
    assert run() == 0
    dog, cat = load(tmp_path, 'train')['annotations']
    assert dog == {
        'id': 1,
        'image_id': 1,
        'category_id': 3,
        'bbox': [0, 1, 10, 6],
        'area': 60,
        'segmentation': [[0, 1, 0, 7, 10, 7, 10, 1]],
        'iscrowd': 0,
        'ignore': 0,
    }
    assert (cat['iscrowd'], cat['ignore'], cat['bbox']) == (1, 0, [2, 2, 2, 6])
    (ape,) = load(tmp_path, 'val')['annotations']
    assert (ape['iscrowd'], ape['bbox']) == (0, [3, 0, 16, 11])


def test_class_order_is_the_one_given(run, tmp_path):
    assert run('--classes', 'dog', 'cat', 'ape', 'bee') == 0
    names = [c['name'] for c in load(tmp_path, 'train')['categories']]
    assert names == ['dog', 'cat', 'ape', 'bee']
    assert load(tmp_path, 'train')['annotations'][0]['category_id'] == 1


def test_only_the_splits_asked_for(run, tmp_path):
    assert run('--splits', 'val') == 0
    assert [p.name for p in (tmp_path / 'out').iterdir()] == ['val.json']
    assert [c['name'] for c in load(tmp_path, 'val')['categories']] == ['ape']


def test_second_run_gives_the_same_bytes(run, tmp_path):
    assert run() == 0
    before = (tmp_path / 'out' / 'train.json').read_bytes()
    assert run() == 0
    assert (tmp_path / 'out' / 'train.json').read_bytes() == before


@pytest.mark.parametrize(
    'box', [(5, 5, 5, 5), (5, 2, 5, 9), (9, 2, 5, 9), (30, 1, 40, 9)]
)
def test_boxes_without_area_are_dropped_with_a_message(run, voc, tmp_path, capsys, box):
    write_image(voc, 'a', [obj('dog', *box), obj('dog', 1, 1, 3, 3)])
    write_split(voc, 'trainval', 'a', 'b')
    assert run('--splits', 'train', 'trainval') == 0
    errors = capsys.readouterr().err
    corners = ' '.join(map(str, box))
    assert errors.count('a.xml: box without area dropped: dog') == 1
    assert f'xmin ymin xmax ymax = {corners}' in errors
    (annotation,) = load(tmp_path, 'train')['annotations']
    assert annotation['bbox'] == [0, 0, 2, 2]


def test_boxes_are_clipped_to_the_image(run, voc, tmp_path):
    write_image(voc, 'a', [obj('dog', 0, -3, 40, 13)])
    assert run() == 0
    (annotation,) = load(tmp_path, 'train')['annotations']
    assert annotation['bbox'] == [0, 0, 20, 12]
    assert annotation['area'] == 240


def test_loads_in_pycocotools_and_mmdet(run, voc, tmp_path):
    coco_api = pytest.importorskip('pycocotools.coco')
    assert run() == 0
    coco = coco_api.COCO(tmp_path / 'out/train.json')
    for annotation in coco.anns.values():
        assert coco.annToMask(annotation).sum() == annotation['area']

    pytest.importorskip('mmdet')
    from mmdet.datasets import CocoDataset

    data = CocoDataset(
        ann_file=str(tmp_path / 'out/train.json'),
        data_prefix=dict(img=str(voc / 'JPEGImages')),
        metainfo=dict(classes=('cat', 'dog')),
    )
    info = data.get_data_info(0)
    assert Path(info['img_path']).is_file()
    flags = {i['bbox_label']: i['ignore_flag'] for i in info['instances']}
    assert flags == {1: 0, 0: 1}


@pytest.mark.parametrize('suffix', ['.tif', '.webp', '.Jpg', '.JPEG', '.PNG'])
def test_images_of_many_kinds(run, voc, tmp_path, suffix):
    write_image(voc, 'd.1 [x]', [obj('dog', 1, 2, 11, 8)], suffix=suffix)
    (voc / 'JPEGImages/d.1 [x].1.jpg').touch()
    (voc / 'JPEGImages/d.1 [x].txt').touch()
    write_split(voc, 'train', 'd.1 [x]')
    assert run() == 0
    (image,) = load(tmp_path, 'train')['images']
    assert image['file_name'] == f'd.1 [x]{suffix}'


def test_names_with_spaces(run, voc, tmp_path):
    for name in ('my photo', 'photo 1', 'photo'):
        write_image(voc, name)
    write_split(voc, 'train', 'my photo', 'photo 1', ' photo  1')
    write_split(voc, 'val', 'my photo -1')
    assert run('--classes', 'dog') == 0
    names = [image['file_name'] for image in load(tmp_path, 'train')['images']]
    assert names == ['my photo.jpg', 'photo 1.jpg', 'photo.jpg']
    assert load(tmp_path, 'val')['images'][0]['file_name'] == 'my photo.jpg'


@pytest.mark.parametrize('encoding', ['utf-8-sig', 'utf-16'])
def test_splits_with_byte_order_marks(run, voc, tmp_path, encoding):
    (voc / 'ImageSets/Main/train.txt').write_text('a\nc\n', encoding=encoding)
    assert run() == 0
    assert load(tmp_path, 'train')['images'][0]['file_name'] == 'a.jpg'


@pytest.mark.parametrize('encoding', ['utf-8-sig', 'utf-16', 'gb2312', 'latin-1'])
def test_annotations_in_other_encodings(run, voc, tmp_path, encoding):
    word = 'perro' if encoding == 'latin-1' else '狗'
    declared = '' if encoding == 'utf-8-sig' else f' encoding="{encoding}"'
    text = obj(word, 1, 2, 11, 8)
    text = f'<?xml version="1.0"{declared}?><annotation>{text}</annotation>'
    (voc / 'Annotations/a.xml').write_text(text, encoding=encoding)
    assert run() == 0
    assert word in [c['name'] for c in load(tmp_path, 'train')['categories']]


def test_without_a_size_the_image_says_it(run, voc, tmp_path):
    (voc / 'Annotations/c.xml').write_text('<annotation/>')
    assert run() == 0
    image = load(tmp_path, 'train')['images'][1]
    assert (image['width'], image['height']) == (20, 12)


def test_no_objects_but_named_classes(run, voc, tmp_path):
    lose_all_objects(voc)
    assert run('--classes', 'dog') == 0
    assert load(tmp_path, 'train')['annotations'] == []


def test_bad_files_can_be_skipped(run, voc, tmp_path, capsys):
    break_xml(voc)
    write_split(voc, 'train', 'a', 'c', 'gone')
    assert run('--skip-bad') == 0
    assert [i['file_name'] for i in load(tmp_path, 'train')['images']] == ['a.jpg']
    errors = capsys.readouterr().err
    assert 'skipped: ' in errors
    assert 'Annotations/c.xml: broken XML' in errors
    assert 'Annotations/gone.xml: no such annotation file' in errors


def test_nothing_is_left_to_convert(run, voc, tmp_path, capsys):
    write_split(voc, 'train', 'gone')
    assert run('--skip-bad') == 2
    assert 'every image of train was skipped' in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()


# What is refused, and with which words


def break_xml(root):
    (root / 'Annotations/c.xml').write_text('<annotation><size>')


def lose_xml(root):
    (root / 'Annotations/c.xml').unlink()


def lose_image(root):
    (root / 'JPEGImages/c.jpg').unlink()


def break_image(root):
    (root / 'JPEGImages/c.jpg').write_bytes(b'no picture')


def lie_about_the_size(root):
    write_image(root, 'c', size=(12, 20))


def lose_the_width(root):
    (root / 'Annotations/c.xml').write_text('<annotation><size/></annotation>')


def write_an_encoding_that_is_none(root):
    text = '<?xml version="1.0" encoding="klingon"?><annotation/>'
    (root / 'Annotations/c.xml').write_text(text)


def write_other_bytes_than_declared(root):
    text = '<?xml version="1.0" encoding="ascii"?><annotation>\xe9</annotation>'
    (root / 'Annotations/c.xml').write_text(text, encoding='latin-1')


def write_a_split_in_latin_1(root):
    (root / 'ImageSets/Main/val.txt').write_text('b\xe9\n', encoding='latin-1')


def lead_out(root):
    write_split(root, 'val', '../b')


def lead_out_by_a_root(root):
    write_split(root, 'val', '/b')


def lose_all_objects(root):
    for path in (root / 'Annotations').iterdir():
        path.write_text('<annotation/>')


def write_a_word_for_a_number(root):
    write_image(root, 'c', [obj('dog', 1, 'two', 3, 4)])


def write_infinity(root):
    write_image(root, 'c', [obj('dog', 1, 'inf', 3, 4)])


def lose_the_name(root):
    write_image(root, 'c', [obj(' ', 1, 2, 3, 4)])


def write_odd_difficulty(root):
    write_image(
        root, 'c', [obj('dog', 1, 2, 3, 4, difficult='<difficult>x</difficult>')]
    )


def lose_all_splits(root):
    for path in (root / 'ImageSets/Main').iterdir():
        path.unlink()


def empty_a_split(root):
    write_split(root, 'val', '', ' ')


def name_an_image_twice(root):
    write_split(root, 'val', 'b', 'b')


def lose_the_images(root):
    (root / 'JPEGImages').rename(root / 'jpegs')


@pytest.mark.parametrize(
    ('damage', 'message'),
    [
        (break_xml, 'Annotations/c.xml: broken XML'),
        (lose_xml, 'Annotations/c.xml: no such annotation file'),
        (lose_image, 'JPEGImages/c.jpg: no such image'),
        (break_image, 'JPEGImages/c.jpg: not an image'),
        (lie_about_the_size, 'c.xml: says 12x20, but'),
        (lose_the_width, 'c.xml: <size/width> is missing or empty'),
        (write_an_encoding_that_is_none, 'c.xml: broken XML: unknown encoding'),
        (write_other_bytes_than_declared, "c.xml: broken XML: 'ascii' codec"),
        (write_a_split_in_latin_1, 'Main/val.txt: is not UTF-8'),
        (lead_out, 'Main/val.txt: ../b leads out of the data set'),
        (lead_out_by_a_root, 'Main/val.txt: /b leads out of the data set'),
        (lose_all_objects, 'no object in train, val that would give the classes'),
        (write_a_word_for_a_number, "c.xml: <bndbox/ymin> is no number: 'two'"),
        (write_infinity, "c.xml: <bndbox/ymin> is no number: 'inf'"),
        (lose_the_name, 'c.xml: <name> is missing or empty in <object>'),
        (write_odd_difficulty, "c.xml: <difficult> must be 0 or 1, got 'x'"),
        (lose_all_splits, 'ImageSets/Main: none of train, val, test'),
        (empty_a_split, 'val.txt: the split is empty'),
        (name_an_image_twice, 'val.txt: b is there twice'),
        (lose_the_images, 'JPEGImages: no such folder'),
    ],
)
def test_damaged_datasets_are_refused(run, voc, tmp_path, capsys, damage, message):
    damage(voc)
    assert run() == 2
    errors = capsys.readouterr().err
    line = next(x for x in errors.splitlines() if x.startswith('voc2coco: error: '))
    assert message in line
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        (
            ['--classes', 'dog', 'ape'],
            "a.xml: unknown class 'cat', not one of dog, ape",
        ),
        (['--classes', 'dog', 'dog'], 'classes must be different names'),
        (['--splits', 'train', 'test'], 'Main/test.txt: no such split file'),
    ],
)
def test_bad_arguments_are_refused(run, tmp_path, capsys, argv, message):
    assert run(*argv) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()


def test_convert_raises_errors_of_the_right_type(cli, voc):
    splits = cli.find_splits(voc)
    lose_xml(voc)
    with pytest.raises(FileNotFoundError, match=r'c\.xml'):
        cli.convert(voc, splits)
    break_xml(voc)
    with pytest.raises(ValueError, match=r'c\.xml'):
        cli.convert(voc, splits)
    with pytest.raises(ValueError, match='classes'):
        cli.convert(voc, splits, [])
