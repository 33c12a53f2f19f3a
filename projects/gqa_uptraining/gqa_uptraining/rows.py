"""The rows of the experiment: what is trained and tested, and in which order."""

import dataclasses

SEEDS = (0, 1, 2)
# 24 epochs of 52 batches: the training of the multi-head detectors.
BASE_ITERS = 24 * 52
QUERY_HEADS = (2, 4, 8, 16)
# Per stage. A quarter of the two heads of stage 1 would be half a head: it is one.
KV_HEADS = {'half': (1, 2, 4, 8), 'quarter': (1, 1, 2, 4), 'one': (1, 1, 1, 1)}
ALPHAS = (0.01, 0.02, 0.05, 0.1, 0.2)
MERGES = ('mean', 'first', 'random', 'norm', 'aligned', 'aligned+refit')
# How a merged detector is trained, besides its own losses.
DISTILLED = 'mean+distillation'

# Chosen on the validation images with seed 0: see `selection_rows`.
UPTRAINING_LR = 3e-5
# Not chosen: the relative error of a layer as it is.
DISTILLATION_WEIGHT = 1.0


@dataclasses.dataclass(frozen=True)
class Row:
    """One detector, from its conversion or first weights to its mAP.

    Attributes:
        seed: Of the multi-head training and of everything after it.
        kv_heads: 'all' (multi-head) or a key of ``KV_HEADS``.
        method: 'multi-head', a merge, 'mean+distillation', or 'scratch', the grouped
            detector trained from first weights for 1 + alpha of the base's iterations.
        alpha: Iterations of uptraining, as a part of the base's.
        lr: Peak learning rate of uptraining.
        weight: Weight of the distillation loss.
    """

    seed: int
    kv_heads: str
    method: str
    alpha: float = 0.0
    lr: float = UPTRAINING_LR
    weight: float = DISTILLATION_WEIGHT

    @property
    def name(self) -> str:
        """Name of the row's result."""
        return f'seed{self.seed}_{self.kv_heads}_{self.method}_{self.alpha:g}'

    @property
    def training(self) -> str:
        """Name with the options that were chosen: another choice, another training."""
        name = f'{self.name}_lr{self.lr:g}'
        return f'{name}_weight{self.weight:g}' if self.method == DISTILLED else name

    @property
    def merge(self) -> str:
        """How heads are merged, 'mean' or one of the other ``MERGES``."""
        return 'mean' if self.method == DISTILLED else self.method

    @property
    def iters(self) -> int:
        """Iterations that this row trains."""
        uptraining = round(self.alpha * BASE_ITERS)
        if self.method in ('multi-head', 'scratch'):
            return BASE_ITERS + uptraining
        return uptraining

    @property
    def base(self) -> 'Row | None':
        """The row whose detector is converted."""
        if self.method in ('multi-head', 'scratch'):
            return None
        return base_row(self.seed)


def base_row(seed: int) -> Row:
    return Row(seed, 'all', 'multi-head')


def plan() -> list[Row]:
    """All rows, those that tell most for their time first."""
    rows = []
    for seed in SEEDS:
        rows.append(base_row(seed))
        rows += [Row(seed, kv_heads, 'mean') for kv_heads in KV_HEADS]
        rows += [Row(seed, 'one', merge) for merge in MERGES[1:]]
    for methods, alphas in (
        (('mean', DISTILLED), ALPHAS[:-1]),
        (MERGES[1:], (0.05, 0.1)),
        (('mean',), (0.2,)),
    ):
        for alpha in alphas:
            rows += [Row(seed, 'one', m, alpha) for seed in SEEDS for m in methods]
    for kv_heads in ('half', 'quarter'):
        rows += [Row(seed, kv_heads, 'mean', a) for a in ALPHAS[1:] for seed in SEEDS]
    for kv_heads in ('one', 'half', 'quarter'):
        rows += [Row(seed, kv_heads, 'scratch', 0.05) for seed in SEEDS]
    return rows


def selection_rows() -> list[Row]:
    """The rows that chose the learning rate, on the validation images.

    Beside them the detector before any uptraining, and two other weights of the
    distillation loss.
    """
    rows = [Row(0, 'one', 'mean')]
    rows += [Row(0, 'one', 'mean', 0.05, lr=lr) for lr in (3e-5, 1e-4, 3e-4, 1e-3)]
    weights = (0.3, DISTILLATION_WEIGHT, 3.0)
    return rows + [Row(0, 'one', DISTILLED, 0.05, weight=weight) for weight in weights]
