"""A checkpoint hook whose files let a killed run go on as if nothing had happened."""

from collections import deque

from mmengine.dist import all_gather_object, get_rank, get_world_size, is_main_process
from mmengine.hooks import CheckpointHook
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from deform_gqa.engine.checkpoint_io import (
    point_to_checkpoint,
    remove_parts,
    use_atomic_writing,
)
from deform_gqa.engine.resumable_batches import (
    ResumableBatchSampler,
    resumable_batches,
)
from deform_gqa.engine.resumable_loops import ResumableIterBasedTrainLoop
from deform_gqa.engine.rng_state import get_rng_state, set_rng_state
from deform_gqa.engine.unwrap import unwrap_model

__all__ = ['ResumableCheckpointHook']

INTERRUPTED = 'interrupted.pth'
_FORMER_BEST = 'former_best_ckpts'  # in the message hub
_KEYS = ('rng', 'progress', 'buffers')  # of this hook in a checkpoint


@HOOKS.register_module()
class ResumableCheckpointHook(CheckpointHook):
    """mmengine's checkpoint hook, made safe against a kill at any moment.

    Takes the options of :class:`mmengine.hooks.CheckpointHook`. In addition

    - a local file appears complete or not at all; ``last_checkpoint`` is written and
      older files are removed only after that;
    - the random states of every process are stored and come back on resume, as does
      the seed of the sampler; validation leaves them untouched. Data have random
      numbers of their own, see :mod:`deform_gqa.engine.resumable_batches`;
    - a file is saved before the validation of its epoch or iteration and again after
      it. A run that resumes the first of them validates before it trains.

    So a run that is killed and resumed ends with the same weights as one that was not,
    given the same number of processes and deterministic kernels. That holds for
    checkpoints at the end of an epoch with any epoch-based loop; in the middle of an
    epoch, and with iteration-based loops, it takes those of
    :mod:`deform_gqa.engine.resumable_loops`.

    The checkpoint has three more keys. ``rng``: ``states``, one entry per process (see
    :func:`deform_gqa.engine.rng_state.get_rng_state`), and ``sampler_seed``.
    ``progress``: ``batches_done`` of the current epoch, of ``batches_per_epoch``, and
    ``validated``. ``buffers``: those of the model in each process of a distributed
    run, else None.
    """

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        self._state_before_val: dict | None = None
        self._to_save: dict | None = None
        self._loaded: dict = {}
        self._batches: ResumableBatchSampler | None = None
        self._batches_done = 0
        self._validated = False
        # Of the newest file: the number of iterations, and whether they are validated.
        self._saved: tuple[int, bool] | None = None

    # Saving

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        """Replaces the parent's method, which removes old files before it saves."""
        if self._validated:  # FlexibleRunner has added to it
            meta = dict(epoch=runner.epoch, iter=runner.iter)
        expired = [self.filename_tmpl.format(old) for old in self._keep(runner, step)]
        self._save(runner, self.filename_tmpl.format(step), meta)
        if is_main_process():
            for name in (*expired, INTERRUPTED):
                self._remove(self.file_backend.join_path(self.out_dir, name))

    def save_interrupted(self, runner: Runner, batch_idx: int) -> None:
        """Saves after an iteration, whatever the interval.

        The file is ``interrupted.pth``, until the next file of the usual name is saved.
        Nothing is done if this iteration's file is there.

        Args:
            runner (Runner): It is in ``after_train_iter``.
            batch_idx (int): As the runner passes it.
        """
        if not self.has_saved(runner.iter + 1):
            self._batches_done = batch_idx + 1
            meta = dict(epoch=runner.epoch, iter=runner.iter + 1)
            self._save(runner, INTERRUPTED, meta)

    def has_saved(self, iterations: int) -> bool:
        """Whether the newest file is the state after so many iterations."""
        return self._saved is not None and self._saved[0] == iterations

    def _save(self, runner: Runner, filename: str, meta: dict) -> None:
        self.last_ckpt = self.file_backend.join_path(self.out_dir, filename)
        runner.message_hub.update_info('last_ckpt', self.last_ckpt)
        self._to_save = dict(
            meta=dict(meta),
            rng=self._gather_rng(runner),
            buffers=self._gather_buffers(runner),
            progress=dict(
                batches_done=self._batches_done,
                batches_per_epoch=self._batches_per_epoch,
                validated=self._validated,
            ),
        )
        runner.save_checkpoint(
            self.out_dir,
            filename,
            self.file_client_args,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
            **self.args,
        )
        self._to_save = None
        self._saved = (meta['iter'], self._validated)
        if is_main_process():
            point_to_checkpoint(runner.work_dir, self.last_ckpt)

    def _keep(self, runner: Runner, step: int) -> list[int]:
        """Notes that ``step`` is saved; returns the steps whose files may go.

        The message hub, which is stored in the file, names the expired steps too: a
        run that is killed before it removes their files does so when it resumes.
        """
        if self.max_keep_ckpts <= 0:
            return []
        steps = [old for old in self.keep_ckpt_ids if old != step] + [step]
        runner.message_hub.update_info('keep_ckpt_ids', steps)
        self.keep_ckpt_ids = deque(steps, self.max_keep_ckpts)
        return steps[: -self.max_keep_ckpts]

    def _remove(self, path: str) -> None:
        if self.file_backend.isfile(path):
            self.file_backend.remove(path)
        elif self.file_backend.isdir(path):  # as sharded checkpoints are
            self.file_backend.rmtree(path)

    def _gather_rng(self, runner: Runner) -> dict:
        """Every process takes part, though only the main one writes."""
        state = self._state_before_val
        if state is None:
            state = get_rng_state()
        return dict(
            states=all_gather_object(state),
            sampler_seed=getattr(_sampler(runner.train_dataloader), 'seed', None),
        )

    def _gather_buffers(self, runner: Runner) -> list[dict[str, Tensor]] | None:
        """Statistics of batch norms, which differ between processes within an epoch."""
        if get_world_size() == 1:
            return None
        buffers = unwrap_model(runner.model).named_buffers()
        return all_gather_object({name: value.cpu() for name, value in buffers})

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Adds what resuming needs, but not to the best file, which no run resumes."""
        if self._to_save is not None:
            checkpoint['meta'].update(self._to_save['meta'])
            checkpoint.update({key: self._to_save[key] for key in _KEYS})

    def after_train_iter(self, runner: Runner, batch_idx: int, **kwargs) -> None:
        self._batches_done = batch_idx + 1 if _is_epoch_based(runner) else 0
        super().after_train_iter(runner, batch_idx, **kwargs)
        self._batches_done = 0

    def after_val_epoch(self, runner: Runner, metrics: dict) -> None:
        """Saves once more what was saved before validation."""
        self._validated = True
        super().after_val_epoch(runner, metrics)  # does so if the best has changed
        if self._saved == (runner.iter, False):
            step = runner.epoch if self.by_epoch else runner.iter
            self._save_checkpoint_with_step(runner, step, meta={})
        self._validated = False

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        """Lets the parent save first, and then removes the former best file."""
        if not self.save_best:
            return
        former = self._best_paths
        # Stored with the next file, for a run that is killed before it removes them.
        runner.message_hub.update_info(_FORMER_BEST, [*filter(None, former.values())])
        # The parent removes the files that it knows before it saves: let it know none.
        self._best_paths = dict.fromkeys(former)
        super()._save_best_checkpoint(runner, metrics)
        self._best_paths = {
            key: former[key] if path is None else path
            for key, path in self._best_paths.items()
        }
        if is_main_process():
            stale = set(former.values()) - set(self._best_paths.values()) - {None}
            for path in stale:
                self._remove(path)
                runner.logger.info(f'The previous best checkpoint {path} is removed')

    def _remove_former_best(self, runner: Runner) -> None:
        if self.save_best:
            former = runner.message_hub.get_info(_FORMER_BEST, [])
            for path in set(former) - set(self._best_paths.values()):
                self._remove(path)

    @property
    def _best_paths(self) -> dict[str, str | None]:
        if len(self.key_indicators) == 1:
            return {'': self.best_ckpt_path}
        return dict(self.best_ckpt_path_dict)

    @_best_paths.setter
    def _best_paths(self, paths: dict[str, str | None]) -> None:
        if len(self.key_indicators) == 1:
            self.best_ckpt_path = paths['']
        else:
            self.best_ckpt_path_dict = paths

    # Resuming

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Keeps what this hook has stored until training starts."""
        self._loaded = {key: checkpoint.pop(key) for key in _KEYS if key in checkpoint}

    def before_train(self, runner: Runner) -> None:
        super().before_train(runner)
        use_atomic_writing()
        if is_main_process():
            remove_parts(runner.work_dir)
            remove_parts(self.out_dir)
            self._remove_former_best(runner)
        if runner.iter > 0:
            self._go_on(runner)
        else:
            self._loaded = {}  # of weights that a new training starts from
        self._prepare_data(runner)
        self._batches_done = self._find_batches_done(runner)
        self._restore_rng(runner)
        self._restore_buffers(runner)
        self._make_up_for_validation(runner)

    def _go_on(self, runner: Runner) -> None:
        # Without it, a best file would not be noted before the next file is due.
        self.last_ckpt = runner.message_hub.get_info('last_ckpt')
        if 'rng' in self._loaded:
            _set_sampler_seed(runner, self._loaded['rng']['sampler_seed'])
        else:
            runner.logger.warning(
                'The checkpoint holds no random states: the resumed training will '
                'differ from one without a break.'
            )

    def _find_batches_done(self, runner: Runner) -> int:
        progress = self._loaded.get('progress', dict(batches_done=0))
        done, former = progress['batches_done'], progress.get('batches_per_epoch')
        if done and former != self._batches_per_epoch:
            runner.logger.warning(
                f'The checkpoint was written in an epoch of {former} batches, and now '
                f'there are {self._batches_per_epoch}: the epoch starts anew.'
            )
            return 0
        return done

    @property
    def _batches_per_epoch(self) -> int | None:
        """None if the loader cannot leave batches out."""
        return None if self._batches is None else len(self._batches)

    def _prepare_data(self, runner: Runner) -> None:
        """Gives the data random numbers of their own."""
        loops = (EpochBasedTrainLoop, ResumableIterBasedTrainLoop)
        if isinstance(runner.train_loop, loops):
            self._batches = resumable_batches(runner.train_dataloader)
        if self._batches is not None:
            self._batches.key = (runner.seed, get_rank())

    def _restore_buffers(self, runner: Runner) -> None:
        buffers = self._loaded.get('buffers')
        if buffers is not None and len(buffers) == get_world_size():
            for name, buffer in unwrap_model(runner.model).named_buffers():
                buffer.copy_(buffers[get_rank()][name])

    def _make_up_for_validation(self, runner: Runner) -> None:
        """Validates a checkpoint that was saved before its validation."""
        validated = self._loaded.get('progress', {}).get('validated', True)
        if not validated and not self._batches_done and _validation_is_due(runner):
            runner.logger.info('The checkpoint was not validated yet.')
            self._saved = (runner.iter, False)
            # What the message hub says while the loop validates.
            hub = runner.message_hub
            hub.update_info('iter', runner.iter - 1)
            hub.update_info('epoch', runner.epoch - _is_epoch_based(runner))
            runner.val_loop.run()
            hub.update_info('iter', runner.iter)
            hub.update_info('epoch', runner.epoch)

    def before_train_epoch(self, runner: Runner) -> None:
        done, self._batches_done = self._batches_done, 0
        if self._batches is not None:
            self._batches.start_epoch(runner.iter - done, done)
        if _is_epoch_based(runner) and not done:
            self._restore_rng(runner)
            self._loaded = {}
        _restart_workers(runner.train_dataloader)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch=None):
        """Restores the random states where other hooks may have used them up."""
        if self._loaded:
            self._restore_rng(runner)
            self._loaded = {}

    def _restore_rng(self, runner: Runner) -> None:
        if 'rng' not in self._loaded:
            return
        states = self._loaded['rng']['states']
        if len(states) == get_world_size():
            set_rng_state(states[get_rank()])
        else:
            del self._loaded['rng']
            runner.logger.warning(
                f'The checkpoint was written by {len(states)} processes and is resumed '
                f'by {get_world_size()}: random states are not restored.'
            )

    # Validation

    def before_val(self, runner: Runner) -> None:
        """Remembers the random states, which starting a data loader changes."""
        self._state_before_val = get_rng_state()

    def after_val(self, runner: Runner) -> None:
        """Restores the states of training, which the last checkpoint holds as well."""
        set_rng_state(self._state_before_val)
        self._state_before_val = None


def _is_epoch_based(runner: Runner) -> bool:
    return isinstance(runner.train_loop, EpochBasedTrainLoop)


def _sampler(loader: DataLoader) -> Sampler:
    """The sampler of the items; a loader with a batch sampler does not know it."""
    return getattr(loader.batch_sampler, 'sampler', loader.sampler)


def _set_sampler_seed(runner: Runner, seed: int | None) -> None:
    sampler = _sampler(runner.train_dataloader)
    if hasattr(sampler, 'seed'):
        sampler.seed = seed


def _validation_is_due(runner: Runner) -> bool:
    """Whether the training loop validates where the run is now."""
    loop = runner.train_loop
    if runner.val_loop is None:
        return False
    now, last = loop.iter, loop.max_iters
    if _is_epoch_based(runner):
        now, last = loop.epoch, loop.max_epochs
    loop._decide_current_val_interval()
    return now >= loop.val_begin and (now % loop.val_interval == 0 or now == last)


def _restart_workers(loader: DataLoader) -> None:
    """Ends persistent workers: what their data sets keep cannot be saved.

    A loader offers no public way to do so; without an iterator it makes a new one.
    """
    if loader.persistent_workers:
        loader._iterator = None
