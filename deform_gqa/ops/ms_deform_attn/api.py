"""Public function of ms_deform_attn: checks, choice of the backend, dispatch."""

from collections.abc import Sequence

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
from .levels import check_levels, shapes_tensor, starts_tensor


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Tensor | Sequence[Sequence[int]],
    level_start_index: Tensor | Sequence[int] | None,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    *,
    logits: bool = False,
    backend: str = 'auto',
) -> Tensor:
    """Multi-scale deformable attention: weighted bilinear samples of several maps.

    ``out[b, q, m] = sum over levels l and points p of attention_weights[b, q, m, l, p]
    * map_l(sampling_locations[b, q, m, l, p])``, where the maps are those of the value
    head ``m // (M // Mv)``, with zeros outside. Differentiable, once, in value,
    locations and weights. A location that is not finite counts as far outside. A value
    or weight that is not makes outputs nan: those that it is part of and, with
    'torch', others of the same image.

    Args:
        value: (B, S, Mv, D), float16, bfloat16, float32 or float64: the maps of all
            levels, row-major, one after another. M % Mv == 0; mmcv's op has Mv == M.
        spatial_shapes: (L, 2), the (H, W) of each level, as a tensor of int32 or int64
            or as a list of pairs. A level may be empty.
        level_start_index: (L,), the first key of each level, as a tensor or a list;
            None computes it. The levels lie in order and without gaps.
        sampling_locations: (B, Q, M, L, P, 2) in (x, y), where [0, 1] spans a map from
            edge to edge (align_corners=False); float32 (float64 beside a float64
            value).
        attention_weights: (B, Q, M, L, P), in the dtype of value or of the locations.
        logits: The weights are logits, to be normalised over levels and points.
        backend: 'auto', 'naive', 'torch' or 'triton'.

    Returns:
        (B, Q, M * D), dtype of value, also under autocast.

    Raises:
        TypeError: For a tensor of the wrong dtype, or an option of the wrong type.
        ValueError: For shapes that do not fit, levels that do not add up to S, or a
            backend that cannot run the call. Levels on a GPU are not read for this:
            it would have to wait for them.

    Waiting for a GPU: 'triton' never does, as its kernels read the levels. 'naive' and
    'torch' read spatial_shapes and level_start_index on the host, and wait for those
    that are tensors on a GPU; for a list of pairs, and None or a list of starts, they
    do not. Backward of 'torch' waits for each tile, once its samples are sorted.

    Source: Deformable DETR (arXiv 2010.04159); the definition is that of
    ``mmcv.ops.multi_scale_deform_attn``.
    """
    shapes = shapes_tensor(spatial_shapes)
    starts = starts_tensor(level_start_index, shapes)
    _check_tensors(value, shapes, sampling_locations, attention_weights)
    if not isinstance(logits, bool):
        raise TypeError(f'logits must be True or False, got {logits!r}')
    on_host = shapes.device.type == starts.device.type == 'cpu'
    if on_host and not torch.compiler.is_compiling():  # reading breaks a graph
        check_levels(shapes.tolist(), starts.tolist(), value.shape[1])
    backend = choose_backend(
        'ms_deform_attn',
        backend,
        device=value.device,
        dtype=value.dtype,
        head_dim=value.shape[3],
    )
    if backend == 'naive':
        with without_autocast(value.device):
            return naive.ms_deform_attn(
                value,
                shapes,
                starts,
                sampling_locations,
                attention_weights,
                logits=logits,
            )
    if backend == 'triton':  # the kernels read them
        shapes = shapes.to(value.device, non_blocking=True)
        starts = starts.to(value.device, non_blocking=True)
    return ms_deform_attn_op(
        value, shapes, starts, sampling_locations, attention_weights, logits, backend
    )


def _check_tensors(
    value: Tensor, shapes: Tensor, locations: Tensor, weights: Tensor
) -> None:
    checks.check_tensor('value', value, 'B S Mv D')
    checks.check_channels('value', value)
    checks.check_tensor('sampling_locations', locations, 'B Q M L P 2')
    checks.check_tensor('attention_weights', weights, 'B Q M L P')
    _, num_queries, heads, _, points, _ = locations.shape
    checks.check_shape(
        'sampling_locations',
        locations,
        (value.shape[0], num_queries, heads, shapes.shape[0], points, 2),
        '(B, Q, M, L, P, 2)',
    )
    checks.check_shape(
        'attention_weights', weights, locations.shape[:-1], '(B, Q, M, L, P)'
    )
    if 0 in locations.shape[3:5]:
        raise ValueError(
            'sampling_locations must have levels and points, '
            f'got {tuple(locations.shape)}'
        )
    value_heads = value.shape[2]
    if value_heads == 0 or heads == 0 or heads % value_heads:
        raise ValueError(
            f'the {heads} heads of sampling_locations must be a positive multiple of '
            f'the heads of value, got {value_heads}'
        )
    checks.check_coordinate_dtype('sampling_locations', locations, value)
    if weights.dtype not in (value.dtype, locations.dtype):
        raise TypeError(
            f'attention_weights must have the dtype of value ({value.dtype}) or of '
            f'sampling_locations ({locations.dtype}), got {weights.dtype}'
        )
    checks.check_device('sampling_locations', locations, 'value', value)
    checks.check_device('attention_weights', weights, 'value', value)


_ARGUMENTS = (
    'Tensor value, Tensor spatial_shapes, Tensor level_start_index, '
    'Tensor sampling_locations, Tensor attention_weights, bool logits, str backend'
)


def _run(direction: str, *args):
    *args, backend = args
    return run_backend('ms_deform_attn', backend, direction, *args)


def _fake_forward(value, shapes, starts, locations, weights, logits, backend):
    batch, num_queries, heads = locations.shape[:3]
    return value.new_empty((batch, num_queries, heads * value.shape[3]))


def _fake_backward(grad_out, out, value, shapes, starts, locations, weights, *options):
    return tuple(contiguous_like(x) for x in (value, locations, weights))


ms_deform_attn_op = define(
    'ms_deform_attn',
    f'({_ARGUMENTS}) -> Tensor',
    lambda *args: _run('forward', *args),
    _fake_forward,
)
ms_deform_attn_backward_op = define(
    'ms_deform_attn_backward',
    f'(Tensor grad_out, Tensor out, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)',
    lambda *args: _run('backward', *args),
    _fake_backward,
)


def _save(ctx, inputs, output):
    *tensors, logits, backend = inputs
    ctx.save_for_backward(output, *tensors)
    ctx.options = logits, backend


def _differentiate(ctx, grad_out):
    grads = ms_deform_attn_backward_op(grad_out, *ctx.saved_tensors, *ctx.options)
    grad_value, grad_locations, grad_weights = grads
    return grad_value, None, None, grad_locations, grad_weights, None, None


register_autograd(ms_deform_attn_op, _differentiate, _save)
