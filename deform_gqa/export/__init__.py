"""Export of backbones and detectors: ONNX, torch.export and AOTInductor.

The command is ``tools/export.py``. Needs the extras ``mm`` and ``export``.
"""

from .graphs import BackboneGraph, DetectorGraph
from .programs import trace, write_onnx, write_package, write_program
from .sampling import GatherSampling, sample_by_gather

__all__ = [
    'BackboneGraph',
    'DetectorGraph',
    'GatherSampling',
    'sample_by_gather',
    'trace',
    'write_onnx',
    'write_package',
    'write_program',
]
