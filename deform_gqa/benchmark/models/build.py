"""Models of MMDetection configs and registries, with the kv heads and backend asked."""

import contextlib
import copy
import inspect
import itertools
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mmdet.registry import MODELS
from mmengine.config import Config, ConfigDict
from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope
from mmengine.runner import load_checkpoint
from mmengine.utils import get_installed_path
from torch import nn

import deform_gqa.models  # noqa: F401  registers ours
from deform_gqa.archs import resolve_arch
from deform_gqa.models.backbones import DAT
from deform_gqa.models.backbones.dat_checkpoint import load_dat_checkpoint
from deform_gqa.ops import unsupported_reason
from deform_gqa.ops.common.backends import BACKENDS

from ..core.cases import PLAIN, Case, NotRun
from ..core.errors import OptionError
from ..core.kv_heads import (
    AS_CONFIGURED,
    SWEEP,
    Heads,
    kv_head_count,
    kv_head_counts,
)
from .options import ModelOptions

SCOPE = 'mmdet'
# Ops behind the modules that have a backend; a module of others' is not asked.
MODULE_OPS = {
    'DeformableAttention1D': 'deform_sample',
    'DeformableAttention2D': 'deform_sample',
    'DeformableGQA': 'deform_attn',
    'NeighborhoodAttention': 'neighborhood_attn',
    'PerQueryDeformableAttention': 'deform_sdpa',
    # of projects/multiview_deform_attn
    'MultiViewDeformableAttention': 'deform_sdpa',
}


def is_config(target: str) -> bool:
    """Whether a target names a config file, ours or ``mmdet::...``."""
    return target.endswith('.py')


def short_name(target: str) -> str:
    """A config's name without folder and ending; other targets as they are."""
    return target.rsplit('/', 1)[-1].removesuffix('.py')


def load_config(target: str, cfg_options: Mapping[str, Any]) -> Config:
    """Read a config and register what it needs.

    Args:
        target: A path, or 'mmdet::DIR/NAME.py' for a config that a package installed.
        cfg_options: Settings to override.

    Raises:
        OptionError: If there is no such file.
    """
    path = target
    if '::' in target:
        package, path = target.split('::', maxsplit=1)
        path = os.path.join(get_installed_path(package), '.mim', 'configs', path)
    if not Path(path).is_file():
        raise OptionError(f'config file {target!r} does not exist')
    cfg = Config.fromfile(path)
    cfg.merge_from_dict(dict(cfg_options))
    register_stock_models()
    return cfg


def register_stock_models() -> None:
    """MMDetection's own models; they need the compiled ops of mmcv."""
    with contextlib.redirect_stdout(sys.stderr):  # imports print what they lack
        from mmdet.utils import register_all_modules

        register_all_modules(init_default_scope=False)
    init_default_scope(SCOPE)


def is_registered(name: str) -> bool:
    return MODELS.get(name) is not None


def dicts_of(config: Any) -> Iterator[dict]:
    """All nested dicts, the outermost first."""
    if isinstance(config, dict):
        yield config
        for value in config.values():
            yield from dicts_of(value)
    elif isinstance(config, (list, tuple)):
        for value in config:
            yield from dicts_of(value)


def without_pretrained(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy that downloads nothing: a benchmark needs no trained weights."""
    config = copy.deepcopy(dict(config))
    for part in dicts_of(config):
        init_cfg = part.get('init_cfg')
        if isinstance(init_cfg, dict) and init_cfg.get('type') == 'Pretrained':
            part['init_cfg'] = None
    return config


def build_model(
    config: Mapping[str, Any], device: torch.device, checkpoint: str | None
) -> nn.Module:
    """The model in eval mode, with the initial weights of its config or a checkpoint's.

    Raises:
        OptionError: For a type that is not registered, or options that it refuses.
    """
    if not is_registered(config['type']):
        raise OptionError(f'{config["type"]!r} is not registered in mmdet.registry')
    try:
        model = MODELS.build(ConfigDict(without_pretrained(config)))
    except (TypeError, ValueError, KeyError) as error:
        raise OptionError(f'{config["type"]} cannot be built: {error}') from error
    with warnings_only():
        if checkpoint is not None:
            load_weights(model, checkpoint)
        elif hasattr(model, 'init_weights'):
            model.init_weights()
    model.to(device)
    model.eval()  # not all return themselves
    return model


def with_backend(
    config: Mapping[str, Any], options: ModelOptions, backend: str
) -> tuple[nn.Module, str]:
    """The model as the options want it, and what computes our ops in it.

    Raises:
        OptionError: As :func:`build_model`.
        NotRun: As :func:`set_backend`.
    """
    model = build_model(config, options.device, options.checkpoint)
    return model, set_backend(model, backend, options)


def load_weights(model: nn.Module, checkpoint: str) -> None:
    """A file's weights, read without unpickling code; official DAT files too.

    Raises:
        OptionError: If the file is damaged or unsafe, or does not fit a DAT.
    """
    from deform_gqa.engine import check_checkpoint, use_safe_loading

    use_safe_loading()
    try:
        check_checkpoint(checkpoint)
        if isinstance(model, DAT):
            load_dat_checkpoint(model, checkpoint)
        else:
            load_checkpoint(model, checkpoint, map_location='cpu')
    except ValueError as error:
        raise OptionError(f'--checkpoint {checkpoint}: {error}') from error


@contextlib.contextmanager
def warnings_only() -> Iterator[None]:
    """Quiet mmengine's log: init_weights writes three lines for each parameter."""
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def set_backend(model: nn.Module, backend: str, options: ModelOptions) -> str:
    """Let all our ops in a model run with a backend; returns its name, or ``PLAIN``.

    An op that has no such backend keeps 'auto'.

    Raises:
        NotRun: If no op of the model can run with it, with the reason.
    """
    modules = [module for module in model.modules() if _has_backends(module)]
    if not modules:
        return PLAIN
    where = dict(device=options.device, dtype=options.amp_dtype or torch.float32)
    reasons = {}
    for module in modules:
        op = MODULE_OPS.get(type(module).__name__)
        reason = None
        if op is not None and backend != 'auto':
            reason = unsupported_reason(op, backend, **where)
        if reason is None:
            module.backend = backend
        else:
            module.backend = 'auto'
            reasons[op] = reason
    if all(module.backend != backend for module in modules):
        raise NotRun('unsupported', '; '.join(reasons.values()))
    return backend


def _has_backends(module: nn.Module) -> bool:
    """Whether a backend can be chosen for it; some attention calls no op of ours."""
    if getattr(module, 'backend', None) not in BACKENDS:
        return False
    return 'backend' in inspect.signature(type(module)).parameters


# A dict with a number of kv heads, its key, and the query heads (of each stage).
Slot = tuple[dict[str, Any], str, tuple[int, ...]]


def dat_slots(config: Mapping[str, Any]) -> list[Slot]:
    """The DAT backbones in a model config.

    Raises:
        OptionError: For an arch that is none.
    """
    parts = [part for part in dicts_of(config) if part.get('type') == 'DAT']
    try:
        archs = [resolve_arch(part.get('arch', 't++')) for part in parts]
    except (TypeError, ValueError) as error:
        raise OptionError(str(error)) from error
    return [
        (part, 'num_kv_heads', tuple(arch['num_heads']))
        for part, arch in zip(parts, archs, strict=True)
    ]


def along_kv_heads(
    config: Mapping[str, Any],
    choices: Sequence[str],
    find_slots: Callable[[Any], list[Slot]] = dat_slots,
) -> list[tuple[dict[str, Any], Heads | None]]:
    """A copy of a config for each choice, and the heads in its first slot.

    A number that the query heads are no multiple of stands for the next smaller one
    that they are. A sweep takes the numbers of the stage with the most heads.

    Raises:
        OptionError: If a number is asked of a model without a DAT backbone.
    """
    found: list[tuple[dict[str, Any], Heads | None]] = []
    waiting = list(choices)
    while waiting:
        choice = waiting.pop(0)
        copied = copy.deepcopy(dict(config))
        slots = find_slots(copied)
        if choice != AS_CONFIGURED and not slots:
            raise OptionError(
                f'--kv-heads {choice}: the model has no DAT backbone whose kv heads '
                'could be set'
            )
        if choice == SWEEP:
            most = max(slots[0][2])
            waiting = [*map(str, kv_head_counts(most, [SWEEP])), *waiting]
            continue
        for part, name, query in slots if choice != AS_CONFIGURED else ():
            counts = [kv_head_count(heads, choice) for heads in query]
            part[name] = counts if len(counts) > 1 else counts[0]
        found.append((copied, heads_in(slots[0]) if slots else None))
    return found


def heads_in(slot: Slot) -> Heads:
    """As a config has them."""
    part, name, query = slot
    kv = part.get(name) or query
    return Heads(query, (kv,) * len(query) if isinstance(kv, int) else tuple(kv))


def model_cases(
    configs: Iterable[tuple[dict[str, Any], Heads | None]],
    sizes: Iterable[Any],
    options: ModelOptions,
    make: Callable[[dict[str, Any], Heads | None, Any, int], Case],
) -> list[Case]:
    """Every config at every image size and batch size, once."""
    combinations = itertools.product(configs, sizes, options.batch_sizes)
    cases = [make(*config, size, batch) for config, size, batch in combinations]
    return list({case.name: case for case in cases}.values())
