"""``python -m deform_gqa``: what can run on this machine, and what is missing.

Prints the versions, the devices, which backend of each operator can run on which of
them and why the others cannot, and what to install. Exits with 0 whatever it finds.
"""

import importlib
import platform

import torch

from deform_gqa.ops.common.backends import BACKENDS, OPS, unsupported_reason
from deform_gqa.profiling.environment import device_name, package_version
from deform_gqa.version import __version__

# Distributions that bring an import name; the first that is installed is shown.
PACKAGES = {
    'torch': ('torch',),
    'triton': ('triton',),
    'mmengine': ('onedl-mmengine', 'mmengine'),
    'mmcv': ('onedl-mmcv', 'mmcv', 'mmcv-lite'),
    'mmdet': ('onedl-mmdetection', 'mmdet'),
}
# What needs a module, and what brings it.
NEEDS = {
    'mmengine': ('the modules and the backbone', "pip install 'deform_gqa[mm]'"),
    'mmcv._ext': (
        'detectors',
        "pip install --no-build-isolation 'deform_gqa[mm]', after torch, setuptools, "
        'wheel and ninja, so that mmcv compiles its operators',
    ),
    'mmdet': (
        'the modules, the backbone and detectors',
        "pip install 'deform_gqa[mm]'",
    ),
    'triton': ('the fused kernels on GPUs', "pip install 'deform_gqa[triton]'"),
}


def versions() -> list[str]:
    """A line for each package."""
    lines = [f'deform_gqa {__version__}', f'Python     {platform.python_version()}']
    for name, distributions in PACKAGES.items():
        found = (f'{d} {v}' for d in distributions if (v := package_version(d)))
        lines.append(f'{name:10} {next(found, "not installed")}')
    return lines


def devices() -> list[torch.device]:
    """The CPU, and the first GPU if torch sees one."""
    gpus = [torch.device('cuda', 0)] if torch.cuda.is_available() else []
    return [torch.device('cpu'), *gpus]


def backends(device: torch.device) -> list[str]:
    """A line for each backend: the operators that it runs, and why not the others."""
    lines = []
    for backend in BACKENDS[1:]:
        ops_of_reason: dict[str | None, list[str]] = {}
        for op in OPS:
            reason = unsupported_reason(op, backend, device=device, dtype=torch.float32)
            ops_of_reason.setdefault(reason, []).append(op)
        for reason, ops in ops_of_reason.items():
            names = 'all operators' if len(ops) == len(OPS) else ', '.join(ops)
            lines.append(f'{backend:7} {"not " if reason else ""}{names}')
            lines += [f'        as {reason}'] if reason else []
    return lines


def missing() -> list[str]:
    """What cannot be imported, what it is for and how to get it."""
    lines = []
    for name, (purpose, command) in NEEDS.items():
        try:
            importlib.import_module(name)
        except (ImportError, AssertionError) as error:  # mmdet asserts mmcv's version
            lines.append(f'{name}, for {purpose}: {command}\n    ({error})')
    return lines


def main() -> None:
    """Print it all."""
    print('\n'.join(versions()))
    for device in devices():
        print(f'\nOn {device_name(device)} ({device.type}):')
        print('\n'.join(f'  {line}' for line in backends(device)))
    if not torch.cuda.is_available():
        reason = 'is built for CPUs' if torch.version.cuda is None else 'sees no GPU'
        print(f'\nNo GPU: this torch {reason}.')
    absent = missing()
    print('\nTo install:' if absent else '\nNothing is missing.')
    print('\n'.join(f'  {line}' for line in absent))


if __name__ == '__main__':
    main()
