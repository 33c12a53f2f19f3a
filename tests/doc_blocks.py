"""Code blocks of the documentation, and how tests run them."""

import argparse
import ast
import contextlib
import dataclasses
import os
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import mmdet
import torch
from mmdet.registry import HOOKS, MODELS
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper

from deform_gqa.models import DAT

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in (
        'README.md',
        'CONTRIBUTING.md',
        'docs/*.md',
        'configs/*/README.md',
        'projects/*/README.md',
    )
    for path in ROOT.glob(pattern)
)
FENCED = re.compile(r'^```(\w+)\n(.*?)^```$', flags=re.MULTILINE | re.DOTALL)
# What a block sets that is a config.
CONFIG_NAMES = {
    '_base_',
    'backbone',
    'custom_hooks',
    'custom_imports',
    'load_from',
    'model',
    'optim_wrapper',
}
# Tools of mmdet are looked up where its wheel has them.
SHELL_VARIABLES = {'TOOLS': f'{mmdet.__path__[0]}/.mim/tools/analysis_tools'}


@dataclasses.dataclass(frozen=True)
class Block:
    """One fenced block: its page, the line of its first line, language and text."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f'{self.page}:{self.line}'

    @property
    def is_config(self) -> bool:
        """Whether a Python block is (a part of) a config: nothing but settings."""
        code = re.sub(r'\{\{[\w.]+\}\}', 'None', self.text)
        statements = ast.parse(code).body
        return all(isinstance(node, ast.Assign) for node in statements) and any(
            getattr(target, 'id', None) in CONFIG_NAMES
            for node in statements
            for target in node.targets
        )


def blocks(language: str, pages: list[str] = PAGES) -> list[Block]:
    """All blocks in a language."""
    found = []
    for page in pages:
        text = (ROOT / page).read_text()
        for match in FENCED.finditer(text):
            if match[1] == language:
                line = text.count('\n', 0, match.start(2)) + 1
                found.append(Block(page, line, language, match[2]))
    return found


def run_code(block: Block, names: dict[str, Any]) -> None:
    """Executes a block in a namespace."""
    # Tracebacks then point into the page.
    code = compile('\n' * (block.line - 1) + block.text, str(ROOT / block.page), 'exec')
    exec(code, {'__name__': 'doc_block', **names})


def build_config(
    text: str, folder: Path, base: str | None = None, device: str = 'meta'
) -> dict[str, Any]:
    """Builds what a config sets: models, hooks, optimizers.

    Args:
        text: The config.
        folder: Where its file is written; files that it inherits may lie there.
        base: ``_base_`` of a text that has none.
        device: Where models are built; 'meta' takes no memory for weights.

    Returns:
        What was built, by the names of the config.
    """
    own_names = set(re.findall(r'^(\w+) ?=', text, flags=re.MULTILINE))
    if base is not None:
        text = f'_base_ = {base!r}\n{text}'
    file = folder / 'block.py'
    file.write_text(text)
    cfg = Config.fromfile(file)
    built = {}
    with torch.device(device):
        for name in own_names & {'model', 'backbone'}:
            built[name] = MODELS.build(cfg[name])
        if 'optim_wrapper' in own_names:
            built['model'] = built.get('model') or MODELS.build(cfg.model)
    for model in built.values():
        check_channels(model)
    if 'optim_wrapper' in own_names:
        built['optim_wrapper'] = build_optim_wrapper(built['model'], cfg.optim_wrapper)
    if 'custom_hooks' in own_names:
        built['custom_hooks'] = [HOOKS.build(hook) for hook in cfg.custom_hooks]
    return built


def check_channels(model: torch.nn.Module) -> None:
    """The neck of a detector must take the channels of the maps of its backbone."""
    backbone, neck = getattr(model, 'backbone', None), getattr(model, 'neck', None)
    if isinstance(backbone, DAT) and hasattr(neck, 'in_channels'):
        channels = [backbone.arch['embed_dims'][i] for i in backbone.out_indices]
        assert list(neck.in_channels) == channels, 'channels of the neck'


class Parsed(BaseException):
    """A tool has understood its command line; raised in place of doing its work."""


def commands(text: str) -> list[list[str]]:
    """The words of each command of a shell block that runs Python, from there on.

    Optional parts, which pages put in brackets, are taken as given.
    """
    variables = dict(SHELL_VARIABLES)
    text = re.sub(r'\\\n\s*', ' ', text)
    text = re.sub(r'\[options\]', '', text)
    for _ in range(2):  # brackets in brackets
        text = re.sub(r'\[((?:--|[A-Z])[^\[\]]*)\]', r'\1', text)
    found = []
    for line in text.splitlines():
        assignment = re.fullmatch(r'(\w+)=(\S+)', line)
        if assignment:
            variables[assignment[1]] = assignment[2]
            continue
        for name, value in variables.items():
            line = line.replace(f'${name}', value)
        words = shlex.shlex(line, posix=True, punctuation_chars=True)
        words.whitespace_split = True
        command: list[str] = []
        for word in [*words, ';']:
            if set(word) <= set('();<>|&'):
                if 'python' in command:
                    found.append(command[command.index('python') + 1 :])
                command = []
            elif word != '...':
                command.append(word)
    return found


def parse_command(words: list[str]) -> None:
    """Lets a tool parse its options, and no more.

    Raises:
        SystemExit: If it does not know them.
        OSError: If there is no such tool.
    """
    words = [word for word in words if word != '-u']
    is_module = words[0] == '-m'
    target, *options = words[1:] if is_module else words
    with stopping_after_parsing(), contextlib.suppress(Parsed):
        sys.argv = [target, *options]
        if is_module:
            runpy.run_module(target, run_name='__main__', alter_sys=True)
        else:
            path = os.path.join(ROOT, target)
            sys.path.insert(0, os.path.dirname(path))
            runpy.run_path(path, run_name='__main__')
        assert not options, f'{target} has not looked at its options {options}'


@contextlib.contextmanager
def stopping_after_parsing():
    """``parse_args`` raises Parsed where it would return."""
    parse_args = argparse.ArgumentParser.parse_args
    argv, path = sys.argv, list(sys.path)

    def stop(self, *args, **kwargs):
        parse_args(self, *args, **kwargs)
        raise Parsed

    argparse.ArgumentParser.parse_args = stop
    try:
        yield
    finally:
        argparse.ArgumentParser.parse_args = parse_args
        sys.argv, sys.path[:] = argv, path


def words_of(command: list[str]) -> str:
    return shlex.join(command)
