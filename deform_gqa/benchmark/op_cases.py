"""The shapes at which ops are measured: those of the stages of DAT-T++.

``sdpa_cases`` has those of deform_sdpa. Letters as in ``deform_gqa.ops.naive``. Image
sizes are (height, width).
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .errors import OptionError

STAGES = (1, 2, 3, 4)
KV_HEADS = ('full', 'half', 'one', 'sweep')
HEAD_DIM = 32
NUM_HEADS = (2, 4, 8, 16)
OFFSET_GROUPS = (1, 2, 4, 8)
STRIDES = (8, 4, 2, 1)
# Maps of a 224 x 224 image, which the bias tables are made for and keep.
TABLE_SIZES = (56, 28, 14, 7)
KERNEL_SIZE = 7
STEM_STRIDE = 4
# Of one backbone: deformable layers, and neighborhood layers, in each stage.
DEFORM_LAYERS = (1, 2, 9, 2)
NEIGHBORHOOD_LAYERS = (1, 2, 9, 0)
# Keeps positions off the edges, where the bias of tables of native size has kinks.
MAX_POSITION = 0.99

Spec = tuple[tuple[int, ...], torch.dtype]


def stage_map(image_size: tuple[int, int], stage: int) -> tuple[int, int]:
    """Map of a stage (1 to 4); every stride-2 convolution rounds up."""
    stride = STEM_STRIDE * 2 ** (stage - 1)
    height, width = (math.ceil(side / stride) for side in image_size)
    return height, width


def count_kv_heads(num_heads: int, choice: str | int) -> int:
    """Number of kv heads for 'full', 'half' or 'one'; a number stands for itself."""
    if isinstance(choice, int):
        return choice
    return {'full': num_heads, 'half': max(num_heads // 2, 1), 'one': 1}[choice]


def kv_head_counts(num_heads: int, choices: Iterable[str]) -> list[int]:
    """Numbers of kv heads, once each; 'sweep' is all, and halves down to one."""
    counts: list[int] = []
    for choice in choices:
        if choice == 'sweep':
            halvings = range(num_heads.bit_length())
            shares = [num_heads >> n for n in halvings if num_heads % (1 << n) == 0]
            counts += [*shares, 1]
        else:
            counts.append(count_kv_heads(num_heads, choice))
    return list(dict.fromkeys(counts))


@dataclasses.dataclass(frozen=True)
class OpCase:
    """One call of an op, without its backend.

    The base of one class for each op, which defines what raises here.
    """

    op: ClassVar[str]

    batch: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    grid_size: tuple[int, int]

    @property
    def name(self) -> str:
        """Unique among the cases of all ops."""
        raise NotImplementedError

    @property
    def num_queries(self) -> int:
        """N; of all query views together, where the op has several."""
        return math.prod(self.grid_size)

    @property
    def keys_per_query(self) -> int:
        raise NotImplementedError

    @property
    def pairs(self) -> int:
        """(query, key, head) pairs: exponentials of a forward pass."""
        return self.batch * self.num_heads * self.num_queries * self.keys_per_query

    @property
    def samples(self) -> int:
        """Vectors that the call samples from the key maps; as many from the others."""
        return 0

    def input_specs(self, dtype: torch.dtype) -> dict[str, Spec]:
        """Shape and dtype of every tensor argument, all of them differentiable."""
        raise NotImplementedError

    def options(self) -> dict[str, Any]:
        """The other arguments of the op."""
        raise NotImplementedError

    def halved(self) -> 'OpCase':
        """The case on a map of half the sides; itself when it cannot shrink."""
        raise NotImplementedError

    def reduced(self, max_pairs: int) -> 'OpCase':
        """The case at batch 1, on a map so small that it has ``max_pairs`` pairs."""
        case: OpCase = dataclasses.replace(self, batch=1)
        while case.pairs > max_pairs and (smaller := case.halved()) != case:
            case = smaller
        return case

    def make_inputs(
        self, device: torch.device, dtype: torch.dtype, seed: int = 0
    ) -> dict[str, Tensor]:
        """Random arguments that require gradients; same seed, same values."""
        generator = torch.Generator(device).manual_seed(seed)
        return {
            name: torch.randn(shape, generator=generator, device=device)
            .to(dtype_of_input)
            .requires_grad_()
            for name, (shape, dtype_of_input) in self.input_specs(dtype).items()
        }

    def describe(self) -> dict[str, Any]:
        """For the report."""
        return {
            'name': self.name,
            'op': self.op,
            **dataclasses.asdict(self),
            'num_queries': self.num_queries,
            'keys_per_query': self.keys_per_query,
        }


@dataclasses.dataclass(frozen=True)
class StageCase(OpCase):
    """A call of the layers of a stage.

    Attributes:
        layers: Layers of a backbone that make this call, for the totals.
    """

    image_size: tuple[int, int]
    stage: int
    layers: int

    @property
    def name(self) -> str:
        height, width = self.image_size
        return (
            f'{self.op}/{height}x{width}/stage{self.stage}/b{self.batch}'
            f'/kv{self.num_kv_heads}of{self.num_heads}'
        )


@dataclasses.dataclass(frozen=True)
class DeformAttnCase(StageCase):
    """Deformable attention; key_grid is the grid of the S sampled keys."""

    op: ClassVar[str] = 'deform_attn'

    offset_groups: int
    key_grid: tuple[int, int]
    table_size: tuple[int, int]

    @property
    def keys_per_query(self) -> int:
        """S."""
        return math.prod(self.key_grid)

    def input_specs(self, dtype: torch.dtype) -> dict[str, Spec]:
        kv = (self.batch, self.num_kv_heads, self.keys_per_query, self.head_dim)
        return {
            'q': ((self.batch, self.num_heads, self.num_queries, self.head_dim), dtype),
            'k': (kv, dtype),
            'v': (kv, dtype),
            'pos': (
                (self.batch, self.offset_groups, self.keys_per_query, 2),
                torch.float32,
            ),
            'rpb_table': ((self.num_heads, *self.table_size), torch.float32),
        }

    def options(self) -> dict[str, Any]:
        return {'grid_size': self.grid_size, 'pos_in_range': True}

    def halved(self) -> 'DeformAttnCase':
        return dataclasses.replace(
            self,
            grid_size=halved_size(self.grid_size, least=2),
            key_grid=halved_size(self.key_grid, least=2),
        )

    def make_inputs(
        self, device: torch.device, dtype: torch.dtype, seed: int = 0
    ) -> dict[str, Tensor]:
        inputs = super().make_inputs(device, dtype, seed)
        # Offsets of about one cell around a regular grid: the locality of real ones.
        axes = [torch.linspace(-1, 1, n, device=device) for n in self.key_grid]
        grid = torch.stack(torch.meshgrid(*axes, indexing='ij'), dim=-1).view(-1, 2)
        cell = torch.tensor([1 / n for n in self.key_grid], device=device)
        pos = grid + inputs['pos'].detach() * cell
        pos = pos.clamp(-MAX_POSITION, MAX_POSITION)
        return {**inputs, 'pos': pos.requires_grad_()}


@dataclasses.dataclass(frozen=True)
class NeighborhoodAttnCase(StageCase):
    """Neighborhood attention of kernel_size x kernel_size keys."""

    op: ClassVar[str] = 'neighborhood_attn'

    kernel_size: int

    @property
    def keys_per_query(self) -> int:
        return self.kernel_size**2

    def input_specs(self, dtype: torch.dtype) -> dict[str, Spec]:
        kv = (self.batch, self.num_kv_heads, self.num_queries, self.head_dim)
        side = 2 * self.kernel_size - 1
        return {
            'q': ((self.batch, self.num_heads, self.num_queries, self.head_dim), dtype),
            'k': (kv, dtype),
            'v': (kv, dtype),
            'rpb': ((self.num_heads, side, side), torch.float32),
        }

    def options(self) -> dict[str, Any]:
        return {'grid_size': self.grid_size, 'kernel_size': self.kernel_size}

    def halved(self) -> 'NeighborhoodAttnCase':
        grid_size = halved_size(self.grid_size, least=self.kernel_size)
        return dataclasses.replace(self, grid_size=grid_size)


def halved_size(size: tuple[int, int], least: int) -> tuple[int, int]:
    """Half a size, rounded up, and not below ``least``."""
    height, width = (max(math.ceil(side / 2), min(side, least)) for side in size)
    return height, width


def _common(
    image_size: tuple[int, int], stage: int, batch: int, kv_heads: str | int
) -> dict[str, Any]:
    num_heads = NUM_HEADS[stage - 1]
    return dict(
        image_size=image_size,
        stage=stage,
        batch=batch,
        num_heads=num_heads,
        num_kv_heads=count_kv_heads(num_heads, kv_heads),
        head_dim=HEAD_DIM,
        grid_size=stage_map(image_size, stage),
    )


def deform_attn_case(
    image_size: tuple[int, int], stage: int, batch: int, kv_heads: str | int
) -> DeformAttnCase:
    """The deformable layers of a stage of DAT-T++."""
    height, width = stage_map(image_size, stage)
    stride = STRIDES[stage - 1]
    table_side = 2 * TABLE_SIZES[stage - 1] - 1
    return DeformAttnCase(
        **_common(image_size, stage, batch, kv_heads),
        layers=DEFORM_LAYERS[stage - 1],
        offset_groups=OFFSET_GROUPS[stage - 1],
        key_grid=(math.ceil(height / stride), math.ceil(width / stride)),
        table_size=(table_side, table_side),
    )


def neighborhood_attn_case(
    image_size: tuple[int, int], stage: int, batch: int, kv_heads: str | int
) -> NeighborhoodAttnCase | None:
    """The neighborhood layers of a stage of DAT-T++; None for stage 4 (has none)."""
    if stage not in STAGES_OF['neighborhood_attn']:
        return None
    common = _common(image_size, stage, batch, kv_heads)
    height, width = common['grid_size']
    # The backbone pads maps that are smaller than a window.
    common['grid_size'] = (max(height, KERNEL_SIZE), max(width, KERNEL_SIZE))
    return NeighborhoodAttnCase(
        **common, layers=NEIGHBORHOOD_LAYERS[stage - 1], kernel_size=KERNEL_SIZE
    )


CaseFactory = Callable[[tuple[int, int], int, int, str | int], OpCase | None]
CASES: dict[str, CaseFactory] = {
    'deform_attn': deform_attn_case,
    'neighborhood_attn': neighborhood_attn_case,
}


# Stages that hold layers of each op.
STAGES_OF = {
    'deform_attn': {1, 2, 3, 4},
    'neighborhood_attn': {1, 2, 3},
}


def select_cases(
    ops: Iterable[str],
    sizes: Sequence[tuple[int, int]],
    stages: Sequence[int],
    batch_sizes: Sequence[int],
    kv_heads: Sequence[str],
) -> list[OpCase]:
    """Every combination that exists, once, in the order given.

    Raises:
        OptionError: For an unknown op, or if an op has no case among these.
    """
    cases: dict[str, OpCase] = {}
    for op in ops:
        if op not in CASES:
            raise OptionError(f'unknown op {op!r}; there are {", ".join(CASES)}')
        found = [
            CASES[op](size, stage, batch, heads)
            for size in sizes
            for batch in batch_sizes
            for stage in stages
            for heads in kv_head_counts(NUM_HEADS[stage - 1], kv_heads)
        ]
        if not any(found):
            raise OptionError(f'{op} has no case at stages {list(stages)}')
        cases.update((case.name, case) for case in found if case is not None)
    return list(cases.values())
