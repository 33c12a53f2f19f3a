import pytest
import torch

from deform_gqa.benchmark.ops.deform_attn import DeformAttnCase
from deform_gqa.benchmark.ops.neighborhood_attn import NeighborhoodAttnCase
from deform_gqa.benchmark.ops.roofline import PEAKS, count_work, roofline

H100 = PEAKS['NVIDIA H100 80GB HBM3']


def all_layers(direction='forward', batch=1):
    """(layers, work) of the 14 deformable layers of DAT-T++ at 800x1333."""
    cases = [
        DeformAttnCase.at_stage((800, 1333), s, batch, 'full') for s in (1, 2, 3, 4)
    ]
    return [
        (case.layers, count_work(case, torch.bfloat16, direction)) for case in cases
    ]


def total(works, name):
    return sum(layers * getattr(work, name) for layers, work in works)


def test_counts_of_the_backbone():
    works = all_layers()
    assert sum(layers for layers, _ in works) == 14
    assert total(works, 'pairs') == total(works, 'exps') == 633_360_000
    assert total(works, 'flops') == pytest.approx(81.1e9, rel=1e-3)
    assert total(works, 'bytes') == pytest.approx(94e6, rel=0.01)


def test_rooflines_of_the_backbone():
    rooflines = [
        (layers, roofline(work, torch.bfloat16, H100)) for layers, work in all_layers()
    ]
    for limit, us in (('exp', 164), ('tensor', 82), ('memory', 28)):
        found = sum(layers * times[limit] for layers, times in rooflines)
        assert found == pytest.approx(us, abs=0.5)
    assert all(max(times.values()) == times['exp'] for _, times in rooflines)


def test_backward_adds_to_every_count():
    forward, both = all_layers(), all_layers('forward+backward')
    assert total(both, 'pairs') == total(forward, 'pairs')
    assert total(both, 'exps') == 2 * total(forward, 'exps')
    assert total(both, 'flops') == 3.5 * total(forward, 'flops')
    assert total(both, 'bytes') > 2 * total(forward, 'bytes')


def test_batch_scales_pairs():
    assert total(all_layers(batch=2), 'pairs') == 2 * 633_360_000


def test_neighborhood_counts():
    case = NeighborhoodAttnCase.at_stage((800, 1333), 1, 1, 'full')
    work = count_work(case, torch.float32, 'forward')
    assert work.pairs == 2 * 200 * 334 * 49
    assert work.bytes == 4 * (4 * 64 * 66800 + 2 * 13 * 13)


def test_single_precision_has_its_own_roofline():
    case = DeformAttnCase.at_stage((800, 1333), 1, 1, 'full')
    work = count_work(case, torch.float32, 'forward')
    single = roofline(work, torch.float32, H100)
    assert single['tensor'] > roofline(work, torch.bfloat16, H100)['tensor']
    assert max(single, key=single.get) == 'tensor'


def test_unknown_devices_and_directions():
    assert 'AMD EPYC' not in PEAKS
    case = DeformAttnCase.at_stage((224, 224), 1, 1, 'full')
    with pytest.raises(ValueError, match=r"direction must be one of .* got 'backward'"):
        count_work(case, torch.float32, 'backward')
