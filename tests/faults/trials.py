"""Trainings that are disturbed, resumed, and compared with an undisturbed one."""

import importlib
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from deform_gqa.engine import PreemptionHook, load_checkpoint, use_safe_loading
from deform_gqa.engine.checkpoint_io import find_checkpoint_to_resume
from tests.faults.files import FileLayer
from tests.test_engine.tiny_training import make_runner

# What is tried, by name: in words, for the report.
CLASSES = dict(
    kill='SIGKILL before each file system call of the saves, and within writes',
    full='no space left from each call on, writes cut short; later there is room',
    read_only='the work folder cannot be written from each call on; later it can',
    power='power cut at each call; what was not synced is lost in part, in any order',
    sigkill='SIGKILL from outside, at any time of the training',
    sigterm='SIGTERM from outside, at any time of the training',
)
LOOP = dict(type='ResumableEpochBasedTrainLoop', max_epochs=4)
PLATEAU = dict(
    type='ReduceOnPlateauLR', monitor='score', rule='greater', patience=0, factor=0.5
)


def train(work_dir: Path, resume: bool = False) -> None:
    """Four epochs with a file after two iterations each, and after the epoch."""
    torch.set_num_threads(1)
    use_safe_loading()
    make_runner(
        str(work_dir),
        resume=resume,
        loop=dict(LOOP),
        scheduler=dict(PLATEAU),
        hooks=(PreemptionHook(),),
        by_epoch=False,
        interval=2,
        max_keep_ckpts=2,
    ).train()


def in_child(function: Callable[[], None], log: Path, wait: bool = True) -> int:
    """Runs a function in a fork of this process; returns its status, or its id."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with open(log, 'w') as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            function()
            status = 0
        except SystemExit as stop:
            status = stop.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return _status(child) if wait else child


def _status(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Trials:
    """Trials in a folder, which also holds the undisturbed training.

    Raises:
        RuntimeError: The undisturbed training fails.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.whole = folder / 'whole'
        self.log = folder / 'log.txt'
        counted = folder / 'calls.txt'

        # What the children need is imported and found out once. Nothing is trained
        # here: torch's threads do not live on in a fork.
        importlib.import_module('torch._dynamo')
        make_runner(str(folder / 'warm'))

        def count() -> None:
            layer = FileLayer(None, 'kill')
            with layer.installed():
                train(self.whole)
            counted.write_text(str(layer.calls))

        started = time.monotonic()
        if in_child(count, self.log):
            raise RuntimeError(f'the training itself fails:\n{self.log.read_text()}')
        self.seconds = time.monotonic() - started
        self.calls = int(counted.read_text())

    def run(self, name: str, number: int, total: int) -> str:
        """Disturbs a training once and resumes it.

        Args:
            name (str): Of :data:`CLASSES`.
            number (int): Of the trial, from 0.
            total (int): Trials of the class, over which the calls are spread.

        Returns:
            str: What was lost; empty if nothing was.
        """
        work_dir = self.folder / 'work'
        shutil.rmtree(work_dir, ignore_errors=True)
        if name.startswith('sig'):
            self._signal(work_dir, getattr(signal, name.upper()), number)
        else:
            # Each call comes; with more trials than calls, other bytes are cut off.
            at = 1 + number * max(self.calls, total) // total % self.calls
            layer = FileLayer(at, name, seed=number)

            def disturbed() -> None:
                with layer.installed():
                    train(work_dir)

            # The last call frees space, which a full disk does not keep from happening.
            is_disturbed = name != 'full' or at < self.calls
            if in_child(disturbed, self.log) == 0 and is_disturbed:
                return f'call {at} did not disturb the training'
        return self._damage(work_dir) or self._resume(work_dir)

    def _signal(self, work_dir: Path, wanted: int, number: int) -> None:
        child = in_child(lambda: train(work_dir), self.log, wait=False)
        time.sleep(random.Random(number).uniform(0, self.seconds))
        os.kill(child, wanted)  # which may have ended: nobody has waited for it
        _status(child)

    def _damage(self, work_dir: Path) -> str:
        """What of the files cannot be read after the fault."""
        try:
            find_checkpoint_to_resume(work_dir)
            for file in work_dir.glob('*.pth'):
                load_checkpoint(file)
        except (OSError, ValueError) as error:
            return f'damaged: {error}'
        return ''

    def _resume(self, work_dir: Path) -> str:
        if in_child(lambda: train(work_dir, resume=True), self.log):
            return f'cannot be resumed: {self.log.read_text()[-300:]}'
        names, expected = (
            {file.name for file in folder.glob('*.pth*')}
            for folder in (work_dir, self.whole)
        )
        if names != expected:
            return f'files {sorted(names)} instead of {sorted(expected)}'
        for file in self.whole.glob('*.pth'):
            states = [
                load_checkpoint(folder / file.name)['state_dict']
                for folder in (work_dir, self.whole)
            ]
            if any(
                not torch.equal(states[0][key], states[1][key]) for key in states[1]
            ):
                return f'other weights in {file.name}'
        return ''
