"""What a running job tells: its heartbeat in `status.json`, and its progress on the terminal."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from bnlight.run.status import this_process, update_status
from bnlight.run.survive.command import WATCHED

SECONDS_BETWEEN_BEATS, SECONDS_BETWEEN_BEATS_WATCHED = 15.0, 1.0
SECONDS_BETWEEN_REFRESHES = 0.2
SECONDS_TO_FIRST_LINE, SECONDS_BETWEEN_LINES = 2.0, 60.0


class _Ends(pl.Callback):
    """Ends what it has begun when training ends, also by an exception."""

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._end()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._end()

    def _end(self) -> None:
        """Nothing to end."""


class Heartbeat(_Ends):
    """Writes on rank 0 that the job lives, and where it is, every few seconds and after each validation."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._where: dict[str, Any] = {}
        self._seconds = SECONDS_BETWEEN_BEATS_WATCHED if WATCHED in os.environ else SECONDS_BETWEEN_BEATS

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if trainer.is_global_zero and self._thread is None:
            self._stop.clear()
            self._thread = threading.Thread(target=self._beat, daemon=True, name="bnlight heartbeat")
            self._thread.start()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._thread is not None:
            self._write(resumed_at=self._look(trainer)["progress"], training_since=time.time(), **self._where)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        if self._thread is not None:
            self._look(trainer)

    def _look(self, trainer: pl.Trainer) -> dict[str, Any]:
        total = all_batches(trainer)
        done = trainer.fit_loop.total_batch_idx + 1
        self._where = {
            "epoch": min(trainer.current_epoch + 1, max(1, trainer.max_epochs or 1)),
            "max_epochs": trainer.max_epochs,
            "step": trainer.global_step,
            "progress": round(done / total, 4) if total else None,
        }
        return self._where

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._thread is not None:
            self._write(
                **self._look(trainer),
                metrics={name: float(value) for name, value in trainer.callback_metrics.items()},
            )

    def _end(self) -> None:
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._thread = None

    def _beat(self) -> None:
        while not self._stop.wait(self._seconds):
            self._write(**self._where)

    def _write(self, **fields: Any) -> None:
        with self._lock, contextlib.suppress(OSError):  # a full disk: it is for display alone
            update_status(self.directory, heartbeat=this_process()["heartbeat"], **fields)


def all_batches(trainer: pl.Trainer) -> int | None:
    """The training batches of the whole run; None where nobody knows."""
    batches = float(trainer.num_training_batches) * (trainer.max_epochs or -1)
    return int(batches) if 0 < batches < float("inf") else None


class _Display(_Ends):
    """Follows the training on rank 0; subclasses show it."""

    def __init__(self, title: str, metric: str | None) -> None:
        self.title = title
        self.metric = metric
        self._shown_at = 0.0

    def _done(self, trainer: pl.Trainer) -> int:
        return trainer.fit_loop.total_batch_idx + 1

    def _text(self, trainer: pl.Trainer) -> str:
        score = trainer.callback_metrics.get(self.metric or "")
        epoch = f"epoch {min(trainer.current_epoch + 1, trainer.max_epochs or 1)}/{trainer.max_epochs}"
        stage = (self.metric or "").partition("/")[0]
        return epoch if score is None else f"{epoch} {stage} {float(score):.3f}"

    def _due(self, seconds: float) -> bool:
        now = time.monotonic()
        if now - self._shown_at < seconds:
            return False
        self._shown_at = now
        return True


class ProgressBar(_Display):
    """One live line: job, epoch, metric, remaining time; it fits a terminal of 80 columns."""

    def __init__(self, title: str, metric: str | None) -> None:
        super().__init__(title, metric)
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        self._bar = Progress(
            TextColumn(self.title, markup=False),
            BarColumn(bar_width=8),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=Console(),  # rich's shared one remembers what the terminal was like at its first use
            transient=True,
            auto_refresh=False,  # a thread that draws would take its share of a small model's time
        )
        self._bar.start()
        self._task = self._bar.add_task(self._text(trainer), total=all_batches(trainer))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._bar is not None and self._due(SECONDS_BETWEEN_REFRESHES):
            done, text = self._done(trainer), self._text(trainer)
            self._bar.update(self._task, completed=done, description=text, refresh=True)

    def _end(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class ProgressLines(_Display):
    """Plain lines for logs and pipes: one soon, then ever fewer, down to one a minute."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._seconds = SECONDS_TO_FIRST_LINE
        self._due(0.0)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.is_global_zero and self._due(self._seconds):
            self._seconds = min(2 * self._seconds, SECONDS_BETWEEN_LINES)
            print(f"{self.title}  {self._text(trainer)}", flush=True)


def progress_display(style: str, label: str, name: str, metric: str | None) -> list[pl.Callback]:
    """The callback that shows progress and `metric`, in `style` auto (a bar on a terminal), bar, plain or off."""
    title = f"{label} {name.rsplit('-', 1)[0]}".strip()  # without the hash
    if WATCHED in os.environ:
        style = "off"
    elif style == "auto":
        style = "bar" if Console().is_terminal else "plain"
    displays: dict[str, list[Callable[[str, str | None], pl.Callback]]] = {
        "bar": [ProgressBar],
        "plain": [ProgressLines],
        "off": [],
    }
    return [display(title, metric) for display in displays[style]]
