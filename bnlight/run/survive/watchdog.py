"""Ends a process whose job hangs or has used up its time, and says in its files why."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from bnlight.run.status import update_status
from bnlight.run.survive.command import DIED

SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_OF_A_PAUSE = 2.0  # between two looks, and without work: the process was suspended
SECONDS_FOR_THE_OTHERS = 2.0  # the other ranks hang too: each writes its stacks before the launcher ends them


class Watchdog:
    """A thread beside the training: over a limit, it writes all stacks to `job.log` and leaves with `os._exit`.

    Nothing softer ends a process that waits inside a collective or a C function. The job's status becomes `failed`
    with the reason; the launcher of the ranks ends the others, the sweep's supervisor goes on with the rest.

    Args:
        directory: the job's.
        rank: of this process.
        used: seconds that earlier attempts took; they count.
        time_limit: seconds for the whole job, over all attempts; None is no limit.
        stall_limit: seconds without a training, validation or test step; None is no limit.
    """

    def __init__(
        self,
        directory: Path,
        rank: int,
        used: float = 0.0,
        time_limit: float | None = None,
        stall_limit: float | None = None,
    ) -> None:
        self.directory = directory
        self.rank = rank
        self.time_limit, self.left = time_limit, None if time_limit is None else time_limit - used
        self.stall_limit = stall_limit
        self.begun = self.stepped = time.monotonic()
        self.where = "before the first step"
        self._stop = threading.Event()

    def __enter__(self) -> Watchdog:
        if self.time_limit is not None or self.stall_limit is not None:
            threading.Thread(target=self._watch, daemon=True, name="bnlight watchdog").start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()

    def step(self, where: str) -> None:
        """A step has been finished."""
        self.stepped, self.where = time.monotonic(), where

    def reason(self) -> str | None:
        """Why the process is to end now; None if it is not."""
        now = time.monotonic()
        if self.left is not None and now - self.begun > self.left:
            return f"time_limit={_words(self.time_limit)} is used up ({self.where})"
        if self.stall_limit is not None and now - self.stepped > self.stall_limit:
            return (
                f"rank {self.rank} has done no step for stall_limit={_words(self.stall_limit)} ({self.where})"
            )
        return None

    def _watch(self) -> None:
        looked, worked = time.monotonic(), time.process_time()
        while not self._stop.wait(SECONDS_BETWEEN_LOOKS):
            gap, work = time.monotonic() - looked, time.process_time() - worked
            if gap > SECONDS_OF_A_PAUSE and work < gap / 10:  # Ctrl-Z, `scontrol suspend`: not the job's time
                self.begun, self.stepped = self.begun + gap, self.stepped + gap
            looked, worked = looked + gap, worked + work
            reason = self.reason()
            if reason is not None:
                self._end(reason)

    def _end(self, reason: str) -> None:
        trace = f"{reason}\nThe stacks of all threads of every rank are in job.log."
        with contextlib.suppress(Exception), (self.directory / "job.log").open("a", encoding="utf-8") as log:
            log.write(f"rank {self.rank}: {reason}; the stacks of its threads:\n")
            log.flush()
            faulthandler.dump_traceback(log, all_threads=True)
        with contextlib.suppress(Exception):
            update_status(
                self.directory,
                state="failed",
                error=reason,
                traceback=trace,
                ended=time.time(),
                watchdog=reason,
            )
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            time.sleep(SECONDS_FOR_THE_OTHERS)
        os._exit(DIED)


class Steps(pl.Callback):
    """Tells the watchdog of every finished step."""

    def __init__(self, watchdog: Watchdog) -> None:
        self.watchdog = watchdog

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        self.watchdog.step(f"after step {trainer.global_step}")

    def on_validation_batch_end(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        self.watchdog.step(f"in the validation after step {trainer.global_step}")

    def on_test_batch_end(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        self.watchdog.step("in the test")


def _words(seconds: float | None) -> str:
    whole = seconds or 0.0
    for unit, size in (("h", 3600), ("min", 60)):
        if whole >= size and whole % size == 0:
            return f"{whole / size:g}{unit}"
    return f"{whole:g}s"
