"""The documentation names files that exist, and every config is in its table."""

import re
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
