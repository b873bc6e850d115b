"""Times jobs that run one after another in a process: what each costs beyond its training steps.

A job is timed from the begin of its training to the begin of the next job's, a full turn of whatever runs them.
"""

from __future__ import annotations

import itertools
import os
import resource
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl


class Moment(NamedTuple):
    """Seconds by the clock, and CPU seconds of this process; or what lies between two such moments."""

    seconds: float
    cpu: float

    def until(self, later: Moment) -> Moment:
        return Moment(later.seconds - self.seconds, later.cpu - self.cpu)


_begun: list[Moment] = []  # of each job of this process
_steps: list[list[Moment]] = []  # what each of its training steps took
_of_children: list[float] = []  # their CPU seconds at the begin of the second job


def now() -> Moment:
    return Moment(time.perf_counter(), time.process_time())


def begin_job() -> None:
    """The training of a job begins."""
    if len(_begun) == 1:
        _of_children.append(_cpu_of_children())
    _begun.append(now())
    _steps.append([])


def overheads() -> list[Moment]:
    """Of each job but the first and the last: its time less its number of steps at their median.

    So whatever makes the first steps slower than the others counts as overhead.
    """
    found = []
    for (begun, then), steps in zip(itertools.pairwise(_begun), _steps, strict=False):
        turn = begun.until(then)
        typical = [statistics.median(part) for part in zip(*steps, strict=True)] or [0.0, 0.0]
        found.append(Moment(*(all_ - len(steps) * step for all_, step in zip(turn, typical, strict=True))))
    return found[1:]


def cpu_of_children() -> float:
    """CPU seconds that this process's children (W&B's service) have used for each job after the first, on Linux."""
    return (_cpu_of_children() - _of_children[0]) / (len(_begun) - 1)


def _cpu_of_children() -> float:
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return ended.ru_utime + ended.ru_stime + sum(map(_cpu_with_children, _children(os.getpid())))


def _cpu_with_children(process: int) -> float:
    """CPU seconds of a living process and those below it; 0 where there is no /proc."""
    fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    used = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return used + sum(map(_cpu_with_children, _children(process)))


def _children(process: int) -> list[int]:
    files = Path(f"/proc/{process}/task").glob("*/children")
    return [int(child) for file in files for child in file.read_text(encoding="utf-8").split()]


class Clock(pl.Callback):
    """Notes the begin of a job's training, and what each step takes."""

    def on_train_start(self, *_: Any) -> None:
        begin_job()

    def on_train_batch_start(self, *_: Any) -> None:
        self._step_begun = now()

    def on_train_batch_end(self, *_: Any) -> None:
        _steps[-1].append(self._step_begun.until(now()))
