"""A search over kv heads, offset groups and samples under a budget of latency."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from deform_gqa.archs import resolve_arch

from .training import latency_ms, make_config, train_and_test

if TYPE_CHECKING:
    import optuna

# Part of the query heads of each stage; at least one is left
KV_HEADS = {'all': 1, 'half': 2, 'quarter': 4, 'one': 16}
OFFSET_GROUPS = {'query heads': 1, 'half': 2, 'quarter': 4, 'one': 16}
# Factor of the strides between sampled positions
STRIDES = (1, 2, 4)
STUDY = 'gqa_variants'


def suggest_backbone(trial: 'optuna.Trial') -> dict[str, Any]:
    """Options of the backbone that a trial chooses."""
    arch = resolve_arch('mini')
    heads = arch['num_heads']
    kv = KV_HEADS[trial.suggest_categorical('kv_heads', list(KV_HEADS))]
    groups = OFFSET_GROUPS[
        trial.suggest_categorical('offset_groups', list(OFFSET_GROUPS))
    ]
    factor = trial.suggest_categorical('stride_factor', list(STRIDES))
    arch['offset_groups'] = tuple(max(1, n // groups) for n in heads)
    arch['strides'] = tuple(stride * factor for stride in arch['strides'])
    return dict(arch=arch, num_kv_heads=tuple(max(1, n // kv) for n in heads))


def search(folder: Path, budget_ms: float, trials: int, epochs: int) -> dict[str, Any]:
    """Goes on with the study in a folder until it has so many trials.

    A trial over the budget is given up before it is trained, a training that was
    interrupted counts for nothing.

    Args:
        folder: Holds ``study.db``, the trainings, and ``history.png``.
        budget_ms: Largest latency.
        trials: Number of trials, with those of former calls.
        epochs: Length of each training.

    Returns:
        Options and mAP of the best trial; empty if none was within the budget.
    """
    import optuna

    folder.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        study_name=STUDY,
        storage=f'sqlite:///{folder / "study.db"}',
        direction='maximize',
        sampler=optuna.samplers.TPESampler(seed=0),
        load_if_exists=True,
    )

    def objective(trial: 'optuna.Trial') -> float:
        work_dir = folder / f'trial{trial.number}'
        cfg = make_config(suggest_backbone(trial), work_dir, epochs)
        elapsed_ms = latency_ms(cfg)
        trial.set_user_attr('latency_ms', elapsed_ms)
        if elapsed_ms > budget_ms:
            raise optuna.TrialPruned(f'{elapsed_ms:.0f} ms')
        return train_and_test(cfg, 'val')

    ended = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
    done = len(study.get_trials(deepcopy=False, states=ended))
    study.optimize(objective, n_trials=max(trials - done, 0))
    draw_history(study.trials, budget_ms, folder / 'history.png')
    if not study.get_trials(states=ended[:1]):
        return {}
    return dict(study.best_params, bbox_mAP=study.best_value)


def draw_history(trials: list, budget_ms: float, path: Path) -> None:
    """mAP of the trials within the budget, the best so far, and latencies."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 6), layout='constrained')
    upper, lower = figure.subplots(2, sharex=True)
    done = [(t.number, t.value) for t in trials if t.value is not None]
    if done:
        numbers, values = zip(*done, strict=True)
        best = [max(values[: i + 1]) for i in range(len(values))]
        upper.scatter(numbers, values, s=20, label='trial')
        upper.step(numbers, best, where='post', color='C1', label='best so far')
        upper.legend()
    upper.set_ylabel('bbox mAP (validation)')
    timed = [t for t in trials if 'latency_ms' in t.user_attrs]
    lower.scatter(
        [t.number for t in timed], [t.user_attrs['latency_ms'] for t in timed], s=20
    )
    lower.axhline(budget_ms, color='C3', label='budget')
    lower.legend()
    lower.set_ylabel('latency [ms]')
    lower.set_xlabel('trial')
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(path, dpi=150)
