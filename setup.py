"""Packs configs, tools and the model index into the wheel, where mim looks for them.

All else is in setup.cfg.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
MIM_PARTS = ('configs', 'tools', 'model-index.yml')
# Measurements, not tools.
LEFT_OUT = ('__pycache__', 'benchmark_results')


class BuildWithMimParts(build_py):
    """Copies MIM_PARTS to ``deform_gqa/.mim`` of what is built."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib, 'deform_gqa', '.mim')
        shutil.rmtree(target, ignore_errors=True)
        for part in MIM_PARTS:
            source = ROOT / part
            if source.is_dir():
                ignored = shutil.ignore_patterns(*LEFT_OUT)
                shutil.copytree(source, target / part, ignore=ignored)
            else:
                shutil.copy(source, target / part)


setup(cmdclass={'build_py': BuildWithMimParts})
