"""How many kernels training at many image sizes compiles."""

from collections import Counter

import pytest

pytest.importorskip('triton')

from deform_gqa.inspect.compilations import compilations, image_sizes


def test_image_sizes():
    sizes = list(image_sizes())
    assert len(set(sizes)) == 60
    assert all(min(size) >= 480 and max(size) <= 1333 for size in sizes)


def test_one_size_compiles_each_kernel():
    names = {name for name, _ in compilations([(800, 1333)])}
    assert names == {
        'bias_inputs_kernel',
        'deform_attn_fwd_kernel',
        'deform_attn_dq_kernel',
        'deform_attn_dkdv_dbias_kernel',
        'deform_sample_fwd_kernel',
        'deform_sample_bwd_kernel',
    }


def test_many_sizes_compile_few_kernels():
    found = Counter(name for name, _ in compilations(image_sizes()))
    assert found.total() <= 30, found
    # Whatever the size of the image.
    assert found['deform_sample_fwd_kernel'] == found['deform_sample_bwd_kernel'] == 1
    # As often as tiles of another number of keys read the taps.
    assert found['bias_inputs_kernel'] <= 5
