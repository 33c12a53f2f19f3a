import pytest
import torch

from deform_gqa.benchmark.core.run import expected_failure


@pytest.mark.parametrize(
    ('error', 'amp', 'expected'),
    [
        (torch.OutOfMemoryError('CUDA out of memory'), None, True),
        (RuntimeError('DefaultCPUAllocator: not enough memory'), None, True),
        (NotImplementedError('"nms" not implemented for Half'), torch.float16, True),
        (NotImplementedError('"nms" not implemented for Half'), None, False),
        (RuntimeError('expected scalar type Float'), torch.bfloat16, True),
        (RuntimeError('a defect'), torch.float16, False),
    ],
)
def test_failures(error, amp, expected):
    """Memory may run out, mixed precision may lack a kernel; others are defects."""
    if not expected:
        with pytest.raises(type(error)), expected_failure(amp):
            raise error
        return
    with expected_failure(amp) as failure:
        raise error
    assert failure == [f'{type(error).__name__}: {error}']


def test_a_baseline_may_fail():
    with expected_failure(None, is_foreign=True) as failure:
        raise RuntimeError('no such shape')
    assert failure == ['RuntimeError: no such shape']
