"""Parts of training that MMEngine lacks, registered on import."""

from deform_gqa.engine.bfloat16_optim_wrapper import BFloat16OptimWrapper
from deform_gqa.engine.checkpoint_io import (
    check_checkpoint,
    load_checkpoint,
    use_safe_loading,
)
from deform_gqa.engine.hooks import (
    AttentionDistillationHook,
    AttentionVisualizationHook,
    GQAConversionHook,
    PreemptionHook,
    ResumableCheckpointHook,
    RuntimeBenchmarkHook,
    WeightsCheckHook,
)
from deform_gqa.engine.resumable_loops import (
    ResumableEpochBasedTrainLoop,
    ResumableIterBasedTrainLoop,
)

__all__ = [
    'AttentionDistillationHook',
    'AttentionVisualizationHook',
    'BFloat16OptimWrapper',
    'GQAConversionHook',
    'PreemptionHook',
    'ResumableCheckpointHook',
    'ResumableEpochBasedTrainLoop',
    'ResumableIterBasedTrainLoop',
    'RuntimeBenchmarkHook',
    'WeightsCheckHook',
    'check_checkpoint',
    'load_checkpoint',
    'use_safe_loading',
]
