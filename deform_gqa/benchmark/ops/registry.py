"""The ops that are measured: one module and one entry each."""

from .case import OpCase
from .deform_attn import DeformAttnCase
from .deform_sdpa import DeformSdpaCase
from .ms_deform_attn import MsDeformAttnCase
from .neighborhood_attn import NeighborhoodAttnCase

OP_CASES: dict[str, type[OpCase]] = {
    case.op: case
    for case in (DeformAttnCase, NeighborhoodAttnCase, DeformSdpaCase, MsDeformAttnCase)
}
