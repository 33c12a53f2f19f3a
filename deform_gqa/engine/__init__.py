"""Parts of training that MMEngine lacks, registered on import."""

from deform_gqa.engine.bfloat16_optim_wrapper import BFloat16OptimWrapper
from deform_gqa.engine.checkpoint_io import (
    check_checkpoint,
    load_checkpoint,
    use_safe_loading,
)
from deform_gqa.engine.flop_handles import register_flop_handles
from deform_gqa.engine.hooks import (
    AttentionDistillationHook,
    AttentionVisualizationHook,
    GQAConversionHook,
    PreemptionHook,
    ResumableCheckpointHook,
    RuntimeBenchmarkHook,
    WeightsCheckHook,
)
from deform_gqa.engine.layer_decay import LayerDecayOptimWrapperConstructor
from deform_gqa.engine.resumable_loops import (
    ResumableEpochBasedTrainLoop,
    ResumableIterBasedTrainLoop,
)

__all__ = [
    'AttentionDistillationHook',
    'AttentionVisualizationHook',
    'BFloat16OptimWrapper',
    'GQAConversionHook',
    'LayerDecayOptimWrapperConstructor',
    'PreemptionHook',
    'ResumableCheckpointHook',
    'ResumableEpochBasedTrainLoop',
    'ResumableIterBasedTrainLoop',
    'RuntimeBenchmarkHook',
    'WeightsCheckHook',
    'check_checkpoint',
    'load_checkpoint',
    'register_flop_handles',
    'use_safe_loading',
]

register_flop_handles()
