"""Tests of tools/model_complexity.py."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
TOOL = ROOT / 'tools/model_complexity.py'
CONFIG = ROOT / 'configs/quickstart/retinanet_dat-gqa-mini_fpn_shapes.py'


@pytest.fixture
def tool(monkeypatch, capsys):
    """Runs the tool; returns what it printed, errors included."""

    def run(*options):
        monkeypatch.setattr(sys, 'argv', ['model_complexity.py', *map(str, options)])
        runpy.run_path(str(TOOL), run_name='__main__')
        return capsys.readouterr().out

    return run


def test_table(tool):
    out = tool(CONFIG, '--size', 64, 96)
    assert f'| {CONFIG.stem} | 64x96 | 2.78 M | 2.44 M |' in out


def test_write(tmp_path):
    module = runpy.run_path(str(TOOL))
    complexity = module['Complexity']((192, 256), 34_560_000, 12_340_000, 5_600_000_000)
    metafile, readme = tmp_path / 'metafile.yml', tmp_path / 'README.md'
    kept = dict(Name='b', Results=[1], Metadata=dict(Parameters=1, Kept='yes'))
    metafile.write_text(yaml.safe_dump(dict(Collections=[dict(Name='X')], Models=None)))
    config = ROOT / 'configs/dat/a.py'
    module['write_metafile'](metafile, config, dict(Parameters=2))
    content = yaml.safe_load(metafile.read_text())
    content['Models'].append(kept)
    metafile.write_text(yaml.safe_dump(content))
    module['write_metafile'](metafile, config.with_name('b.py'), dict(Parameters=3))
    a, b = yaml.safe_load(metafile.read_text())['Models']
    assert a == {
        'Name': 'a',
        'In Collection': 'X',
        'Config': 'configs/dat/a.py',
        'Metadata': {'Parameters': 2},
    }
    assert b == {**kept, 'Metadata': {'Parameters': 3, 'Kept': 'yes'}}

    rows = (
        '| [1](a.py), [2](b.py) | 1.0 M, 2.0 M | 3 | x |\n'
        '| [1](b.py) | 1.0 M, 2.0 M | 3 |'
    )
    readme.write_text(rows)
    module['write_table'](readme, Path('a.py'), complexity)
    assert readme.read_text() == rows.replace(
        '1.0 M, 2.0 M | 3 | x', '12.3 M, 34.6 M | 6 | x'
    )


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['none.py'], "none.py' does not exist"),
        ([TOOL, '--write'], 'there is no metafile.yml beside'),
        (
            [CONFIG, '--write', '--size', 64, 64],
            '--write takes the size that the config',
        ),
        ([CONFIG, '--size', 0, 64], r'--size must be positive, got \[0, 64\]'),
    ],
)
def test_wrong_options(tool, capsys, options, message):
    with pytest.raises(SystemExit):
        tool(*options)
    assert re.search(message, capsys.readouterr().err)
