"""What a training has done, as pictures: its curves, and predictions beside truths."""

import json
from pathlib import Path

import cv2
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

PANEL_GAP = 8  # white pixels between pictures
SUFFIXES = ('.jpg', '.jpeg', '.png')


def read_scalars(work_dir: Path) -> tuple[list[dict], list[dict]]:
    """What the logger of a training wrote, without repeats.

    Where a resumed run has logged an iteration or an epoch again, the later run counts.

    Args:
        work_dir: Folder of the training, with one folder for each run.

    Returns:
        Records of training, by iteration, and of validation, by epoch or iteration.

    Raises:
        FileNotFoundError: If no run of the folder has logged anything.
        ValueError: If a line that is not the last of its file is no record.
    """
    files = sorted(work_dir.glob('*/vis_data/scalars.json'))
    if not files:
        raise FileNotFoundError(f'{work_dir} holds no */vis_data/scalars.json')
    train, val = {}, {}
    for file in files:
        for record in _records(file):
            by_step = train if 'loss' in record else val
            by_step[record['step']] = record
    if not train:
        raise FileNotFoundError(f'{work_dir}: its runs have logged no loss')
    return [train[i] for i in sorted(train)], [val[i] for i in sorted(val)]


def _records(file: Path) -> list[dict]:
    lines = file.read_text(encoding='utf-8').splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            if number == len(lines):  # a killed run can leave half a line
                break
            raise ValueError(f'{file}:{number} is no record: {line[:60]!r}') from error
        if isinstance(record, dict) and 'step' in record:
            records.append(record)
    return records


def draw_training(work_dir: Path) -> Figure:
    """Losses by iteration, and the metrics of the validations.

    Args:
        work_dir: Folder of the training.

    Returns:
        A figure with one or two diagrams side by side.

    Raises:
        FileNotFoundError: If no run of the folder has logged anything.
    """
    train, val = read_scalars(work_dir)
    metrics = sorted(
        {k for r in val for k in r if k.endswith(('_mAP', '_mAP_50')) and '/' in k}
    )
    figure = Figure(figsize=(10 if metrics else 5, 3.6), layout='constrained')
    axes = figure.subplots(1, 2 if metrics else 1, squeeze=False)[0]
    losses = sorted({k for r in train for k in r if 'loss' in k})
    for name in losses:
        width = 2.0 if name == 'loss' else 1.0
        _curve(axes[0], train, name, label=name, linewidth=width)
    axes[0].set(xlabel='iteration', ylabel='loss', ylim=(0, None))
    for name in metrics:
        _curve(axes[1], val, name, label=name.partition('/')[2], marker='o')
        x, y = val[-1]['step'], val[-1].get(name)
        if y is not None:
            axes[1].annotate(
                f'{y:.3f}', (x, y), (4, 4), textcoords='offset points', fontsize=8
            )
    if metrics:
        axes[1].set(xlabel='epoch', ylabel='validation', ylim=(0, 1))
        axes[1].xaxis.set_major_locator(MaxNLocator(integer=True))
        axes[1].margins(x=0.1)  # room for the last values
    for part in axes:
        part.grid(alpha=0.3)
        part.legend(fontsize=8)
    return figure


def _curve(axes, records: list[dict], name: str, **style) -> None:
    points = [(r['step'], r[name]) for r in records if name in r]
    axes.plot(*zip(*points, strict=True), **style)


def picture_panel(folder: Path, count: int = 8, columns: int = 2) -> np.ndarray:
    """The first pictures of a folder, in rows on white.

    Args:
        folder: With pictures such as those of ``tools/test.py --show-dir``: truths on
            the left, predictions on the right. Those in folders below it count.
        count: Largest number of pictures, > 0.
        columns: Pictures in a row, > 0.

    Returns:
        (H, W, 3) uint8, BGR.

    Raises:
        FileNotFoundError: If there are no pictures.
        ValueError: If one cannot be read, or a number is not positive.
    """
    for name, value in (('count', count), ('columns', columns)):
        if value < 1:
            raise ValueError(f'{name} must be positive, got {value}')
    files = sorted(p for p in folder.rglob('*') if p.suffix.lower() in SUFFIXES)[:count]
    if not files:
        raise FileNotFoundError(f'{folder} holds no pictures ({", ".join(SUFFIXES)})')
    pictures = [_read(file) for file in files]
    columns = min(columns, len(pictures))
    height = max(p.shape[0] for p in pictures) + PANEL_GAP
    width = max(p.shape[1] for p in pictures) + PANEL_GAP
    rows = -(-len(pictures) // columns)
    panel = np.full((rows * height, columns * width, 3), 255, np.uint8)
    for index, picture in enumerate(pictures):
        y, x = index // columns * height, index % columns * width
        panel[y : y + picture.shape[0], x : x + picture.shape[1]] = picture
    return panel[: rows * height - PANEL_GAP, : columns * width - PANEL_GAP]


def _read(file: Path) -> np.ndarray:
    picture = cv2.imread(str(file))
    if picture is None:
        raise ValueError(f'{file} is no picture that OpenCV can read')
    return picture
