"""Metafiles list the configs and nothing else; results are those of the READMEs.

Parameters are compared where the models are built: test_configs.py, test_coco_zoo.py.
"""

import pytest
from metafiles import ROOT, models_of, read_yaml

FOLDERS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in ROOT.glob('configs/*')
    if any(path.glob('*.py')) and path.name != '_base_'
)


def test_index_imports_the_metafile_of_every_folder():
    imported = read_yaml('model-index.yml')['Import']
    assert imported == [f'{folder}/metafile.yml' for folder in FOLDERS]


@pytest.mark.parametrize('folder', FOLDERS)
def test_every_config_is_listed(folder):
    configs = {path.stem for path in (ROOT / folder).glob('*.py')}
    models = models_of(folder)
    assert set(models) == configs
    for name, model in models.items():
        assert model['Config'] == f'{folder}/{name}.py'
        assert model['Metadata']['FLOPs'] > model['Metadata']['Parameters']


@pytest.mark.parametrize('folder', FOLDERS)
def test_collection(folder):
    content = read_yaml(f'{folder}/metafile.yml')
    [collection] = content['Collections']
    assert {model['In Collection'] for model in content['Models']} == {
        collection['Name']
    }
    assert collection['README'] == f'{folder}/README.md'
    assert (ROOT / collection['Code']['URL']).is_file()
    assert all(paper['URL'].startswith('https://') for paper in collection['Paper'])


def test_names_are_unique():
    names = [name for folder in FOLDERS for name in models_of(folder)]
    names += [read_yaml(f'{f}/metafile.yml')['Collections'][0]['Name'] for f in FOLDERS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize('folder', FOLDERS)
def test_results_stand_in_the_readme(folder):
    text = (ROOT / folder / 'README.md').read_text()
    rows = {
        name: next(line for line in text.split('\n') if f'{name}.py)' in line)
        for name in models_of(folder)
    }
    for name, model in models_of(folder).items():
        for result in model.get('Results', ()):
            assert result['Task'] and result['Dataset']
            for value in result['Metrics'].values():
                assert f'{value / 100:.3f}' in rows[name]
        assert ('Results' not in model) or 'not measured yet' not in rows[name]


def test_coco_results_are_ours_alone():
    """Nobody has trained these on COCO here; published figures are in the READMEs."""
    for folder in ('configs/dat', 'configs/dat_gqa'):
        assert not any('Results' in model for model in models_of(folder).values())
