"""A checkpoint hook whose files let a killed run go on as if nothing had happened."""

import random
from collections import deque
from functools import partial
from pathlib import Path

import numpy as np
import torch
from mmengine.dataset import worker_init_fn as mmengine_worker_init_fn
from mmengine.dist import all_gather_object, get_rank, get_world_size, is_main_process
from mmengine.hooks import CheckpointHook
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch.utils.data import DataLoader

from deform_gqa.engine.checkpoint_io import AtomicLocalBackend
from deform_gqa.engine.rng_state import get_rng_state, set_rng_state

__all__ = ['ResumableCheckpointHook']


@HOOKS.register_module()
class ResumableCheckpointHook(CheckpointHook):
    """mmengine's checkpoint hook, made safe against a kill at any moment.

    Takes the options of :class:`mmengine.hooks.CheckpointHook`. In addition

    - a local file appears complete or not at all; ``last_checkpoint`` is written and
      older files are removed only after that;
    - the random states of every process are stored and come back on resume, as does
      the seed of the sampler; validation leaves them untouched, and data workers are
      seeded from them at each epoch.

    So a run of an epoch-based loop that is killed and resumed ends with the same
    weights as one that was not, given the same number of processes and deterministic
    kernels. With an iteration-based loop the model draws the same random numbers as
    well; data transforms do if they run in worker processes.

    The checkpoint has one more key, ``rng``: ``states``, one entry per process (see
    :func:`deform_gqa.engine.rng_state.get_rng_state`), and ``sampler_seed``.
    """

    def __init__(self, **kwargs) -> None:
        if _stores_locally(**kwargs):
            kwargs['backend_args'] = dict(backend='atomic_local')
        super().__init__(**kwargs)
        self._state_before_val: dict | None = None
        self._rng_to_save: dict | None = None
        self._rng_loaded: dict | None = None

    # Saving

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict):
        """Replaces the parent's method, which removes old files before it saves."""
        expired = self._keep(runner, step)
        filename = self.filename_tmpl.format(step)
        self.last_ckpt = self.file_backend.join_path(self.out_dir, filename)
        runner.message_hub.update_info('last_ckpt', self.last_ckpt)
        self._rng_to_save = self._gather_rng(runner)
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
        self._rng_to_save = None
        if is_main_process():
            pointer = Path(runner.work_dir, 'last_checkpoint')
            AtomicLocalBackend().put_text(self.last_ckpt, pointer)
            for old in expired:
                name = self.filename_tmpl.format(old)
                self._remove(self.file_backend.join_path(self.out_dir, name))

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
            sampler_seed=getattr(runner.train_dataloader.sampler, 'seed', None),
        )

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Adds the random states, except to the best checkpoint: no run resumes it."""
        if self._rng_to_save is not None:
            checkpoint['rng'] = self._rng_to_save

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        """Lets the parent save first, and then removes the former best file."""
        if not self.save_best:
            return
        former = self._best_paths
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
        """Keeps the random states until training starts."""
        self._rng_loaded = checkpoint.pop('rng', None)

    def before_train(self, runner: Runner) -> None:
        super().before_train(runner)
        resumed = runner.iter > 0
        if resumed and self._rng_loaded is not None:
            sampler = runner.train_dataloader.sampler
            if hasattr(sampler, 'seed'):
                sampler.seed = self._rng_loaded['sampler_seed']
        elif resumed:
            runner.logger.warning(
                'The checkpoint holds no random states: the resumed training will '
                'differ from one without a break.'
            )
        else:
            self._rng_loaded = None  # of weights that a new training starts from
        if _is_epoch_based(runner):
            _seed_workers_by_main_process(runner.train_dataloader)

    def before_train_epoch(self, runner: Runner) -> None:
        """Restores the random states before the epoch draws from them."""
        if _is_epoch_based(runner):
            self._restore_rng(runner)
            _restart_workers(runner.train_dataloader)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch=None):
        """Restores them in a loop that skips old batches after the method above."""
        if not _is_epoch_based(runner):
            self._restore_rng(runner)

    def _restore_rng(self, runner: Runner) -> None:
        loaded, self._rng_loaded = self._rng_loaded, None
        if loaded is None:
            return
        states = loaded['states']
        if len(states) == get_world_size():
            set_rng_state(states[get_rank()])
        else:
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


def _stores_locally(
    backend_args: dict | None = None,
    file_client_args: dict | None = None,
    out_dir: str | Path | None = None,
    **_,
) -> bool:
    named = backend_args is not None or file_client_args is not None
    return not named and '://' not in str(out_dir)


def _is_epoch_based(runner: Runner) -> bool:
    return isinstance(runner.train_loop, EpochBasedTrainLoop)


def _seed_workers_by_main_process(loader: DataLoader) -> None:
    """Replaces mmengine's worker seeds, which are the same in every epoch."""
    init = loader.worker_init_fn
    if isinstance(init, partial) and init.func is mmengine_worker_init_fn:
        offset = get_rank() * loader.num_workers
        loader.worker_init_fn = partial(_seed_worker, offset=offset)


def _seed_worker(worker_id: int, offset: int) -> None:
    """Seeds from a number that the main process drew, different on each rank."""
    seed = (torch.initial_seed() + offset) % 2**32
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _restart_workers(loader: DataLoader) -> None:
    """Ends persistent workers: their random states cannot be saved.

    A loader offers no public way to do so; without an iterator it makes a new one.
    """
    if loader.persistent_workers:
        loader._iterator = None
