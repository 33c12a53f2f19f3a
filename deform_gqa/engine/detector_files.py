"""Configs by name, and weights that must fit the model that they are loaded into."""

import difflib
import re
from pathlib import Path

from mmdet.apis import DetInferencer
from mmengine.config import Config
from mmengine.hub import get_config
from torch import nn

import deform_gqa
from deform_gqa.engine.checkpoint_io import load_checkpoint

__all__ = ['CheckedInferencer', 'find_config', 'load_weights']

# Buffers of official checkpoints that a model computes anew.
_COMPUTED = ('num_batches_tracked', 'attn_mask', 'relative_position_index')


def _config_folders() -> list[Path]:
    """Where configs lie: in the installed package, and in the repository."""
    package = Path(deform_gqa.__file__).parent
    return [package / '.mim' / 'configs', package.parent / 'configs']


def find_config(name: str) -> Config:
    """A config by its path, by its name in this package, or as ``mmdet::...``.

    Raises:
        ValueError: If there is no such config; the message has names that are close.
    """
    if Path(name).is_file():
        return Config.fromfile(name)
    if '::' in name:
        return get_config(name)
    stem = Path(name).stem if name.endswith('.py') else name
    files = {
        file.stem: file for at in _config_folders() for file in at.glob('[!_]*/*.py')
    }
    if stem not in files:
        close = difflib.get_close_matches(stem, files, n=3, cutoff=0.4)
        raise ValueError(
            f'config {name!r} is neither a file nor the name of a config of this '
            f'package; close to it: {", ".join(close) or "none"}'
        )
    return Config.fromfile(files[stem])


def load_weights(model: nn.Module, checkpoint: str | dict, name: str = '') -> None:
    """Loads all weights of a model, or none.

    mmengine's own loader goes on with a warning, and the detector finds nonsense.

    Args:
        model: The model.
        checkpoint: A file, or what it holds.
        name: The checkpoint's name in messages.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file cannot be read, or the weights are of another model:
            some are missing, unknown or of another shape.
    """
    if not isinstance(checkpoint, dict):
        name = name or str(checkpoint)
        checkpoint = load_checkpoint(checkpoint, map_location='cpu')
    state = checkpoint.get('state_dict', checkpoint)
    state = {re.sub(r'^module\.', '', key): value for key, value in state.items()}
    try:
        keys = model.load_state_dict(state, strict=False)
    except RuntimeError as error:  # torch's word for shapes that do not fit
        lines = [line.strip() for line in str(error).splitlines()[1:]]
        problems = [f'{len(lines)} have another shape ({lines[0]})']
    else:
        problems = [
            f'{len(names)} are {what} ({names[0]}{", ..." if len(names) > 1 else ""})'
            for what, names in (
                ('missing in the checkpoint', _parameters(keys.missing_keys)),
                ('unknown to the config', _parameters(keys.unexpected_keys)),
            )
            if names
        ]
    if problems:
        raise ValueError(
            f'checkpoint {name!r} is of another model than the config describes '
            f'({type(model).__name__}): of its weights {" and ".join(problems)}'
        )


def _parameters(keys: list[str]) -> list[str]:
    return [
        key
        for key in keys
        if not key.endswith(_COMPUTED) and not key.startswith('data_preprocessor.')
    ]


class CheckedInferencer(DetInferencer):
    """mmdet's DetInferencer, which refuses a checkpoint of another model.

    Args: As for DetInferencer; ``model`` may also be what :func:`find_config` takes.

    Raises:
        ValueError: As :func:`find_config` and :func:`load_weights`.
    """

    def __init__(self, model: str | Config, weights: str, **kwargs):
        self._weights_name = weights
        if isinstance(model, str):
            model = find_config(model)
        super().__init__(model, weights, **kwargs)

    def _load_weights_to_model(self, model, checkpoint, cfg) -> None:
        load_weights(model, checkpoint, self._weights_name)
        super()._load_weights_to_model(model, checkpoint, cfg)
