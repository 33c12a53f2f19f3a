"""What attention modules looked at while a model ran: points, weights, offsets.

The weights come from the operator that the model itself runs: attention is linear in
the values, so with one-hot values it returns its weights.
"""

import abc
import contextlib
import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from deform_gqa.models.layers import DeformableGQA, MSDeformAttn
from deform_gqa.models.layers.deformable_gqa import reference_points

# mmcv's module has the attributes of ours; by name, as mmcv's operators may be missing.
MS_DEFORM_CLASSES = ('MSDeformAttn', 'MultiScaleDeformableAttention')


@dataclasses.dataclass(frozen=True)
class RecordedAttention(abc.ABC):
    """One call of an attention module. All points are (x, y); the map spans [0, 1].

    Attributes:
        name: Of the module in the model.
        num_heads: Query heads Hq.
        query_points: (B, N, 2), where the queries are.
    """

    name: str
    num_heads: int
    query_points: Tensor

    @abc.abstractmethod
    def samples(self, image: int, query: int) -> tuple[Tensor, Tensor]:
        """What a query reads: points (Hq, n, 2) and their weights (Hq, n)."""

    def nearest_query(self, image: int, point: Sequence[float]) -> int:
        """The query whose place is nearest to a point (x, y) in [0, 1]."""
        points = self.query_points[image]
        return int((points - points.new_tensor(point)).square().sum(1).argmin())


@dataclasses.dataclass(frozen=True)
class SharedSamples(RecordedAttention):
    """A deformable block: all queries share the samples of their offset group.

    Attributes:
        reference: (S, 2), the grid that the offsets start from.
        sampled: (B, G, S, 2), where the map was sampled.
        attend: The module's attention of its queries, with other values.
        values: (B, Hkv, S, D), those that it had.
    """

    reference: Tensor
    sampled: Tensor
    attend: Callable[[Tensor], Tensor]
    values: Tensor

    @torch.no_grad()
    def weights(self, query: int) -> Tensor:
        """(B, Hq, S), the attention weights of one query."""
        keys, dim = self.values.shape[2:]
        parts = []
        for first in range(0, keys, dim):
            count = min(dim, keys - first)
            one_hot = torch.zeros_like(self.values)
            index = torch.arange(count, device=one_hot.device)
            one_hot[:, :, first + index, index] = 1
            parts.append(self.attend(one_hot)[:, :, query, :count])
        return torch.cat(parts, dim=-1)

    def samples(self, image: int, query: int) -> tuple[Tensor, Tensor]:
        points = self.sampled[image]
        heads_per_group = self.num_heads // len(points)
        return points.repeat_interleave(heads_per_group, 0), self.weights(query)[image]


@dataclasses.dataclass(frozen=True)
class OwnSamples(RecordedAttention):
    """Multi-scale deformable attention: each query has points of its own.

    Attributes:
        points: (B, N, M, L * P, 2).
        weights: (B, N, M, L * P).
    """

    points: Tensor
    weights: Tensor

    def samples(self, image: int, query: int) -> tuple[Tensor, Tensor]:
        return self.points[image, query], self.weights[image, query]


@contextlib.contextmanager
def record_attention(
    model: nn.Module, pattern: str = ''
) -> Iterator[dict[str, RecordedAttention]]:
    """Keeps what the deformable attention modules of a model do while it runs.

    Args:
        model: In eval mode. :class:`DeformableGQA` with offsets, :class:`MSDeformAttn`
            and mmcv's MultiScaleDeformableAttention are recorded.
        pattern: Regular expression that is searched for in the names of modules.

    Yields:
        A dict from names to records, filled by every run; the newest stays.

    Raises:
        ValueError: If no module has such a name, or the model is in training mode,
            where dropout would hide what is attended to.
    """
    if model.training:
        raise ValueError('record_attention needs a model in eval mode, got training')
    records: dict[str, RecordedAttention] = {}
    handles = [
        module.register_forward_pre_hook(_hook(record, name, records), with_kwargs=True)
        for name, module in model.named_modules()
        if re.search(pattern, name) and (record := _recorder(module)) is not None
    ]
    if not handles:
        raise ValueError(f'no deformable attention has a name that fits {pattern!r}')
    try:
        yield records
    finally:
        for handle in handles:
            handle.remove()


def _recorder(module: nn.Module) -> Callable[..., RecordedAttention] | None:
    if isinstance(module, DeformableGQA):
        return _record_shared if module.use_offset else None
    is_own = type(module).__name__ in MS_DEFORM_CLASSES
    return _record_own if is_own else None


def _hook(record, name: str, records: dict[str, RecordedAttention]):
    @torch.no_grad()
    def hook(module, args, kwargs):
        call = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        records[name] = record(name, module, **call)

    return hook


def _record_shared(name: str, module: DeformableGQA, x: Tensor) -> SharedSamples:
    size = tuple(x.shape[2:])
    q, k, v, pos = module.attention_inputs(x, module.proj_q(x))
    queries = torch.cartesian_prod(*(_centres(side, pos) for side in size))
    queries = queries.reshape(1, -1, 2).flip(-1).expand(len(x), -1, -1)
    return SharedSamples(
        name,
        module.num_heads,
        queries,
        _in_map(reference_points(module.key_grid(size), pos), size),
        _in_map(pos, size),
        lambda values: module.attend(q, k, values, pos, size),
        v,
    )


def _centres(side: int, like: Tensor) -> Tensor:
    return (torch.arange(side, dtype=like.dtype, device=like.device) + 0.5) / side


def _in_map(pos: Tensor, size: tuple[int, int]) -> Tensor:
    """Positions (y, x) with align_corners=True -> (x, y), where [0, 1] is the map."""
    sides = pos.new_tensor(size)
    return (((pos + 1) / 2 * (sides - 1) + 0.5) / sides).flip(-1)


def _record_own(
    name: str,
    module: nn.Module,
    query: Tensor,
    reference_points: Tensor,
    spatial_shapes: Tensor,
    query_pos: Tensor | None = None,
    **_,
) -> OwnSamples:
    query = query if query_pos is None else query + query_pos
    if not module.batch_first:
        query = query.transpose(0, 1)
    points = MSDeformAttn.sampling_locations(
        module, query, reference_points, spatial_shapes, query.dtype
    )
    heads = module.num_heads, module.num_levels * module.num_points
    weights = module.attention_weights(query).unflatten(2, heads).softmax(-1)
    return OwnSamples(
        name,
        module.num_heads,
        reference_points[:, :, 0, :2],
        points.flatten(3, 4),
        weights,
    )
