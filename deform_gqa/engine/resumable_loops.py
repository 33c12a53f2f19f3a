"""mmengine's training loops, made to start anywhere and without loading old batches."""

from mmengine.registry import LOOPS
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop
from torch import nn

from deform_gqa.engine.resumable_batches import resumable_batches

__all__ = ['ResumableEpochBasedTrainLoop', 'ResumableIterBasedTrainLoop']


@LOOPS.register_module()
class ResumableEpochBasedTrainLoop(EpochBasedTrainLoop):
    """Goes on in the middle of an epoch, after a checkpoint that was saved there.

    Takes the options of :class:`mmengine.runner.EpochBasedTrainLoop`. With
    :class:`deform_gqa.engine.ResumableCheckpointHook` the batches that are done are
    left out, and ``batch_idx`` counts them.
    """

    def run_epoch(self) -> None:
        """Iterates over what is left of an epoch."""
        self.runner.call_hook('before_train_epoch')
        self.runner.model.train()
        done = getattr(self.dataloader.batch_sampler, 'done', 0)
        for idx, data_batch in enumerate(self.dataloader, done):
            self.run_iter(idx, data_batch)
        self.runner.call_hook('after_train_epoch')
        self._epoch += 1


@LOOPS.register_module()
class ResumableIterBasedTrainLoop(IterBasedTrainLoop):
    """Goes on at any iteration, with the batches that would have come then.

    Takes the options of :class:`mmengine.runner.IterBasedTrainLoop`, which loads old
    batches again, or restarts the workers and waits at the end of the data set.
    """

    def run(self) -> nn.Module:
        """Trains; data sets without indices are left to the parent."""
        batches = resumable_batches(self.dataloader)
        if batches is None:
            return super().run()
        self.runner.call_hook('before_train')
        self.runner.call_hook('before_train_epoch')
        batches.start_without_end(self._iter)
        self.dataloader_iterator = iter(self.dataloader)
        while self._iter < self._max_iters and not self.stop_training:
            self.runner.model.train()
            self.run_iter(next(self.dataloader_iterator))
            self._decide_current_val_interval()
            if (
                self.runner.val_loop is not None
                and self._iter >= self.val_begin
                and (
                    self._iter % self.val_interval == 0 or self._iter == self._max_iters
                )
            ):
                self.runner.val_loop.run()
        self.runner.call_hook('after_train_epoch')
        self.runner.call_hook('after_train')
        return self.runner.model
