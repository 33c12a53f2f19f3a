"""Inputs and comparisons shared by the tests of neighborhood_attn."""

import dataclasses

import torch

from deform_gqa.ops import neighborhood_attn


def make_inputs(
    grid_size, kernel_size, *, batch=2, heads=4, kv_heads=2, dim=8, rpb=True, seed=0
):
    """Random float64 q, k, v and rpb (or None) that require gradients."""
    generator = torch.Generator().manual_seed(seed)
    places = grid_size[0] * grid_size[1]
    shapes = [
        (batch, heads, places, dim),
        (batch, kv_heads, places, dim),
        (batch, kv_heads, places, dim),
        (heads, 2 * kernel_size - 1, 2 * kernel_size - 1),
    ]
    inputs = [
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in shapes
    ]
    return inputs if rpb else [*inputs[:3], None]


def outputs_and_gradients(inputs, **options):
    """[out, gradients of all inputs that are there] for a fixed upstream gradient."""
    out = neighborhood_attn(*inputs, **options)
    generator = torch.Generator().manual_seed(1)
    grad_out = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    present = [x for x in inputs if x is not None]
    return [out, *torch.autograd.grad(out, present, grad_out.to(out))]


def assert_all_close(actual, expected, tolerance=1e-10):
    for x, y in zip(actual, expected, strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


@dataclasses.dataclass
class NeighborhoodCase:
    """Shape of one call of neighborhood_attn; notation of ``ops/__init__.py``."""

    batch: int
    heads: int
    kv_heads: int
    grid_size: tuple[int, int]
    kernel_size: int
    dilation: int
    head_dim: int
    rpb: bool
    strided: bool
    seed: int

    def inputs(self, dtype: torch.dtype = torch.float64) -> list[torch.Tensor | None]:
        """q, k, v of ``dtype`` and rpb, of float32 at least; all require gradients."""
        exact = make_inputs(
            self.grid_size,
            self.kernel_size,
            batch=self.batch,
            heads=self.heads,
            kv_heads=self.kv_heads,
            dim=self.head_dim,
            rpb=self.rpb,
            seed=self.seed,
        )
        rpb_dtype = torch.promote_types(dtype, torch.float32)
        return [
            x if x is None else self._lay_out(x.detach().to(dtype_of_x))
            for x, dtype_of_x in zip(exact, [*[dtype] * 3, rpb_dtype], strict=True)
        ]

    def _lay_out(self, x: torch.Tensor) -> torch.Tensor:
        if self.strided:
            x = x.transpose(1, -1).contiguous().transpose(1, -1)
        return x.requires_grad_()

    def options(self) -> dict:
        return dict(
            grid_size=self.grid_size,
            kernel_size=self.kernel_size,
            dilation=self.dilation,
        )
