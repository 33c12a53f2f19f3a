"""What a case of an op is: its shapes, options, least work, baselines and labels.

Each op has a module with its subclass; ``registry`` lists them. Letters as in
``deform_gqa.ops``. Image sizes are (height, width).
"""

import abc
import argparse
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from deform_gqa.archs import NUM_STAGES, resolve_arch

from ..core.errors import OptionError
from ..core.fields import Fields, kv_heads_text, size_text
from ..core.kv_heads import kv_head_count, kv_head_counts

if TYPE_CHECKING:
    from .options import OpOptions

ARCH = resolve_arch('t++')
STAGES = tuple(range(1, NUM_STAGES + 1))
HEAD_DIM = ARCH['embed_dims'][0] // ARCH['num_heads'][0]
STEM_STRIDE = 4

Spec = tuple[tuple[int, ...], torch.dtype]
Call = Callable[[Mapping[str, Tensor]], Tensor]


def stage_map(image_size: tuple[int, int], stage: int) -> tuple[int, int]:
    """Map of a stage (1 to 4); every stride-2 convolution rounds up."""
    stride = STEM_STRIDE * 2 ** (stage - 1)
    height, width = (math.ceil(side / stride) for side in image_size)
    return height, width


def halved_size(size: tuple[int, int], least: int) -> tuple[int, int]:
    """Half a size, rounded up, and not below ``least``."""
    height, width = (max(math.ceil(side / 2), min(side, least)) for side in size)
    return height, width


@dataclasses.dataclass(frozen=True)
class Baseline:
    """Other people's code that computes an op, as it is measured beside ours.

    Attributes:
        call: From a case to the function of its tensors.
        unsupported_reason: From (case, device, dtype) to why it cannot, or None.
        is_available: Whether it is measured without being named.
        constants: Inputs that it gives no gradients of.
    """

    call: Callable[[Any], Call]
    unsupported_reason: Callable[..., str | None] = lambda *_: None
    is_available: Callable[[], bool] = lambda: True
    constants: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class OpCase(abc.ABC):
    """One call of an op, without its backend; a subclass defines what is abstract here.

    Attributes:
        op: Name of the op.
        baselines: Other people's code that computes it, by name.
        coordinates: Inputs whose gradients have kinks; the gate is more lenient.
        sweep_options: Options of ``gqa-sweep`` that have an effect on the op.
        options_name: What the report calls the op's own options, if it has some.
        products: Products of D multiply-adds a pair, in forward and in backward.
        sampled_maps: Maps that a sample is taken from.
        has_softmax: The op normalises the weights; else they are an argument.
    """

    op: ClassVar[str]
    baselines: ClassVar[dict[str, Baseline]] = {}
    coordinates: ClassVar[tuple[str, ...]] = ()
    sweep_options: ClassVar[tuple[str, ...]] = ()
    options_name: ClassVar[str | None] = None
    # q k^T and P v; then once more q k^T, and dO v^T, P^T dO, dS k, dS^T q.
    products: ClassVar[tuple[int, int]] = (2, 5)
    sampled_maps: ClassVar[int] = 2  # of keys and of values
    has_softmax: ClassVar[bool] = True

    batch: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    grid_size: tuple[int, int]

    # The case

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """Unique among the cases of all ops."""

    @property
    @abc.abstractmethod
    def subject(self) -> str:
        """The case in words, for all numbers of kv heads."""

    @property
    def num_queries(self) -> int:
        """N; of all query views together, where the op has several."""
        return math.prod(self.grid_size)

    @property
    @abc.abstractmethod
    def keys_per_query(self) -> int:
        """Keys that a query attends to: S, or K * K."""

    @property
    def pairs(self) -> int:
        """(query, key, head) pairs: exponentials of a forward pass."""
        return self.batch * self.num_heads * self.num_queries * self.keys_per_query

    @property
    def samples(self) -> int:
        """Vectors that the call samples from each of its ``sampled_maps``."""
        return 0

    @abc.abstractmethod
    def input_specs(self, dtype: torch.dtype) -> dict[str, Spec]:
        """Shape and dtype of every tensor argument, all of them differentiable."""

    def input_bytes(self, dtype: torch.dtype) -> dict[str, int]:
        """What each tensor argument takes."""
        return {
            name: math.prod(shape) * tensor_dtype.itemsize
            for name, (shape, tensor_dtype) in self.input_specs(dtype).items()
        }

    def output_spec(self, dtype: torch.dtype) -> Spec:
        """Shape and dtype of the output: those of q, if the case says nothing else."""
        return self.input_specs(dtype)['q']

    def output_bytes(self, dtype: torch.dtype) -> int:
        shape, dtype = self.output_spec(dtype)
        return math.prod(shape) * dtype.itemsize

    @abc.abstractmethod
    def options(self) -> dict[str, Any]:
        """The other arguments of the op."""

    def make_inputs(
        self, device: torch.device, dtype: torch.dtype, seed: int = 0
    ) -> dict[str, Tensor]:
        """Random arguments; same seed, same values.

        Those of ``input_specs`` require gradients; a case may add tensors of integers.
        """
        generator = torch.Generator(device).manual_seed(seed)
        return {
            name: torch.randn(shape, generator=generator, device=device)
            .to(dtype_of_input)
            .requires_grad_()
            for name, (shape, dtype_of_input) in self.input_specs(dtype).items()
        }

    def make_grad_out(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Random gradient of the output."""
        shape, dtype = self.output_spec(dtype)
        return torch.randn(shape, dtype=dtype, device=device)

    def pair_values(self, backend: str) -> float:
        """About how many float32 values of pairs are in memory at the peak.

        0 for a backend that is fused. Measured: the eager formulation, and SDPA with a
        bias in memory, hold 4 tensors with a value for each pair.
        """
        return 5 * self.pairs if backend in ('naive', 'sdpa-bias') else 0

    def halved(self) -> 'OpCase':
        """The case on a map of half the sides; itself when it cannot shrink."""
        return self

    def reduced(self, max_pairs: int) -> 'OpCase':
        """The case at batch 1, on a map so small that it has ``max_pairs`` pairs."""
        case: OpCase = dataclasses.replace(self, batch=1)
        while case.pairs > max_pairs and (smaller := case.halved()) != case:
            case = smaller
        return case

    # The report

    def describe(self) -> dict[str, Any]:
        """What the report says of the case, beside its name."""
        return {
            'op': self.op,
            **dataclasses.asdict(self),
            'num_queries': self.num_queries,
            'keys_per_query': self.keys_per_query,
        }

    @classmethod
    def fields(cls, described: Mapping[str, Any]) -> Fields:
        """What tells a described case from others."""
        return {
            'batch': described['batch'],
            'kv heads': kv_heads_text(
                described['num_kv_heads'], described['num_heads']
            ),
        }

    # The suites

    @classmethod  # noqa: B027  most ops have none
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Options of this op alone; the default None stands for cases of its own."""

    @classmethod
    def resolve_options(cls, args: argparse.Namespace) -> Any:
        """The op's own options, checked; ``OpOptions.own`` has them by op."""
        return None

    @classmethod
    def select(cls, options: 'OpOptions') -> 'list[OpCase]':
        """The cases that the options ask for, once each; none of a sweep's own op."""
        return []

    @classmethod
    @abc.abstractmethod
    def for_sweep(cls, **options: Any) -> 'OpCase':
        """The case to measure over its kv heads.

        Args:
            options: 'stage' of DAT-T++, 'size' of the image, 'batch' (None: the case
                chooses), 'quick', and 'cuda': whether the device is a GPU.
        """


@dataclasses.dataclass(frozen=True)
class StageCase(OpCase):
    """A call of the layers of a stage of DAT-T++.

    Attributes:
        letter: Of the blocks of the arch that make the call.
        layers: Layers of a backbone that make this call, for the totals.
    """

    letter: ClassVar[str]
    sweep_options: ClassVar[tuple[str, ...]] = ('sizes', 'stage')

    image_size: tuple[int, int]
    stage: int
    layers: int

    @property
    def name(self) -> str:
        return (
            f'{self.op}/{size_text(self.image_size)}/stage{self.stage}/b{self.batch}'
            f'/kv{self.num_kv_heads}of{self.num_heads}'
        )

    @property
    def subject(self) -> str:
        return (
            f'{self.op}, stage {self.stage} of DAT-T++, {size_text(self.image_size)} '
            f'px, batch {self.batch}, {self.num_heads} query heads of {self.head_dim}'
        )

    @classmethod
    def fields(cls, described: Mapping[str, Any]) -> Fields:
        image = size_text(described['image_size'])
        return {
            'stage': described['stage'],
            'image': image,
            **super().fields(described),
        }

    @classmethod
    def layers_of(cls, stage: int) -> int:
        return ARCH['block_types'][stage - 1].count(cls.letter)

    @classmethod
    def stages(cls) -> list[int]:
        """Stages that hold layers of the op."""
        return [stage for stage in STAGES if cls.layers_of(stage)]

    @classmethod
    @abc.abstractmethod
    def own_fields(cls, stage: int, grid_size: tuple[int, int]) -> dict[str, Any]:
        """Fields of the subclass; may replace the grid size."""

    @classmethod
    def at_stage(
        cls, image_size: tuple[int, int], stage: int, batch: int, kv_heads: str | int
    ) -> 'StageCase':
        """The layers of a stage; kv heads as in ``kv_heads.kv_head_count``."""
        heads, grid_size = ARCH['num_heads'][stage - 1], stage_map(image_size, stage)
        values = dict(
            batch=batch,
            num_heads=heads,
            num_kv_heads=kv_head_count(heads, str(kv_heads)),
            head_dim=HEAD_DIM,
            grid_size=grid_size,
            image_size=image_size,
            stage=stage,
            layers=cls.layers_of(stage),
        )
        return cls(**{**values, **cls.own_fields(stage, grid_size)})

    @classmethod
    def select(cls, options: 'OpOptions') -> 'list[OpCase]':
        return cls.combinations(
            options.sizes, options.stages, options.batch_sizes, options.kv_heads
        )

    @classmethod
    def combinations(
        cls,
        sizes: Sequence[tuple[int, int]],
        stages: Sequence[int],
        batch_sizes: Sequence[int],
        kv_heads: Sequence[str],
    ) -> 'list[OpCase]':
        """Every combination that exists, once, in the order given.

        Raises:
            OptionError: If there is none.
        """
        found = [
            cls.at_stage(size, stage, batch, count)
            for size in sizes
            for batch in batch_sizes
            for stage in stages
            if stage in cls.stages()
            for count in kv_head_counts(ARCH['num_heads'][stage - 1], kv_heads)
        ]
        if not found:
            raise OptionError(f'{cls.op} has no case at stages {list(stages)}')
        return list(dict.fromkeys(found))

    @classmethod
    def for_sweep(
        cls, *, stage: int, size: tuple[int, int], batch: int | None, **_: Any
    ) -> OpCase:
        if stage not in cls.stages():
            raise OptionError(f'{cls.op} has no case at stages {[stage]}')
        return cls.at_stage(size, stage, 1 if batch is None else batch, 'full')
