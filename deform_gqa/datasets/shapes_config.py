"""Parameters of the synthetic shapes dataset (``shapes.py``)."""

from dataclasses import asdict, dataclass
from typing import Any

from deform_gqa.checks import check_int, check_number

CLASSES = ('circle', 'square', 'triangle', 'star', 'cross', 'crescent')
SPLITS = ('train', 'val', 'test')
COUNTS = {split: f'num_{split}' for split in SPLITS}  # fields of ShapesConfig
MIN_IMAGE_SIZE = 32

# Increase it with every change that alters a byte of the output.
GENERATOR = 'deform_gqa.datasets.shapes'
GENERATOR_VERSION = 2


@dataclass(frozen=True)
class ShapesConfig:
    """Parameters of a dataset, checked when it is made.

    Args:
        num_train: images of the split ``train``, >= 0.
        num_val: images of the split ``val``, for choices, >= 0.
        image_size: (width, height) in pixels, each >= 32.
        seed: >= 0.
        min_objects: the smallest number of shapes that is drawn for an image, >= 0; an
            image may hold fewer, as shapes that find no position are left out.
        max_objects: the largest number, >= 1 and >= ``min_objects``.
        min_visible: smallest visible share of a shape's area, in (0, 1].
        num_test: images of the split ``test``, for results, >= 0. One of the three
            numbers of images must be positive.

    Raises:
        TypeError: if a value has the wrong type.
        ValueError: if a value is out of range.
    """

    num_train: int = 1000
    num_val: int = 80
    image_size: tuple[int, int] = (192, 192)
    seed: int = 0
    min_objects: int = 1
    max_objects: int = 8
    min_visible: float = 0.5
    num_test: int = 200

    def __post_init__(self) -> None:
        for name in (*COUNTS.values(), 'seed', 'min_objects'):
            check_int(name, getattr(self, name), 0)
        check_int('max_objects', self.max_objects, 1)
        if not any(self.num_images(split) for split in SPLITS):
            raise ValueError(f'{", ".join(COUNTS.values())} are all 0: nothing to do')
        if self.max_objects < self.min_objects:
            raise ValueError(
                f'max_objects must be at least min_objects ({self.min_objects}), '
                f'got {self.max_objects}'
            )
        if not isinstance(self.image_size, tuple | list) or len(self.image_size) != 2:
            raise TypeError(
                f'image_size must be (width, height), got {self.image_size!r}'
            )
        for side in self.image_size:
            check_int('image_size', side, MIN_IMAGE_SIZE)
        check_number('min_visible', self.min_visible)
        if not 0 < self.min_visible <= 1:
            raise ValueError(f'min_visible must be in (0, 1], got {self.min_visible}')
        self._use_plain_numbers()

    def _use_plain_numbers(self) -> None:
        """Turn NumPy's numbers into Python's, which JSON can hold."""
        for name in (*COUNTS.values(), 'seed', 'min_objects', 'max_objects'):
            object.__setattr__(self, name, int(getattr(self, name)))
        width, height = self.image_size
        object.__setattr__(self, 'image_size', (int(width), int(height)))
        object.__setattr__(self, 'min_visible', float(self.min_visible))

    def num_images(self, split: str) -> int:
        """Number of images of a split."""
        return getattr(self, COUNTS[split])

    def metadata(self) -> dict[str, Any]:
        """All that determines the output, as recorded in ``shapes.json``."""
        return {
            'generator': GENERATOR,
            'version': GENERATOR_VERSION,
            'classes': list(CLASSES),
            **asdict(self),
            'image_size': list(self.image_size),
        }
