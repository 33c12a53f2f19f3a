from deform_gqa.engine.hooks.resumable_checkpoint_hook import ResumableCheckpointHook
from deform_gqa.engine.hooks.runtime_benchmark_hook import RuntimeBenchmarkHook

__all__ = ['ResumableCheckpointHook', 'RuntimeBenchmarkHook']
