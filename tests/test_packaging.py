"""The wheel carries what mim looks for: configs, tools and the model index."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A build of the checkout itself would leave folders in it.
SOURCES = ('configs', 'tools', 'deform_gqa', 'setup.py', 'setup.cfg', 'pyproject.toml')
SOURCES += ('MANIFEST.in', 'README.md', 'LICENSE', 'CHANGELOG.md', 'model-index.yml')


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    """Names of the files in the sdist and in a wheel that was built from it."""
    folder = tmp_path_factory.mktemp('build')
    code = (
        'from setuptools import build_meta as b; import sys; '
        'print(b.build_sdist(sys.argv[1])) if sys.argv[2] == "sdist" else '
        'print(b.build_wheel(sys.argv[1]))'
    )

    def build(kind, cwd):
        command = [sys.executable, '-c', code, str(folder), kind]
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return folder / done.stdout.splitlines()[-1]

    checkout = folder / 'checkout'
    checkout.mkdir()
    for name in SOURCES:
        (checkout / name).symlink_to(ROOT / name)
    with tarfile.open(build('sdist', checkout)) as sdist:
        names = sdist.getnames()
        sdist.extractall(folder, filter='data')
    with zipfile.ZipFile(build('wheel', folder / names[0])) as wheel:
        return names, wheel.namelist()


def sources(folder):
    """Python, shell and text files; none of what runs leave behind."""
    files = [path for path in (ROOT / folder).rglob('*.*') if path.is_file()]
    names = [str(path.relative_to(ROOT)) for path in files]
    return [
        name
        for name in names
        if name.endswith(('.py', '.sh', '.md')) and 'benchmark_results' not in name
    ]


def test_wheel_has_what_mim_looks_for(built):
    sdist, wheel = built
    files = [*sources('configs'), *sources('tools'), 'model-index.yml']
    assert {f'{sdist[0]}/{name}' for name in files} <= set(sdist)
    assert {f'deform_gqa/.mim/{name}' for name in files} <= set(wheel)


def test_wheel_has_the_package_alone(built):
    _, wheel = built
    assert set(sources('deform_gqa')) <= set(wheel)
    folders = {name.split('/')[0] for name in wheel}
    assert {f for f in folders if not f.endswith('.dist-info')} == {'deform_gqa'}
    assert not any('benchmark_results' in name for name in wheel)
