"""Inputs shared by the op tests; needs nothing but torch."""

import dataclasses

import torch
from torch import Tensor

# A position this close to a table cell, in cells, may be on either side of it in
# another precision, and bilinear interpolation has no derivative there.
MARGIN = 1e-4


@dataclasses.dataclass
class DeformAttnCase:
    """Shape of one call of deform_attn; notation of ``ops/__init__.py``."""

    batch: int
    heads: int
    kv_heads: int
    groups: int
    grid_size: tuple[int, int]
    keys: int
    head_dim: int
    table_size: tuple[int, int] | None
    reach: float  # largest |pos|
    strided: bool
    seed: int

    def inputs(self, dtype: torch.dtype = torch.float64) -> list[Tensor | None]:
        """q, k, v, pos and table, all of which require gradients."""
        generator = torch.Generator().manual_seed(self.seed)
        num_queries = self.grid_size[0] * self.grid_size[1]
        pos_dtype = torch.float64 if dtype == torch.float64 else torch.float32

        def draw(*shape: int, dtype=dtype) -> Tensor:
            x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            if self.strided and len(shape) == 4:
                x = x.transpose(1, 3).contiguous().transpose(1, 3)
            return x.requires_grad_()

        q = draw(self.batch, self.heads, num_queries, self.head_dim)
        k = draw(self.batch, self.kv_heads, self.keys, self.head_dim)
        v = draw(self.batch, self.kv_heads, self.keys, self.head_dim)
        if self.table_size is None:
            return [q, k, v, None, None]
        shape = (self.batch, self.groups, self.keys, 2)
        pos = torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1
        pos = (pos * self.reach).to(pos_dtype).requires_grad_()
        return [q, k, v, pos, draw(self.heads, *self.table_size, dtype=pos_dtype)]


def move_off_cells(case: DeformAttnCase, pos: Tensor) -> None:
    """Moves positions, in place, until no query is within MARGIN of a table cell."""
    generator = torch.Generator().manual_seed(case.seed)
    with torch.no_grad():
        for axis in range(2):
            size, at = case.grid_size[axis], pos[..., axis]
            index = torch.arange(size) / (size - 1) if size > 1 else torch.tensor([0.5])
            cells = (case.table_size[axis] - 1) / 2
            for _ in range(100):
                t = cells * (index + (1 - at.double().unsqueeze(-1)) / 2)
                near = ((t - t.round()).abs() < MARGIN).any(-1) & (cells > 0)
                if not near.any():
                    break
                nudge = torch.rand(at.shape, generator=generator) * 0.01
                at.copy_(torch.where(near, at * (1 - nudge), at))


def draw_inputs(case: DeformAttnCase, dtype: torch.dtype) -> list[Tensor | None]:
    """The case's inputs, where any precision finds the same table cells."""
    inputs = case.inputs(dtype)
    if inputs[3] is not None:
        move_off_cells(case, inputs[3])
    return inputs


def output_and_gradients(
    op, inputs: list[Tensor | None], loss_scale: float = 1.0
) -> list[Tensor]:
    """The output, and the gradients of a fixed loss to each input that is not None.

    Args:
        op: From the inputs to one tensor.
        inputs: Tensors that require gradients, or None.
        loss_scale: A power of two as GradScaler's, which the gradients are divided by
            again; those that flow into ``op`` end at the largest float16.
    """
    out = op(*inputs)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    grad = (grad * loss_scale).clamp(-65504, 65504)
    present = [x for x in inputs if x is not None]
    grads = torch.autograd.grad(out, present, grad.to(out), allow_unused=True)
    return [out, *(g / loss_scale for g in grads if g is not None)]


def shift_logits(q: Tensor, k: Tensor, shift: float) -> None:
    """Makes all logits of q (..., D) and k (..., D) lie around ``shift``, in place.

    Takes a component for it. The scale of the logits is the default.
    """
    with torch.no_grad():
        q[..., 0] = 1.0
        k[..., 0] = shift * q.shape[-1] ** 0.5


def unshift_gradient(grad_q: Tensor, shift: float) -> Tensor:
    """Of q after :func:`shift_logits`: its component in units of that of k.

    It is the sum over the keys of d(logit), which vanishes, times that of k.
    """
    size = max(1.0, abs(shift) * grad_q.shape[-1] ** 0.5)
    return torch.cat([grad_q[..., :1] / size, grad_q[..., 1:]], dim=-1)
