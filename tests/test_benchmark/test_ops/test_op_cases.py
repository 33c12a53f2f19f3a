import pytest
import torch

from deform_gqa.benchmark.core.errors import OptionError
from deform_gqa.benchmark.core.kv_heads import kv_head_count
from deform_gqa.benchmark.ops.case import StageCase, stage_map
from deform_gqa.benchmark.ops.deform_attn import DeformAttnCase
from deform_gqa.benchmark.ops.neighborhood_attn import NeighborhoodAttnCase
from deform_gqa.benchmark.ops.registry import OP_CASES

CASES = {op: x for op, x in OP_CASES.items() if issubclass(x, StageCase)}
CPU = torch.device('cpu')
DETECTION = (800, 1333)
MAPS = {1: (200, 334), 2: (100, 167), 3: (50, 84), 4: (25, 42)}


@pytest.mark.parametrize(('stage', 'size'), MAPS.items())
def test_detection_shapes(stage, size):
    case = DeformAttnCase.at_stage(DETECTION, stage, 2, 'full')
    assert stage_map(DETECTION, stage) == case.grid_size == size
    assert case.key_grid == (25, 42)
    assert case.num_heads * case.head_dim == 64 * 2 ** (stage - 1)
    specs = case.input_specs(torch.bfloat16)
    heads, side = 2**stage, (111, 55, 27, 13)[stage - 1]
    assert specs['q'] == ((2, heads, size[0] * size[1], 32), torch.bfloat16)
    assert specs['k'] == specs['v'] == ((2, heads, 1050, 32), torch.bfloat16)
    assert specs['pos'] == ((2, heads // 2, 1050, 2), torch.float32)
    assert specs['rpb_table'] == ((heads, side, side), torch.float32)


def test_native_shapes():
    case = DeformAttnCase.at_stage((224, 224), 1, 1, 'one')
    assert (case.grid_size, case.key_grid) == ((56, 56), (7, 7))
    assert case.table_size == tuple(2 * side - 1 for side in case.grid_size)
    assert case.num_kv_heads == 1


@pytest.mark.parametrize(
    ('heads', 'choice', 'count'),
    [(16, 'full', 16), (16, 'half', 8), (16, 'one', 1), (2, 'half', 1), (1, 'half', 1)],
)
def test_kv_heads(heads, choice, count):
    assert kv_head_count(heads, choice) == count


def test_neighborhood_shapes():
    case = NeighborhoodAttnCase.at_stage(DETECTION, 2, 1, 'half')
    assert (case.grid_size, case.keys_per_query) == ((100, 167), 49)
    assert case.input_specs(torch.float32)['rpb'][0] == (4, 13, 13)
    assert case.input_specs(torch.float32)['k'][0] == (1, 2, 16700, 32)
    assert NeighborhoodAttnCase.stages() == [1, 2, 3]
    # a map smaller than the window is padded
    assert NeighborhoodAttnCase.at_stage((64, 200), 3, 1, 'full').grid_size == (7, 13)


def test_select_cases_leaves_duplicates_out():
    cases = [
        case
        for op in CASES.values()
        for case in op.combinations([DETECTION], [1, 4], [1], ['full', 'half', 'one'])
    ]
    assert [case.name for case in cases] == [
        'deform_attn/800x1333/stage1/b1/kv2of2',
        'deform_attn/800x1333/stage1/b1/kv1of2',
        'deform_attn/800x1333/stage4/b1/kv16of16',
        'deform_attn/800x1333/stage4/b1/kv8of16',
        'deform_attn/800x1333/stage4/b1/kv1of16',
        'neighborhood_attn/800x1333/stage1/b1/kv2of2',
        'neighborhood_attn/800x1333/stage1/b1/kv1of2',
    ]


def test_select_cases_errors():
    with pytest.raises(OptionError, match=r'neighborhood_attn has no case .*\[4\]'):
        NeighborhoodAttnCase.combinations([DETECTION], [4], [1], ['full'])


@pytest.mark.parametrize('op', CASES)
def test_reduced_case_keeps_what_matters(op):
    case = CASES[op].at_stage(DETECTION, 1, 8, 'one')
    small = case.reduced(100_000)
    assert small.batch == 1
    assert small.pairs <= 100_000
    height, width = small.grid_size
    assert height != width
    assert (small.num_heads, small.num_kv_heads) == (2, 1)
    assert case.reduced(case.pairs) == CASES[op].at_stage(DETECTION, 1, 1, 'one')
    tiny = case.reduced(1)  # ends where the map cannot shrink
    assert tiny.halved() == tiny


@pytest.mark.parametrize('op', CASES)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_inputs(op, dtype):
    case = CASES[op].at_stage((64, 96), 1, 2, 'one')
    inputs = case.make_inputs(CPU, dtype)
    again = case.make_inputs(CPU, dtype)
    for name, (shape, wanted) in case.input_specs(dtype).items():
        assert inputs[name].shape == shape
        assert inputs[name].dtype == wanted
        assert inputs[name].is_leaf
        assert inputs[name].requires_grad
        assert torch.equal(inputs[name], again[name])
    if 'pos' in inputs:
        assert inputs['pos'].abs().max() < 1
