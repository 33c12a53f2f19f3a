from deform_gqa.engine.hooks.attention_distillation_hook import (
    AttentionDistillationHook,
)
from deform_gqa.engine.hooks.attention_visualization_hook import (
    AttentionVisualizationHook,
)
from deform_gqa.engine.hooks.gqa_conversion_hook import GQAConversionHook
from deform_gqa.engine.hooks.preemption_hook import PreemptionHook
from deform_gqa.engine.hooks.resumable_checkpoint_hook import ResumableCheckpointHook
from deform_gqa.engine.hooks.runtime_benchmark_hook import RuntimeBenchmarkHook
from deform_gqa.engine.hooks.weights_check_hook import WeightsCheckHook

__all__ = [
    'AttentionDistillationHook',
    'AttentionVisualizationHook',
    'GQAConversionHook',
    'PreemptionHook',
    'ResumableCheckpointHook',
    'RuntimeBenchmarkHook',
    'WeightsCheckHook',
]
