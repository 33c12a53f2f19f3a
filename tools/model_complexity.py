"""Parameters and FLOPs of detectors: python tools/model_complexity.py CONFIG..."""

import argparse
import copy
import re
from pathlib import Path

import yaml
from mmengine.config import Config

from deform_gqa.benchmark.models.complexity import (
    Complexity,
    image_size,
    measure_complexity,
)
from deform_gqa.profiling.markdown import markdown_table

ROOT = Path(__file__).parents[1]
MILLION, BILLION = 1e6, 1e9
HEADER = ('config', 'image', 'parameters', 'of the backbone', 'GFLOPs')
# Parameters of backbone and detector, and GFLOPs, in the tables of the READMEs.
CELLS = re.compile(r'\| [\d.]+ M, [\d.]+ M \| [\d.]+ \|')


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description='Parameters and FLOPs of detectors. A multiply-add counts as one, '
        'as in papers and in MMDetection. Fused operators are counted; nothing is '
        'computed, and no data are needed.'
    )
    parser.add_argument('configs', nargs='+', metavar='CONFIG', help='config files')
    parser.add_argument(
        '--size',
        nargs=2,
        type=int,
        metavar=('HEIGHT', 'WIDTH'),
        help='of the image in pixels (default: what the config tests at, and 800 1280 '
        'for the usual scale of COCO)',
    )
    parser.add_argument(
        '--write',
        action='store_true',
        help='write them into metafile.yml and README.md beside each config, which is '
        'listed there if it was not',
    )
    return parser


def same_model(cfg: Config, size: list[int] | None) -> tuple:
    """What is equal for two schedules of one detector at one size."""
    model = copy.deepcopy(cfg.model)
    inner = model.model if model.type == 'swap_attention' else model
    inner.backbone.pop('drop_path_rate', None)
    return str(model), tuple(size or image_size(cfg))


def row(name: str, found: Complexity) -> tuple[str, ...]:
    height, width = found.size
    return (
        name,
        f'{height}x{width}',
        f'{found.parameters / MILLION:.2f} M',
        f'{found.backbone_parameters / MILLION:.2f} M',
        f'{found.multiply_adds / BILLION:.3g}',
    )


def metadata(cfg: Config, found: Complexity) -> dict:
    """What a metafile says of a config's detector."""
    train = cfg.train_cfg
    return {
        **({'Epochs': train.max_epochs} if 'max_epochs' in train else {}),
        **({'Iterations': train.max_iters} if 'max_iters' in train else {}),
        'Parameters': found.parameters,
        'FLOPs': found.multiply_adds,
        'Input Size': list(found.size),
    }


def write_metafile(path: Path, config: Path, values: dict) -> None:
    """Renews the entry of a config, or adds one; what else it says is kept."""
    content = yaml.safe_load(path.read_text())
    name = config.stem
    models = {model['Name']: model for model in content['Models'] or ()}
    model = models.setdefault(
        name,
        {
            'Name': name,
            'In Collection': content['Collections'][0]['Name'],
            'Config': config.relative_to(ROOT).as_posix(),
            'Metadata': {},
        },
    )
    model['Metadata'].update(values)
    content['Models'] = [models[name] for name in sorted(models)]
    path.write_text(yaml.safe_dump(content, sort_keys=False, width=88))


def write_table(path: Path, config: Path, found: Complexity) -> None:
    """Renews the cells of the row that names a config first."""
    cells = (
        f'| {found.backbone_parameters / MILLION:.1f} M, '
        f'{found.parameters / MILLION:.1f} M | {found.multiply_adds / BILLION:.0f} |'
    )
    lines = path.read_text().split('\n')
    for index, line in enumerate(lines):
        named = re.search(r'\]\(([\w.+-]+\.py)\)', line)
        if named and named[1] == config.name:
            lines[index] = CELLS.sub(cells, line)
    path.write_text('\n'.join(lines))


def check(args: argparse.Namespace) -> list[Path]:
    """The configs, once all of them are known to be there.

    Raises:
        FileNotFoundError: If a config does not exist, or has no metafile beside it.
        ValueError: If ``--write`` stands beside ``--size``, or a size is too small.
    """
    paths = [Path(name).resolve() for name in args.configs]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f'config file {str(path)!r} does not exist')
        if args.write and not path.with_name('metafile.yml').is_file():
            raise FileNotFoundError(f'there is no metafile.yml beside {str(path)!r}')
    if args.size and args.write:
        raise ValueError('--write takes the size that the config tests at, not --size')
    if args.size and min(args.size) < 1:
        raise ValueError(f'--size must be positive, got {args.size}')
    return paths


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    try:
        paths = check(args)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    rows, measured = [], {}
    for path in paths:
        cfg = Config.fromfile(path)
        key = same_model(cfg, args.size)
        if key not in measured:
            measured[key] = measure_complexity(cfg, args.size)
        found = measured[key]
        rows.append(row(path.stem, found))
        if args.write:
            write_metafile(path.with_name('metafile.yml'), path, metadata(cfg, found))
            write_table(path.with_name('README.md'), path, found)
    print(markdown_table(HEADER, rows))


if __name__ == '__main__':
    main()
