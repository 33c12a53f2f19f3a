from deform_gqa.engine.hooks.resumable_checkpoint_hook import ResumableCheckpointHook

__all__ = ['ResumableCheckpointHook']
