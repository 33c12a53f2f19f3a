"""Shapes that hypothesis draws for neighborhood_attn: small, for the interpreter."""

from hypothesis import strategies as st
from neighborhood_cases import NeighborhoodCase

# (Hq, Hkv, B), the first alone where windows are large.
HEADS = [(1, 1, 1), (1, 1, 2), (2, 1, 1), (2, 2, 1), (3, 1, 1)]
LARGE_WINDOW = 8
# Largest K * dilation: each phase of the dilation has patches of its own.
LONGEST_WINDOW = 13


@st.composite
def neighborhood_cases(draw) -> NeighborhoodCase:
    kernel_size = draw(st.sampled_from([3, 3, 5, 5, 7, 7, 9, 11, 13]))
    dilation = draw(st.integers(1, min(4, LONGEST_WINDOW // kernel_size)))
    window = kernel_size * dilation
    large = window > LARGE_WINDOW
    # Patches that touch no border, or nothing but borders.
    most = max(2, 11 - window)
    height, width = (window + draw(st.integers(0, most)) for _ in range(2))
    heads, kv_heads, batch = draw(st.sampled_from(HEADS[:1] if large else HEADS))
    return NeighborhoodCase(
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        grid_size=(height, width),
        kernel_size=kernel_size,
        dilation=dilation,
        head_dim=draw(st.sampled_from([8, 13, 16, 24, 32, 40])),
        rpb=draw(st.sampled_from([True, True, False])),
        strided=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )
