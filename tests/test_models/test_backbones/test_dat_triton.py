"""The backbone on the Triton kernels, by the interpreter."""

import pytest
from golden import check_against_golden, load_golden, sub_dict
from test_dat import official_arch
from torch import nn

from deform_gqa.models import DAT
from deform_gqa.models.backbones.dat_checkpoint import load_dat_checkpoint
from deform_gqa.ops.common import backends

pytestmark = pytest.mark.interpret


@pytest.mark.parametrize(
    'name', ['dat_pp_mini_64x64', 'dat_pp_mini_96x160', 'dat_v1_mini_224x224']
)
def test_equals_official_backbone(name, monkeypatch):
    """Neighborhood and deformable layers of all stages, maps smaller than a window."""
    # The official model's heads are narrower than the kernels' usual ones.
    monkeypatch.setattr(backends, 'TRITON_HEAD_DIMS', range(4, 257))
    config, arrays = load_golden(name)
    model = DAT(official_arch(config), backend='triton')
    load_dat_checkpoint(model, sub_dict(arrays, 'state/'))
    model.norms = nn.ModuleList(nn.Identity() for _ in range(4))
    check_against_golden(model, arrays)
