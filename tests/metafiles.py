"""The metafiles of the config folders, for the tests that hold them to the configs."""

from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]


def read_yaml(path: str) -> dict:
    return yaml.safe_load((ROOT / path).read_text())


def models_of(folder: str) -> dict[str, dict]:
    """Entries of the metafile of a folder, by their names."""
    return {
        model['Name']: model for model in read_yaml(f'{folder}/metafile.yml')['Models']
    }


def metadata_of(config: str) -> dict:
    """What the metafile beside a config says of its detector."""
    path = Path(config)
    return models_of(path.parent.as_posix())[path.stem]['Metadata']
