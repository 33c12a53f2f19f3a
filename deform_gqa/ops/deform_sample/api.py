"""Public function of deform_sample: checks, choice of the backend, dispatch."""

import torch
from torch import Tensor

from ..common import checks
from ..common.autocast import without_autocast
from ..common.backends import choose_backend
from ..common.custom_op import (
    contiguous_like,
    define,
    register_autograd,
    run_backend,
)
from . import naive
from .embedding_bag import sample_by_bags


def deform_sample(x: Tensor, pos: Tensor, *, backend: str = 'auto') -> Tensor:
    """Bilinear samples of a map at given positions, zero outside the map.

    Each offset group samples its own C / G channels. Differentiable in x and pos.

    Args:
        x: (B, C, H, W), float16, bfloat16, float32 or float64; C % G == 0.
        pos: (B, G, S, 2) in (y, x), normalised to [-1, 1] with align_corners=True;
            float32 (float64 beside a float64 x).
        backend: 'auto', 'naive', 'torch' or 'triton'.

    Returns:
        (B, C, S), dtype of x, also under autocast. In memory (B, S, C), as the rows of
        keys and values that are projected from it.

    Raises:
        TypeError: For a tensor of the wrong dtype, or an option of the wrong type.
        ValueError: For shapes that do not fit, or a backend that cannot run the call.

    Source: the sampling of DAT (arXiv 2201.00520); the definition is
    ``torch.nn.functional.grid_sample(mode='bilinear', padding_mode='zeros',
    align_corners=True)``, which has no deterministic CUDA backward and refuses
    bfloat16 maps with float32 positions.
    """
    checks.check_tensor('x', x, 'B C H W')
    checks.check_pos(pos, x.shape[0], x)
    checks.check_device('pos', pos, 'x', x)
    checks.check_groups('channels of x', x.shape[1], pos.shape[1])
    if 0 in x.shape[1:]:
        raise ValueError(
            f'x must have channels and a map of at least 1 x 1, got {tuple(x.shape)}'
        )
    backend = choose_backend('deform_sample', backend, device=x.device, dtype=x.dtype)
    if backend == 'triton':
        return deform_sample_op(x, pos)
    sample = naive.deform_sample if backend == 'naive' else sample_by_bags
    with without_autocast(x.device):
        return sample(x, pos)


# The other backends are differentiable torch code and need no op.
deform_sample_op = define(
    'deform_sample',
    '(Tensor x, Tensor pos) -> Tensor',
    lambda *args: run_backend('deform_sample', 'triton', 'forward', *args),
    lambda x, pos: x.new_empty((x.shape[0], pos.shape[2], x.shape[1])).transpose(1, 2),
)
deform_sample_backward_op = define(
    'deform_sample_backward',
    '(Tensor grad_out, Tensor x, Tensor pos) -> (Tensor, Tensor)',
    lambda *args: run_backend('deform_sample', 'triton', 'backward', *args),
    lambda grad_out, x, pos: (torch.empty_like(x), contiguous_like(pos)),
)
register_autograd(
    deform_sample_op,
    lambda ctx, grad_out: deform_sample_backward_op(grad_out, *ctx.saved_tensors),
    lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)
