"""Rooms stand above what they use: no import runs from below to above.

A room is a folder (or file) of the repository. What is imported is read from the
sources, so that an import within a function counts as well.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# The lowest first. A room may import what is below its line and itself, and nothing
# else of its own line. A module belongs to the longest name that it begins with.
LEVELS = (
    ('deform_gqa.checks', 'deform_gqa.version'),
    ('deform_gqa', 'deform_gqa.archs', 'deform_gqa.datasets', 'deform_gqa.ops.common'),
    ('deform_gqa.ops',),
    ('deform_gqa.models',),
    (
        'deform_gqa.conversion',
        'deform_gqa.export',
        'deform_gqa.visualization',
        'deform_gqa.profiling',
    ),
    ('deform_gqa.engine',),
    ('deform_gqa.benchmark',),
    ('deform_gqa.inspect', 'projects'),
    ('tools', 'deform_gqa.__main__'),
)
LEVEL_OF = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
# What a room may import besides the standard library and this package.
OUTSIDE = {
    'deform_gqa': set(),
    'deform_gqa.archs': set(),
    'deform_gqa.checks': set(),
    'deform_gqa.datasets': {'cv2', 'numpy'},
    'deform_gqa.ops': {'torch', 'triton'},
    'deform_gqa.ops.common': {'torch', 'triton'},
    'deform_gqa.profiling': {'torch', 'numpy'},
    'deform_gqa.models': {'torch', 'mmcv.cnn', 'mmdet.registry', 'mmengine'},
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix('').parts
    return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


FILES = {
    module_name(path): path
    for folder in ('deform_gqa', 'projects', 'tools')
    for path in sorted(ROOT.glob(f'{folder}/**/*.py'))
    if 'configs' not in path.parts
}


def imports(module: str, source: str, is_package: bool = False) -> Iterator[str]:
    """Full names of the modules that a source imports."""
    package = module.split('.') if is_package else module.split('.')[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = '.'.join([*above, *filter(None, [node.module])])
            names = [f'{base}.{alias.name}' for alias in node.names]
            yield from (name if name in FILES else base for name in names)


def imports_of(module: str) -> set[str]:
    path = FILES[module]
    source = path.read_text(encoding='utf-8')
    return set(imports(module, source, path.name == '__init__.py'))


def starts_with(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(f'{prefix}.')


def room_of(module: str) -> str | None:
    """The room of a module of ours; None for one from outside."""
    rooms = [room for room in LEVEL_OF if starts_with(module, room)]
    return max(rooms, key=len, default=None)


def fault(module: str, imported: str) -> str | None:
    """What is wrong with an import, or None."""
    room, other = room_of(module), room_of(imported)
    if other is None:
        top = imported.split('.')[0]
        allowed = OUTSIDE.get(room)
        if allowed is None or top in sys.stdlib_module_names:
            return None
        if any(starts_with(imported, name) for name in allowed):
            return None
        return f'{room} may import {sorted(allowed)} besides Python and this package'
    if room == other or LEVEL_OF[other] < LEVEL_OF[room]:
        return None
    return f'{other} does not stand below {room}'


@pytest.mark.parametrize('room', sorted({room_of(module) for module in FILES}))
def test_no_import_from_below_to_above(room):
    faults = [
        f'{FILES[module].relative_to(ROOT)} imports {imported}: {reason}'
        for module in FILES
        if room_of(module) == room
        for imported in sorted(imports_of(module))
        if (reason := fault(module, imported)) is not None
    ]
    assert not faults, '\n'.join(['', *faults])


def test_every_folder_is_a_room():
    """A new folder of the package gets its place among the levels."""
    folders = {path.parent for path in ROOT.glob('deform_gqa/*/__init__.py')}
    assert {f'deform_gqa.{folder.name}' for folder in folders} <= set(LEVEL_OF)


@pytest.mark.parametrize(
    ('module', 'source', 'expected'),
    [
        ('deform_gqa.ops.common.x', 'from ..gqa.api import y', 'does not stand'),
        ('deform_gqa.ops.gqa.api', 'import deform_gqa.models.layers', 'does not stand'),
        ('deform_gqa.ops.gqa.api', 'def f():\n import numpy', 'besides Python'),
        ('deform_gqa.models.layers.mlp', 'from mmcv.ops import nms', 'besides Python'),
        ('deform_gqa.models.layers.mlp', 'import mmdet.models', 'besides Python'),
        ('deform_gqa.engine.x', 'from deform_gqa import benchmark', 'does not stand'),
        ('deform_gqa.benchmark.x', 'from ..inspect import aot', 'does not stand'),
        ('projects.x.y', 'from deform_gqa.inspect.aot import z', 'does not stand'),
    ],
)
def test_faults_are_found(module, source, expected):
    [imported] = imports(module, source)
    assert expected in fault(module, imported)


def test_models_build_without_compiled_ops_and_detectors():
    """The backbone builds and runs where mmcv's ops and mmdet.models are missing."""
    code = (
        'import sys\n'
        'for name in ("mmcv._ext", "mmcv.ops", "mmdet.models"):\n'
        '    sys.modules[name] = None\n'
        'import torch\n'
        'from deform_gqa.models import DAT\n'
        'arch = dict(\n'
        '    embed_dims=(8,) * 4, depths=(2, 2, 1, 1), num_heads=(2,) * 4,\n'
        '    block_types=("LS", "ND", "P", "X"))\n'
        'attention = dict(P=dict(type="WindowAttention"))\n'
        'model = DAT(arch, attention=attention, backend="torch")\n'
        'with torch.no_grad():\n'
        '    assert len(model(torch.rand(1, 3, 32, 64))) == 4\n'
    )
    subprocess.run([sys.executable, '-c', code], check=True, timeout=120)
