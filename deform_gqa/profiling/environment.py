"""What a figure depends on: device, versions, commit, threads.

``python -m deform_gqa.profiling.environment cuda`` prints it, and fails where there is
no such device.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from deform_gqa.version import __version__

# Where they are loaded, a figure depends on them.
_MM_PACKAGES = ('mmengine', 'mmcv', 'mmdet')
_REPOSITORY = Path(__file__).resolve().parents[2]
_CPUINFO = Path('/proc/cpuinfo')


def package_version(name: str) -> str | None:
    """Installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_model() -> str:
    """Marketing name of the CPU where the system tells it."""
    if _CPUINFO.exists():
        for line in _CPUINFO.read_text().splitlines():
            name, _, value = line.partition(':')
            if name.strip() == 'model name':
                return value.strip()
    return platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """Name of the GPU, or of the CPU."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    return cpu_model() if device.type == 'cpu' else str(device)


def _git(*args: str) -> str | None:
    """Output of a git command in the checkout; None where there is none."""
    if shutil.which('git') is None or not (_REPOSITORY / '.git').exists():
        return None
    result = subprocess.run(
        ['git', '-C', str(_REPOSITORY), *args],
        capture_output=True,
        text=True,
        check=False,
    )
    return result.stdout.strip() if result.returncode == 0 else None


def git_commit() -> str | None:
    """Commit of the checkout, with '+changes' if tracked files differ from it.

    A copy without a .git folder can be given its commit in DEFORM_GQA_COMMIT.
    """
    commit = _git('rev-parse', '--short=12', 'HEAD')
    if commit is None:
        return os.environ.get('DEFORM_GQA_COMMIT')
    changed = _git('status', '--porcelain', '--untracked-files=no')
    return f'{commit}+changes' if changed else commit


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Everything that a report says about where it was measured."""
    return {
        'device': device_name(device),
        'device_type': device.type,
        'cpu': cpu_model(),
        'cpu_count': os.cpu_count(),
        'threads': torch.get_num_threads(),
        # Of the whole machine before measuring: tells whether it was idle.
        'load_average': round(os.getloadavg()[0], 1),
        'system': f'{platform.system()} {platform.machine()}',
        'python': platform.python_version(),
        'torch': torch.__version__,
        'cuda': torch.version.cuda,
        'triton': package_version('triton'),
        'deform_gqa': __version__,
        'commit': git_commit(),
        'date': datetime.datetime.now(datetime.timezone.utc).isoformat(
            timespec='seconds'
        ),
        **{x: sys.modules[x].__version__ for x in _MM_PACKAGES if x in sys.modules},
    }


def main(argv: list[str]) -> int:
    """Print the environment of the device named in ``argv`` (default: cpu)."""
    device = torch.device(argv[0] if argv else 'cpu')
    if device.type == 'cuda' and not torch.cuda.is_available():
        print('torch sees no CUDA device', file=sys.stderr)
        return 1
    print(json.dumps(describe_environment(device), indent=1))
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
