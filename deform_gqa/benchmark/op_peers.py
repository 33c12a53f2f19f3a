"""What computes a case: the backends of our ops, and peers built from torch.

'naive' is the eager official formulation and the yardstick of every table.
'sdpa-bias' is torch's fused attention with the bias of all pairs in memory,
'flex' is FlexAttention with the bias computed in its score function. 'published' is
the fused kernel of deform_sdpa that others published, see ``published_sdpa``.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from deform_gqa import ops
from deform_gqa.ops.deform_attn import naive
from deform_gqa.profiling.memory import available_cpu_mib

from . import published_sdpa
from .flex_peers import (
    FlexDeformAttn,
    FlexNeighborhoodAttn,
    compiled_flex_attention,
)
from .op_cases import DeformAttnCase, NeighborhoodAttnCase, OpCase
from .sdpa_cases import DeformSdpaCase

BASELINE = 'naive'
OWN_BACKENDS = ('naive', 'torch', 'triton')
PEERS = ('sdpa-bias', 'flex', published_sdpa.NAME)
BACKENDS = OWN_BACKENDS + PEERS

Call = Callable[[Mapping[str, Tensor]], Tensor]
# Tensors of one float32 value a pair that are alive at the peak; measured: 4.
_PAIR_TENSORS = {'naive': 5, 'sdpa-bias': 5}
_MIB = 2**20


def unsupported_reason(
    case: OpCase, backend: str, device: torch.device, dtype: torch.dtype
) -> str | None:
    """Why ``backend`` cannot compute ``case``, or None."""
    if backend in OWN_BACKENDS:
        return ops.unsupported_reason(
            case.op, backend, device=device, dtype=dtype, head_dim=case.head_dim
        )
    if isinstance(case, DeformSdpaCase):
        if backend == published_sdpa.NAME:
            return published_sdpa.unsupported_reason(case, device, dtype)
        return f'{backend} cannot sample keys for each query'
    if backend == published_sdpa.NAME:
        return f'the published kernel computes {DeformSdpaCase.op} alone'
    if backend == 'flex' and device.type != 'cuda':
        return 'FlexAttention has no backward pass on CPUs'
    return None


def default_backends() -> tuple[str, ...]:
    """All, the published kernel only if the user has it."""
    absent = published_sdpa.NAME if published_sdpa.folder() is None else None
    return tuple(backend for backend in BACKENDS if backend != absent)


def inputs_of(backend: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inputs, those detached that ``backend`` has no gradients of."""
    constant = published_sdpa.WITHOUT_GRADIENT if backend == published_sdpa.NAME else ()
    return {n: x.detach() if n in constant else x for n, x in inputs.items()}


def materialised_mib(case: OpCase, backend: str) -> float:
    """About what the tensors with a value a pair take; 0 for a fused backend."""
    if backend not in _PAIR_TENSORS:
        return 0.0
    values = case.pairs * _PAIR_TENSORS[backend]
    if isinstance(case, DeformSdpaCase):  # the sampled keys and values, with copies
        values = case.pairs * case.head_dim * 4
    if isinstance(case, NeighborhoodAttnCase):
        if backend == 'naive':  # gathers the keys and values of every window
            values = case.pairs * case.head_dim * 4
        else:  # a dense mask, the same for all images, and its gradient
            values = 4 * case.num_heads * case.num_queries**2
    return values * 4 / _MIB


def out_of_memory_reason(
    case: OpCase, backend: str, device: torch.device
) -> str | None:
    """Why the call would not fit into free memory, or None."""
    needed = materialised_mib(case, backend)
    if device.type == 'cuda':
        free: float | None = _free_cuda_mib(device)
    else:
        free = available_cpu_mib()
    if free is None or needed <= free:
        return None
    return f'needs about {needed / 1024:.1f} GiB, {free / 1024:.1f} GiB are free'


def _free_cuda_mib(device: torch.device) -> float:
    """Free memory, and what torch has reserved and does not use."""
    reserved = torch.cuda.memory_reserved(device)
    unused = reserved - torch.cuda.memory_allocated(device)
    return (torch.cuda.mem_get_info(device)[0] + unused) / _MIB


def make_call(case: OpCase, backend: str) -> Call:
    """The function from the case's tensors to its output.

    Raises:
        ValueError: For a backend that does not exist.
    """
    if backend in OWN_BACKENDS:
        op = getattr(ops, case.op)
        return lambda tensors: op(**tensors, **case.options(), backend=backend)
    if backend not in PEERS:
        raise ValueError(f'backend must be one of {BACKENDS}, got {backend!r}')
    if isinstance(case, DeformAttnCase):
        if backend == 'flex':
            return FlexDeformAttn(case, compiled_flex_attention())
        return lambda tensors: sdpa_deform_attn(case, tensors)
    if isinstance(case, NeighborhoodAttnCase):
        if backend == 'flex':
            return FlexNeighborhoodAttn(case, compiled_flex_attention())
        return lambda tensors: sdpa_neighborhood_attn(case, tensors)
    if isinstance(case, DeformSdpaCase) and backend == published_sdpa.NAME:
        return published_sdpa.call(case)
    raise ValueError(f'{backend!r} is not written for {case.op}')


def _sdpa(tensors: Mapping[str, Tensor], bias: Tensor) -> Tensor:
    q = tensors['q']
    # The fused kernels that take a bias know no grouped heads.
    k, v = (naive.repeat_kv(tensors[name], q.shape[1]) for name in ('k', 'v'))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))


def sdpa_deform_attn(case: DeformAttnCase, tensors: Mapping[str, Tensor]) -> Tensor:
    """SDPA with the interpolated bias (B, Hq, N, S) in memory."""
    bias = naive.interpolated_bias(tensors['pos'], tensors['rpb_table'], case.grid_size)
    return _sdpa(tensors, bias)


def sdpa_neighborhood_attn(
    case: NeighborhoodAttnCase, tensors: Mapping[str, Tensor]
) -> Tensor:
    """SDPA with a dense bias (1, Hq, N, N), minus infinity outside the windows."""
    rpb, size = tensors['rpb'], case.kernel_size
    height, width = case.grid_size
    steps = torch.arange(size, device=rpb.device)
    rows, cols = (
        naive.window_start(side, size, 1, rpb.device)[:, None] + steps
        for side in (height, width)
    )
    offset_y = rows - torch.arange(height, device=rpb.device)[:, None] + size - 1
    offset_x = cols - torch.arange(width, device=rpb.device)[:, None] + size - 1
    # (H, 1, K, 1) and (1, W, 1, K): a window a query
    keys = rows[:, None, :, None] * width + cols[None, :, None, :]
    values = rpb[:, offset_y[:, None, :, None], offset_x[None, :, None, :]]
    keys = keys.reshape(1, case.num_queries, -1).expand(case.num_heads, -1, -1)
    dense = rpb.new_full((case.num_heads, case.num_queries, case.num_queries), -1e30)
    dense = dense.scatter(2, keys, values.flatten(3).flatten(1, 2))
    return _sdpa(tensors, dense.unsqueeze(0))
