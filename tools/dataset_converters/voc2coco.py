"""Convert a Pascal VOC dataset to COCO JSON, one file a split.

Example:
    python tools/dataset_converters/voc2coco.py data/bccd --out-dir data/bccd/coco \
        --classes RBC WBC Platelets

Reads VOC_ROOT/{Annotations,ImageSets/Main,JPEGImages} and writes OUT/{split}.json, in
which ``file_name`` is relative to VOC_ROOT/JPEGImages. Nothing is written before every
split has been read without an error; existing files of that name are replaced.

Coordinates follow MMDetection's own VOC converter: VOC counts pixels from 1, so 1 is
subtracted from all four coordinates, and the width is xmax - xmin. As there, a box
marked ``difficult`` becomes ``iscrowd=1, ignore=0`` (it is ignored in training and
evaluation), and ``segmentation`` is the box's rectangle. Unlike there, ids count from 1
(pycocotools takes the annotation id 0 for "no match") and boxes are clipped to the
image. Boxes without area are dropped, with a message. Where an annotation has no
<size>, the image's own is taken.
"""

import argparse
import codecs
import glob
import re
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from deform_gqa.datasets.coco import coco_categories, write_json

DEFAULT_SPLITS = ('train', 'val', 'test')
IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp')
# The second column of the lists that VOC has for each class.
FLAGS = ('-1', '0', '1')
_SIDES = ('width', 'height')


class VOCObject(NamedTuple):
    """A box: class name, (x1, y1, x2, y2) pixels counted from 0, and its flag."""

    name: str
    box: tuple[int, int, int, int]
    difficult: bool


class VOCImage(NamedTuple):
    """What an annotation file says about an image, and where both lie."""

    xml_path: Path
    image_path: Path
    width: int
    height: int
    objects: list[VOCObject]


class Conversion(NamedTuple):
    """Result: COCO documents by split, class names in order, messages to print."""

    documents: dict[str, dict[str, Any]]
    classes: list[str]
    messages: list[str]


def find_splits(voc_root: Path, splits: Sequence[str] | None = None) -> dict[str, list]:
    """Image names by split; by default of those of train, val and test that exist.

    Raises:
        FileNotFoundError: if a folder or a split's file is missing.
        ValueError: if a split's file is empty or names an image twice.
    """
    folder = voc_root / 'ImageSets' / 'Main'
    for needed in (folder, voc_root / 'Annotations', voc_root / 'JPEGImages'):
        if not needed.is_dir():
            raise FileNotFoundError(f'{needed}: no such folder')
    if splits is None:
        splits = [s for s in DEFAULT_SPLITS if (folder / f'{s}.txt').is_file()]
        if not splits:
            raise FileNotFoundError(
                f'{folder}: none of {", ".join(DEFAULT_SPLITS)} (.txt) is there'
            )
    return {split: _read_names(voc_root, folder / f'{split}.txt') for split in splits}


def read_image(voc_root: Path, name: str) -> VOCImage:
    """Read the annotation of an image and check it against the image.

    Raises:
        FileNotFoundError: if the annotation or the image is missing.
        ValueError: if one of them cannot be read, or they differ in size.
    """
    xml_path = voc_root / 'Annotations' / f'{name}.xml'
    if not xml_path.is_file():
        raise FileNotFoundError(f'{xml_path}: no such annotation file')
    root = _read_xml(xml_path)
    image_path = _find_image(voc_root / 'JPEGImages', name)
    width, height = _pixels(image_path)
    if root.find('size') is not None:
        said = tuple(_number(root, f'size/{side}', xml_path) for side in _SIDES)
        if said != (width, height):
            raise ValueError(
                f'{xml_path}: says {said[0]}x{said[1]}, but {image_path} has '
                f'{width}x{height} pixels'
            )
    objects = [_read_object(element, xml_path) for element in root.findall('object')]
    return VOCImage(xml_path, image_path, width, height, objects)


def convert(
    voc_root: Path,
    splits: dict[str, list],
    classes: Sequence[str] | None = None,
    on_image: Callable[[], None] | None = None,
    skip_bad: bool = False,
) -> Conversion:
    """Convert the splits that ``find_splits`` gave.

    Args:
        voc_root: folder of the VOC dataset.
        splits: image names by split.
        classes: class names in the order of the category ids; by default all names
            that occur in ``splits``, sorted.
        on_image: called after each image, for a progress bar.
        skip_bad: leave out images whose annotation or picture is missing or broken,
            with a message for each, instead of raising.

    Raises:
        FileNotFoundError: if an annotation or an image is missing.
        ValueError: if a file is broken, a class is not in ``classes``, or ``classes``
            is empty or has a name twice; if no image is left in a split; if there is
            no object that would give ``classes``.
    """
    if classes is not None:
        _check_classes(classes)
    images: dict[str, list[VOCImage]] = {}
    documents, messages = {}, {}
    for split, names in splits.items():
        images[split] = []
        for name in names:
            try:
                images[split].append(read_image(voc_root, name))
            except (FileNotFoundError, ValueError) as error:
                if not skip_bad:
                    raise
                messages[f'skipped: {error}'] = None
            if on_image is not None:
                on_image()
        if not images[split]:
            raise ValueError(f'{voc_root}: every image of {split} was skipped')
    if classes is None:
        every = (image for part in images.values() for image in part)
        classes = sorted({item.name for image in every for item in image.objects})
        if not classes:
            raise ValueError(
                f'{voc_root}: there is no object in {", ".join(splits)} that would '
                'give the classes; name them with --classes'
            )
    for split, part in images.items():
        documents[split], new = _coco_document(part, classes, voc_root)
        messages.update(dict.fromkeys(new))  # an image can be in several splits
    return Conversion(documents, list(classes), list(messages))


def _read_names(voc_root: Path, path: Path) -> list[str]:
    """The lines of a split, without the second column of VOC's lists by class."""
    if not path.is_file():
        raise FileNotFoundError(f'{path}: no such split file')
    lines = [line.strip() for line in _read_text(path).splitlines() if line.strip()]
    names = [_name(line, voc_root / 'Annotations') for line in lines]
    if not names:
        raise ValueError(f'{path}: the split is empty')
    if len(set(names)) != len(names):
        double = next(name for name in names if names.count(name) > 1)
        raise ValueError(f'{path}: {double} is there twice')
    for name in names:
        if Path(name).is_absolute() or '..' in Path(name).parts:
            raise ValueError(f'{path}: {name} leads out of the data set')
    return names


def _name(line: str, annotations: Path) -> str:
    """A name may hold spaces, and end like the second column: "photo 1"."""
    name, _, flag = line.rpartition(' ')
    if flag in FLAGS and name and not (annotations / f'{line}.xml').is_file():
        return name.strip()
    return line


def _read_text(path: Path) -> str:
    """A text in UTF-8, or in UTF-16 with a byte-order mark."""
    data = path.read_bytes()
    is_utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return data.decode('utf-16' if is_utf16 else 'utf-8-sig')
    except UnicodeDecodeError as error:
        raise ValueError(f'{path}: is not UTF-8: {error}') from error


def _read_xml(path: Path) -> ET.Element:
    """The root of a document in any encoding that Python knows and the file names."""
    data = path.read_bytes()
    declared = re.match(rb'\s*<\?xml[^>]*encoding=["\']([\w.-]+)["\'][^>]*\?>', data)
    try:
        if declared is not None:  # expat knows few encodings of several bytes
            encoding = declared[1].decode('ascii')
            return ET.fromstring(data[declared.end() :].decode(encoding))
        return ET.fromstring(data)
    except (ET.ParseError, LookupError, UnicodeDecodeError) as error:
        raise ValueError(f'{path}: broken XML: {error}') from error


def _find_image(folder: Path, name: str) -> Path:
    """The image of this name, in the order of the suffixes, whatever their case."""
    for suffix in IMAGE_SUFFIXES:
        for spelling in (suffix, suffix.upper()):
            path = folder / f'{name}{spelling}'
            if path.is_file():
                return path
    for path in sorted(folder.glob(f'{glob.escape(name)}.*')):  # such as .Jpg; slow
        is_named_so = path.name == f'{Path(name).name}{path.suffix}'
        if is_named_so and path.suffix.lower() in IMAGE_SUFFIXES:
            return path
    others = ', '.join(IMAGE_SUFFIXES[1:])
    raise FileNotFoundError(f'{folder / name}.jpg: no such image (nor {others})')


def _pixels(path: Path) -> tuple[int, int]:
    """Width and height of an image, which is read to the end."""
    pixels = cv2.imread(str(path))
    if pixels is None:
        raise ValueError(f'{path}: not an image that OpenCV can read')
    return pixels.shape[1], pixels.shape[0]


def _text(element: ET.Element, tag: str, path: Path) -> str:
    text = element.findtext(tag)
    if text is None or not text.strip():
        raise ValueError(f'{path}: <{tag}> is missing or empty in <{element.tag}>')
    return text.strip()


def _number(element: ET.Element, tag: str, path: Path) -> int:
    text = _text(element, tag, path)
    try:
        return int(float(text))  # some tools write fractions; mmdet cuts them too
    except (ValueError, OverflowError) as error:
        raise ValueError(f'{path}: <{tag}> is no number: {text!r}') from error


def _read_object(element: ET.Element, path: Path) -> VOCObject:
    corners = (
        _number(element, f'bndbox/{tag}', path) - 1
        for tag in ('xmin', 'ymin', 'xmax', 'ymax')
    )
    flag = element.findtext('difficult', '0').strip() or '0'
    if flag not in ('0', '1'):
        raise ValueError(f'{path}: <difficult> must be 0 or 1, got {flag!r}')
    return VOCObject(_text(element, 'name', path), tuple(corners), flag == '1')


def _check_classes(classes: Sequence[str]) -> None:
    if not classes or len(set(classes)) != len(classes):
        raise ValueError(f'classes must be different names, got {list(classes)}')


def _coco_document(
    images: Sequence[VOCImage], classes: Sequence[str], voc_root: Path
) -> tuple[dict[str, Any], list[str]]:
    """The COCO document of a split, and a message for each dropped box."""
    categories = coco_categories(classes)
    ids = {category['name']: category['id'] for category in categories}
    image_records, annotations, messages = [], [], []
    for image_id, image in enumerate(images, start=1):
        file_name = image.image_path.relative_to(voc_root / 'JPEGImages').as_posix()
        image_records.append(
            {
                'id': image_id,
                'file_name': file_name,
                'width': image.width,
                'height': image.height,
            }
        )
        for item in image.objects:
            if item.name not in ids:
                raise ValueError(
                    f'{image.xml_path}: unknown class {item.name!r}, '
                    f'not one of {", ".join(classes)}'
                )
            record = _annotation(item, image)
            if record is None:
                messages.append(_dropped(item, image))
                continue
            record['id'] = len(annotations) + 1
            record['image_id'] = image_id
            record['category_id'] = ids[item.name]
            annotations.append(record)
    document = {
        'images': image_records,
        'annotations': annotations,
        'categories': categories,
    }
    return document, messages


def _annotation(item: VOCObject, image: VOCImage) -> dict[str, Any] | None:
    """COCO record without ids of a box clipped to the image; None without area."""
    x1, x2 = (min(max(x, 0), image.width) for x in item.box[0::2])
    y1, y2 = (min(max(y, 0), image.height) for y in item.box[1::2])
    if x2 <= x1 or y2 <= y1:
        return None
    return {
        'bbox': [x1, y1, x2 - x1, y2 - y1],
        'area': (x2 - x1) * (y2 - y1),
        'segmentation': [[x1, y1, x1, y2, x2, y2, x2, y1]],
        'iscrowd': int(item.difficult),
        'ignore': 0,
    }


def _dropped(item: VOCObject, image: VOCImage) -> str:
    corners = ' '.join(str(value + 1) for value in item.box)
    return (
        f'{image.xml_path}: box without area dropped: {item.name}, '
        f'xmin ymin xmax ymax = {corners}'
    )


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line (``sys.argv`` by default)."""
    parser = argparse.ArgumentParser(
        description='Convert a Pascal VOC dataset to COCO JSON, one file a split.'
    )
    parser.add_argument(
        'voc_root',
        type=Path,
        help='folder that holds Annotations, ImageSets/Main and JPEGImages',
    )
    parser.add_argument(
        '--out-dir', type=Path, required=True, help='folder for the JSON files'
    )
    parser.add_argument(
        '--splits',
        nargs='+',
        help='names of files in ImageSets/Main, without .txt; '
        'default: those of train, val and test that exist',
    )
    parser.add_argument(
        '--classes',
        nargs='+',
        help='class names in the order of their ids; another class is an error. '
        'Default: all that occur in the converted splits, sorted; name them if splits '
        'are converted one by one',
    )
    parser.add_argument(
        '--skip-bad',
        action='store_true',
        help='leave out images whose annotation or picture is missing or broken, and '
        'name them, instead of stopping at the first',
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, or 2 after an error."""
    args = parse_args(argv)
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        splits = find_splits(args.voc_root, args.splits)
        with Progress(
            '{task.description}', *columns, console=Console(stderr=True)
        ) as progress:
            total = sum(len(names) for names in splits.values())
            task = progress.add_task('images', total=total)
            result = convert(
                args.voc_root,
                splits,
                args.classes,
                lambda: progress.advance(task),
                args.skip_bad,
            )
        args.out_dir.mkdir(parents=True, exist_ok=True)
        for split, document in result.documents.items():
            write_json(args.out_dir / f'{split}.json', document)
    except (OSError, ValueError) as error:
        print(f'voc2coco: error: {error}', file=sys.stderr)
        return 2
    for message in result.messages:
        print(message, file=sys.stderr)
    print(f'classes: {", ".join(result.classes)}')
    for split, document in result.documents.items():
        counts = f'{len(document["images"])} images, {len(document["annotations"])}'
        print(f'{args.out_dir / split}.json: {counts} boxes')
    return 0


if __name__ == '__main__':
    sys.exit(main())
