"""Which calls of deform_attn share the launches that were found for one of them."""

from unittest import mock

import pytest
import torch

pytest.importorskip('triton')

from deform_gqa.ops.common import triton_host
from deform_gqa.ops.deform_attn.triton_call import deform_attn_call


def arguments(**changes):
    q = torch.zeros(2, 4, 12, 8)
    k = torch.zeros(2, 2, 5, 8)
    given = dict(
        q=q,
        k=k,
        v=k,
        pos=torch.zeros(2, 2, 5, 2),
        rpb_table=torch.zeros(4, 7, 9),
        grid_size=(3, 4),
        scale=0.5,
        dropout_p=0.0,
        pos_in_range=False,
    )
    return {**given, **changes}


def transposed(x):
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def test_calls_that_differ_in_values_alone_share():
    with triton_host.launches_anew():
        first = deform_attn_call(**arguments())
        assert deform_attn_call(**arguments(q=torch.ones(2, 4, 12, 8))) is first
    with triton_host.launches_anew():
        assert deform_attn_call(**arguments()) is not first


@pytest.mark.parametrize(
    'changes',
    [
        dict(grid_size=(4, 3)),
        dict(scale=-0.5),
        dict(dropout_p=0.1),
        dict(pos_in_range=True),
        dict(pos=None, rpb_table=None),
        dict(rpb_table=torch.zeros(4, 7, 9, dtype=torch.float16)),
        dict(rpb_table=transposed(torch.zeros(4, 7, 9))),
        dict(rpb_table=torch.zeros(4, 9, 7)),
        dict(pos=torch.zeros(2, 1, 5, 2)),
        dict(pos=transposed(torch.zeros(2, 2, 5, 2))),
        dict(q=transposed(torch.zeros(2, 4, 12, 8))),
        dict(k=transposed(torch.zeros(2, 2, 5, 8))),
        dict(v=transposed(torch.zeros(2, 2, 5, 8))),
    ],
)
def test_other_calls_do_not(changes):
    with triton_host.launches_anew():
        first = deform_attn_call(**arguments())
        assert deform_attn_call(**arguments(**changes)) is not first


def test_nor_do_those_in_another_mode_or_on_another_gpu():
    with triton_host.launches_anew():
        first = deform_attn_call(**arguments())
        torch.use_deterministic_algorithms(True)
        try:
            fixed = deform_attn_call(**arguments())
        finally:
            torch.use_deterministic_algorithms(False)
        with mock.patch.object(triton_host, 'architecture', return_value=90):
            newer = deform_attn_call(**arguments())
        assert len({id(first), id(fixed), id(newer)}) == 3
        assert fixed.features.deterministic and newer.arch == 90


def test_launches_are_kept_by_the_layouts_of_gradients_too():
    with triton_host.launches_anew():
        call = deform_attn_call(**arguments())
        find = mock.Mock(side_effect=lambda *args: object())
        layouts = [
            triton_host.layout(x)
            for x in (
                torch.zeros(2, 3),
                torch.zeros(3, 2).t(),
                torch.zeros(2, 3).half(),
            )
        ]
        found = [call.cached(find, x) for x in layouts]
        assert len(set(map(id, found))) == 3
        assert [call.cached(find, x) for x in layouts] == found
        assert find.call_count == 3
