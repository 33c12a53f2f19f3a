"""Saves a checkpoint and stops when a scheduler is about to take the machine away."""

import os
import signal
import threading
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as torch_dist
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from deform_gqa.engine.hooks.resumable_checkpoint_hook import ResumableCheckpointHook

__all__ = ['EXIT_PREEMPTED', 'PreemptionHook']

# EX_TEMPFAIL of sysexits.h: "the user is invited to try again later".
EXIT_PREEMPTED = 75


@HOOKS.register_module()
class PreemptionHook(Hook):
    """On a signal, saves after the current iteration and ends the process.

    The exit status is 75. ``python tools/train.py CONFIG --resume`` goes on with the
    next iteration, and ends with the same weights as a run without a break. Needs a
    :class:`deform_gqa.engine.ResumableCheckpointHook`.

    - If one process of a distributed run gets a signal, all stop after the same
      iteration.
    - While gradients accumulate, the run goes on to the next step of the optimizer:
      checkpoints hold no gradients.
    - During validation, the run ends at once if what is validated has been saved.
      Otherwise it ends after the iteration that follows the validation.
    - Data workers ignore the signals of others, which schedulers send to them too.

    Args:
        signals (Sequence[str]): Names of signals. Slurm sends SIGTERM when it preempts
            or cancels a job, and the signal that ``sbatch --signal=USR1@120`` names
            two minutes before the time is up.

    Raises:
        ValueError: For a name that is no signal's. In ``before_train``: the run has no
            ResumableCheckpointHook.
    """

    # After all that changes what a checkpoint holds.
    priority = 'LOWEST'

    def __init__(self, signals: Sequence[str] = ('SIGTERM', 'SIGUSR1')) -> None:
        known = signal.Signals.__members__
        for name in signals:
            if name not in known:
                raise ValueError(f'signals must be names such as SIGTERM, got {name!r}')
        self.signals = [known[name] for name in signals]
        self._received: int | None = None
        self._former: dict[int, Callable | int | None] = {}
        self._group: torch_dist.ProcessGroup | None = None
        self._checkpoints: ResumableCheckpointHook | None = None

    def before_train(self, runner: Runner) -> None:
        """Begins to listen, which only a main thread can do."""
        hooks = [x for x in runner.hooks if isinstance(x, ResumableCheckpointHook)]
        if not hooks:
            raise ValueError(
                'PreemptionHook needs a ResumableCheckpointHook among the hooks, got '
                f'{[type(hook).__name__ for hook in runner.hooks]}'
            )
        self._checkpoints = hooks[0]
        if threading.current_thread() is not threading.main_thread():
            runner.logger.warning(
                'PreemptionHook: the training does not run in the main thread, so '
                'signals do not reach it.'
            )
            return
        if torch_dist.is_initialized():
            # On the CPU, so that no process waits for its GPU.
            self._group = torch_dist.new_group(backend='gloo')
        for loop in (runner.train_loop, runner.val_loop):
            if loop is not None:
                _shield_workers(loop.dataloader, self.signals)
        for number in self.signals:
            self._former[number] = signal.signal(number, self._receive)

    def _receive(self, number: int, frame) -> None:
        self._received = number

    def _any_received(self) -> bool:
        """Whether a process has got a signal; the same answer in all of them."""
        flag = torch.tensor(self._received is not None, dtype=torch.int32)
        if self._group is not None:
            torch_dist.all_reduce(flag, torch_dist.ReduceOp.MAX, group=self._group)
        return bool(flag)

    def after_train_iter(self, runner: Runner, batch_idx: int, **kwargs) -> None:
        if self._accumulates(runner) or not self._any_received():
            return
        self._checkpoints.save_interrupted(runner, batch_idx)
        self._stop(runner)

    def after_val_iter(self, runner: Runner, batch_idx: int, **kwargs) -> None:
        """Without asking the other processes: nothing is lost if they go on or fail."""
        is_training = self._checkpoints is not None
        if is_training and self._received and self._checkpoints.has_saved(runner.iter):
            self._stop(runner)

    def _accumulates(self, runner: Runner) -> bool:
        wrapper = runner.optim_wrapper
        return isinstance(wrapper, OptimWrapper) and not wrapper.should_update()

    def _stop(self, runner: Runner) -> None:
        runner.logger.warning(
            f'The run was told to stop and has saved {self._checkpoints.last_ckpt}; '
            '--resume goes on from there.'
        )
        self.after_run(runner)
        raise SystemExit(EXIT_PREEMPTED)

    def after_run(self, runner: Runner) -> None:
        """Gives the signals back to whoever had them."""
        for number, former in self._former.items():
            signal.signal(number, former)
        self._former = {}


def _shield_workers(loader: DataLoader, signals: Sequence[int]) -> None:
    """Lets the workers of a loader live on when a signal comes from outside."""
    if loader.num_workers:
        loader.worker_init_fn = partial(
            _start_worker,
            signals=signals,
            owner=os.getpid(),
            init=loader.worker_init_fn,
        )


def _start_worker(
    worker_id: int,
    signals: Sequence[int],
    owner: int,
    init: Callable[[int], None] | None,
) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    threading.Thread(target=_obey_owner, args=(signals, owner), daemon=True).start()
    if init is not None:
        init(worker_id)


def _obey_owner(signals: Sequence[int], owner: int) -> None:
    """Ends this process when the training does, by the SIGTERM of multiprocessing."""
    while True:
        received = signal.sigwaitinfo(signals)
        if received.si_signo == signal.SIGTERM and received.si_pid == owner:
            os._exit(0)
