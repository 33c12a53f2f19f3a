"""Layers, backbones and detectors that ``benchmark.py gqa-sweep`` takes."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import backbone_suite, detector_suite, layer_suite, mm_models, published_layer
from .detector_inputs import config_size
from .errors import OptionError
from .model_measure import FORWARD, TRAIN, ModelCase, Workload, model_calls
from .model_options import ModelOptions
from .sweep_ops import Sweep, kv_counts


def published_sweep(options: ModelOptions, chosen: Sequence[str]) -> Sweep:
    """The deformable GQA repository's benchmark."""
    batch, heads = options.batch_sizes[0], published_layer.HEADS
    cases = {}
    for count in kv_counts(heads, chosen):
        name = f'deformable-gqa-paper/b{batch}/kv{count}of{heads}'
        build = functools.partial(_build_published, count, options)
        fields = {'target': 'deformable-gqa-paper', 'kv heads': count}
        cases[count] = ModelCase(name, fields, batch, build)
    smaller = (
        ''
        if batch == published_layer.BATCH
        else f' (published: {published_layer.BATCH})'
    )
    height, width = published_layer.GRID
    subject = (
        f'DeformableGQA, batch {batch}{smaller}, {published_layer.CHANNELS} channels, '
        f'{height}x{width} map, {heads} heads of {published_layer.HEAD_DIM}'
    )
    return Sweep(subject, heads, cases)


def _build_published(count: int, options: ModelOptions, backend: str) -> Workload:
    device, amp = options.device, options.amp_dtype
    model = published_layer.PublishedDeformableGQA(count).to(device)
    used = mm_models.set_backend(model, backend, device, amp or torch.float32)
    shape = (options.batch_sizes[0], published_layer.CHANNELS, *published_layer.GRID)
    x = torch.randn(shape, device=device).requires_grad_()
    calls = model_calls(lambda: model(x), model, device, amp, inputs=[x])
    return Workload(model, calls, used)


def layer_sweep(
    kind: str, stage: int, options: ModelOptions, chosen: Sequence[str]
) -> Sweep:
    """An attention module at the shape of a stage of DAT-T++."""
    config = layer_suite.layer_config(
        kind, layer_suite.ARCH, stage, options.cfg_options
    )
    heads = config[layer_suite.option_names(kind)[1]]
    size, batch = options.sizes[0], options.batch_sizes[0]
    cases = {}
    for count in kv_counts(heads, chosen):
        case = layer_suite.layer_case(
            layer_suite.with_kv_heads(config, str(count)), stage, size, batch, options
        )
        fields = {'target': kind, 'kv heads': count}
        cases[count] = dataclasses.replace(case, fields=fields)
    subject = (
        f'{kind}, stage {stage} of DAT-T++, {size[0]}x{size[1]} px, batch {batch}, '
        f'{heads} query heads'
    )
    return Sweep(subject, heads, cases)


def backbone_sweep(target: str, options: ModelOptions, chosen: Sequence[str]) -> Sweep:
    """A DAT, every stage with the largest divisor of its heads up to the number."""
    config = backbone_suite.backbone_config(target, options.cfg_options)
    size, batch = options.sizes[0], options.batch_sizes[0]
    make = functools.partial(
        backbone_suite.backbone_case, target, size=size, batch=batch, options=options
    )
    subject = f'{target}, {size[0]}x{size[1]} px, batch {batch}'
    return _model_sweep(target, subject, config, make, chosen)


def detector_sweep(target: str, options: ModelOptions, chosen: Sequence[str]) -> Sweep:
    """A detector whose backbone is a DAT; forward is prediction."""
    cfg = mm_models.load_config(target, options.cfg_options)
    if 'model' not in cfg:
        raise OptionError(f'config {target!r} has no model')
    name = mm_models.short_name(target)
    size = options.sizes[0] if options.sizes else config_size(cfg)
    batch = options.batch_sizes[0]
    source = detector_suite.BatchSource(cfg, size, batch, (), detector_suite.OBJECTS)
    predict = detector_suite.PREDICT
    options = dataclasses.replace(options, directions=(predict, TRAIN))

    def make(config: dict[str, Any]) -> ModelCase:
        case = detector_suite.detector_case(name, config, source, options)

        def build(backend: str) -> Workload:
            workload = case.build(backend)
            workload.calls[FORWARD] = workload.calls.pop(predict)
            return workload

        return dataclasses.replace(case, build=build)

    subject = f'{name}, {size[0]}x{size[1]} px, batch {batch}'
    return _model_sweep(name, subject, cfg.model.to_dict(), make, chosen)


def _model_sweep(
    target: str,
    subject: str,
    config: dict[str, Any],
    make: Callable[[dict[str, Any]], ModelCase],
    chosen: Sequence[str],
) -> Sweep:
    parts = mm_models.dat_parts(config)
    if not parts:
        raise OptionError(f'{target} has no DAT backbone whose kv heads could be set')
    heads = mm_models.stage_heads(parts[0])
    most = max(heads)
    cases = {}
    for count in kv_counts(most, chosen):
        case = make(mm_models.with_kv_heads(config, str(count)))
        fields = {'target': target, 'kv heads': count}
        cases[count] = dataclasses.replace(case, fields=fields)
    subject += f', {" ".join(map(str, heads))} query heads by stage'
    return Sweep(subject, most, cases)
