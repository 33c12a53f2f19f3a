"""What computes a case: the backends of our ops, and baselines built from torch.

'naive' is the eager official formulation and the reference of every table.
'sdpa-bias' is torch's fused attention with the bias of all pairs in memory,
'flex' is FlexAttention with the bias computed in its score function. A case lists what
else computes it in ``baselines``.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from deform_gqa.ops.common.heads import repeat_kv

from .case import Baseline, Call, OpCase


def sdpa_with_bias(tensors: Mapping[str, Tensor], bias: Tensor) -> Tensor:
    """torch's fused attention with a bias (B or 1, Hq, N, S) for all pairs."""
    q = tensors['q']
    # The fused kernels that take a bias know no grouped heads.
    k, v = (repeat_kv(tensors[name], q.shape[1]) for name in ('k', 'v'))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))


def compiled_flex_attention():
    """FlexAttention compiled for the next shapes alone.

    Past its limit of recompilations torch.compile would fall back to an unfused
    version: every case starts from an empty cache.
    """
    from torch.nn.attention.flex_attention import flex_attention

    torch.compiler.reset()
    return torch.compile(flex_attention, dynamic=False)


def flex_baseline(make: Callable[[OpCase, Callable], Call]) -> Baseline:
    """FlexAttention; ``make`` takes a case and the compiled function."""
    return Baseline(
        lambda case: make(case, compiled_flex_attention()), _no_flex_on_cpus
    )


def _no_flex_on_cpus(
    case: OpCase, device: torch.device, dtype: torch.dtype
) -> str | None:
    if device.type == 'cuda':
        return None
    return 'FlexAttention has no backward pass on CPUs'
