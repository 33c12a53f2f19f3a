"""Shapes that hypothesis draws for the tests of deform_sdpa."""

from hypothesis import strategies as st
from sdpa_cases import DeformSdpaCase


@st.composite
def deform_sdpa_cases(draw, max_side: int = 9, max_queries: int = 20) -> DeformSdpaCase:
    heads = draw(st.sampled_from([1, 2, 3, 4, 6, 8]))
    divisors = [h for h in range(1, heads + 1) if heads % h == 0]
    return DeformSdpaCase(
        batch=draw(st.integers(1, 2)),
        query_views=draw(st.integers(1, 3)),
        heads=heads,
        kv_heads=draw(st.sampled_from(divisors)),
        groups=draw(st.sampled_from([None, *divisors])),
        queries=draw(st.integers(1, max_queries)),
        views=draw(st.integers(1, 3)),
        points=draw(st.integers(1, 5)),
        head_dim=draw(st.sampled_from([3, 8, 16, 24, 32])),
        grid_size=draw(st.tuples(*[st.integers(1, max_side)] * 2)),
        margin=draw(st.sampled_from([0.0, 0.2, 2.0])),
        strided=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


@st.composite
def small_sdpa_cases(draw) -> DeformSdpaCase:
    """Few programs and points, as the Triton interpreter is slow."""
    heads, kv_heads, groups = draw(
        st.sampled_from(
            [
                *((1, 1, None), (2, 1, None), (4, 1, None), (8, 1, 1), (3, 3, None)),
                *((6, 2, None), (4, 2, 2), (4, 1, 2), (3, 1, None), (2, 2, 1)),
                *((4, 2, 1), (2, 1, 2), (12, 1, None), (6, 2, 3)),
            ]
        )
    )
    return DeformSdpaCase(
        batch=draw(st.sampled_from([1, 1, 1, 2])),
        query_views=draw(st.sampled_from([1, 1, 1, 2])),
        heads=heads,
        kv_heads=kv_heads,
        groups=groups,
        queries=draw(st.integers(1, 30)),
        views=draw(st.integers(1, 2)),
        points=draw(st.integers(1, 3)),
        head_dim=draw(st.sampled_from([8, 13, 16, 24, 32, 40, 64])),
        grid_size=draw(st.tuples(*[st.integers(1, 9)] * 2)),
        margin=draw(st.sampled_from([0.0, 0.2, 2.0])),
        strided=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )
