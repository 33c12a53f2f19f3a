"""Shapes that hypothesis draws for the op tests."""

from cases import DeformAttnCase
from hypothesis import strategies as st


@st.composite
def deform_attn_cases(draw, max_side: int = 19) -> DeformAttnCase:
    groups = draw(st.integers(1, 3))
    heads = groups * draw(st.integers(1, 4))
    divisors = [h for h in range(1, heads + 1) if heads % h == 0]
    height, width = draw(st.integers(1, max_side)), draw(st.integers(1, max_side))
    table_size = draw(
        st.one_of(
            st.none(),
            st.just((2 * height - 1, 2 * width - 1)),
            st.tuples(st.integers(1, 30), st.integers(1, 30)),
        )
    )
    return DeformAttnCase(
        batch=draw(st.integers(1, 3)),
        heads=heads,
        kv_heads=draw(st.sampled_from(divisors)),
        groups=groups,
        grid_size=(height, width),
        keys=draw(st.integers(1, 40)),
        head_dim=draw(st.sampled_from([5, 8, 16, 24, 40])),
        table_size=table_size,
        reach=draw(st.sampled_from([0.9, 1.0, 1.7, 4.0])),
        strided=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


@st.composite
def small_cases(draw) -> DeformAttnCase:
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    heads = groups * draw(st.integers(1, 4 if groups == 1 else 2))
    divisors = [h for h in range(1, heads + 1) if heads % h == 0]
    height, width = draw(st.integers(1, 9)), draw(st.integers(1, 19))
    table_size = draw(
        st.sampled_from(
            [
                None,
                (2 * height - 1, 2 * width - 1),
                (draw(st.integers(1, 20)), draw(st.integers(1, 20))),
                (draw(st.integers(1, 20)), draw(st.integers(1, 20))),
            ]
        )
    )
    return DeformAttnCase(
        batch=draw(st.sampled_from([1, 1, 2])) if heads < 3 else 1,
        heads=heads,
        kv_heads=draw(st.sampled_from(divisors)),
        groups=groups,
        grid_size=(height, width),
        keys=draw(st.integers(1, 24)),
        head_dim=draw(st.sampled_from([8, 13, 16, 24, 32, 40, 48, 64, 96])),
        table_size=table_size,
        reach=draw(st.sampled_from([0.9, 1.0, 1.7, 4.0])),
        strided=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )
