"""The processes of several devices end together, and the first to notice says why.

Lightning looks after them every five seconds, kills the first one without a word where another is
gone, and leaves the others waiting where the first is gone. At SIGTERM it speaks to them in the
middle of what they are exchanging. Here every process looks often, and what it is told waits for
the end of a step, where all hear of it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from editkit.parallel import Ranks

EVERY, GRACE = 0.1, 60.0  # seconds between two looks, and for an end that is under way elsewhere


class ToldToEnd(Callback):
    """Takes SIGTERM on any device of several, and ends all at the same step."""

    def __init__(self) -> None:
        self.is_told = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the place of Lightning's handler, which it takes away itself at the end."""
        if trainer.world_size > 1 and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._note)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Tell all devices; Lightning ends where the flag is set."""
        ranks = Ranks.present()
        if ranks.size > 1:
            told = torch.tensor([float(self.is_told)])
            ranks.add_up([told])
            trainer._signal_connector.received_sigterm = bool(told.any())

    on_validation_batch_end = on_train_batch_end

    def _note(self, *_: Any) -> None:
        self.is_told = True


@contextmanager
def one_end(trainer: Trainer, remedy: str = "go on with --ckpt_path last") -> Iterator[None]:
    """End all processes where one is gone, or where this one fails: the others would wait.

    Args:
        trainer: Trainer of the run.
        remedy: What to do then, for people.

    Raises:
        SystemExit: With status 143, where the run was told to end (SIGTERM).
    """
    watch = _Watch(trainer, remedy)
    watch.start()
    try:
        yield
    except BaseException as error:
        if isinstance(error, RuntimeError) and trainer.world_size > 1:
            watch.join(10 * EVERY)  # what fails here may be the connection to one that is gone
        watch.end_others()
        if not isinstance(error, SIGTERMException):
            raise
        if watch.rank == 0:
            sys.stderr.write(f"editkit: told to end (SIGTERM); {remedy}\n")
        raise SystemExit(143) from error
    finally:
        watch.is_over.set()


class _Watch(threading.Thread):
    """Looks whether the processes of the other devices are there.

    Attributes:
        others: What this process has started, for this Trainer or one before.
    """

    others: ClassVar[list[subprocess.Popen[bytes]]] = []

    def __init__(self, trainer: Trainer, remedy: str) -> None:
        super().__init__(name="editkit-devices", daemon=True)
        self.remedy = remedy
        self.launcher = trainer.strategy.launcher
        self.rank, self.parent = trainer.global_rank, os.getppid()
        self.is_over = threading.Event()

    def run(self) -> None:
        """Look until it is over; end this process where another one is gone."""
        ended: dict[int, float] = {}
        while not self.is_over.wait(EVERY):
            if self.rank > 0:
                if os.getppid() != self.parent:
                    self._end("the process of the first device is gone", self.rank == 1)
                continue
            self._take_over()
            for device, process in enumerate(self.others, 1):
                code = process.poll()
                if code is not None and code < 0:
                    name = signal.Signals(-code).name
                    self._end(f"the process of device {device} was ended by {name}")
                elif code:  # it has said why, or this process is about to
                    since = ended.setdefault(device, time.monotonic())
                    if time.monotonic() - since > GRACE:
                        self._end(f"the process of device {device} ended with status {code}")

    def end_others(self) -> None:
        """End the processes of the other devices."""
        self._take_over()
        for process in self.others:
            process.kill()

    def _take_over(self) -> None:
        """Look after the processes that Lightning started, in its place."""
        found = getattr(self.launcher, "procs", [])
        if found and all(isinstance(process, subprocess.Popen) for process in found):
            self.others += found
            found.clear()  # Lightning's own watch is over where there is nothing to look after

    def _end(self, why: str, speaks: bool = True) -> None:
        self.end_others()
        if speaks:
            sys.stderr.write(f"editkit: error: {why}, and the run with it; {self.remedy}\n")
            sys.stderr.flush()
        os._exit(1)
