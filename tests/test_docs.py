"""What the documentation names exists, and tables of configs are complete."""

import argparse
import importlib
import re
import runpy
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in (
        '*.md',
        'docs/*.md',
        'configs/*/README.md',
        'projects/*/README.md',
        'tools/benchmark_results/README.md',
    )
    for path in ROOT.glob(pattern)
)
CONFIG_FOLDERS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in ROOT.glob('configs/*')
    if path.is_dir() and path.name != '_base_'
)
MAX_FRONT_PAGE_LINES = 200
LINK = re.compile(r'\]\(([^)\s]+)\)')
# Files of the repository in commands and in code spans.
NAMED_FILE = re.compile(
    r'(?<![\w/.-])((?:configs|deform_gqa|docs|projects|tests|tools)/[\w./+-]+\.(?:py|sh|md))\b'
)
BENCHMARK = re.compile(r'python tools/benchmark\.py (.+)')


def text_of(page: str) -> str:
    return (ROOT / page).read_text()


def anchors(text: str) -> set[str]:
    """Anchors of the headings, as GitHub makes them."""
    headings = re.findall(r'^#+ (.+)$', text, flags=re.MULTILINE)
    return {
        re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-')
        for heading in headings
    }


def broken_links(page: str) -> list[str]:
    """Relative links that lead to no file or to no heading."""
    broken = []
    for link in LINK.findall(text_of(page)):
        if link.startswith(('http://', 'https://')):
            continue
        name, _, anchor = link.partition('#')
        target = (ROOT / page).parent / name if name else ROOT / page
        if not target.exists() or (
            anchor and anchor not in anchors(target.read_text())
        ):
            broken.append(link)
    return broken


@pytest.mark.parametrize('page', PAGES)
def test_links_resolve(page):
    assert broken_links(page) == []


@pytest.mark.parametrize('page', PAGES)
def test_named_files_exist(page):
    named = set(NAMED_FILE.findall(text_of(page)))
    assert sorted(name for name in named if not (ROOT / name).is_file()) == []


def benchmark_commands() -> list[str]:
    """Arguments of tools/benchmark.py that pages show and results were made with."""
    results = (ROOT / 'tools/benchmark_results').glob('*/*/*.md')
    texts = [*map(text_of, PAGES), *(path.read_text() for path in results)]
    commands = set()
    for text in texts:
        for line in BENCHMARK.findall(re.sub(r'\\\n\s*', '', text)):
            commands.add(line.partition('`')[0].partition('#')[0].strip())
    return sorted(command for command in commands if '--help' not in command)


@pytest.mark.parametrize('command', benchmark_commands())
def test_benchmark_commands_have_options_that_exist(command):
    suites = runpy.run_path(str(ROOT / 'tools/benchmark.py'))['SUITES']
    # the new operator of CONTRIBUTING
    name, *options = shlex.split(command.replace('row_attn', 'neighborhood_attn'))
    parser = argparse.ArgumentParser()
    importlib.import_module(suites[name]).add_arguments(parser)
    parser.parse_args(options)


def test_front_page_is_short():
    assert len(text_of('README.md').splitlines()) <= MAX_FRONT_PAGE_LINES


@pytest.mark.parametrize('folder', CONFIG_FOLDERS)
def test_readme_lists_the_configs_of_its_folder(folder):
    text = text_of(f'{folder}/README.md')
    configs = {path.name for path in (ROOT / folder).glob('*.py')}
    listed = set(re.findall(r'\]\(([\w.+-]+\.py)\)', text))
    assert listed == configs


def test_a_link_that_leads_nowhere_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(f'{__name__}.ROOT', tmp_path)
    (tmp_path / 'page.md').write_text(
        '# A page\n[1](page.md#a-page) [2](#b) [3](none.md) [4](https://example.org)'
    )
    assert broken_links('page.md') == ['#b', 'none.md']
