"""`metrics.csv`: every metric of a job, one wide table that needs no service to be read."""

from __future__ import annotations

import csv
import io
import logging
import time
from collections.abc import Mapping
from numbers import Number
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.loggers.logger import DummyLogger, Logger
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor

from bnlight.run.status import write_atomic

log = logging.getLogger(__name__)
INDEX = ("attempt", "step", "epoch", "time")  # time: unix seconds


def column(metric: str) -> str:
    """The name of a metric in the job's files: `logged/step` for one that is called as a column of the index."""
    return f"logged/{metric}" if metric in INDEX else metric


class MetricsFile(DummyLogger):
    """A Lightning logger that appends rows to `metrics.csv` in the job's directory.

    A metric seen for the first time widens the table: the file is then written anew, atomically. A resumed job
    appends under its own `attempt`; readers keep the last attempt of each step. What only other loggers can
    (`experiment`, `log_image`, `watch`) does nothing.
    """

    def __init__(self, directory: Path, attempt: int) -> None:
        super().__init__()
        self.path = directory / "metrics.csv"
        self.attempt = attempt
        self._columns: list[str] | None = None  # read by the rank that writes
        self._own: dict[
            str, Any
        ] = {}  # of the row that Lightning writes now, in place of what it says itself
        self._told: set[str] = set()
        self._trainer: pl.Trainer | None = None
        self._last: dict[str, Any] = {}

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return str(self.attempt)

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    def listen(self, trainer: pl.Trainer, *others: Logger) -> None:
        """Take part in everything that is logged: what is given to one of the `others` alone, as
        `self.logger.log_metrics` does, and metrics that are called as a column of the index.

        Lightning takes a metric `step` for the x axis of its loggers, and `epoch` for the epoch. So do they; here the
        columns stay what they are, and such a metric is `logged/step`.
        """
        self._trainer, connector = trainer, trainer._logger_connector
        write = connector.log_metrics

        def write_beside(metrics: Any, step: int | None = None) -> None:
            if named := [name for name in INDEX if name in metrics]:
                self._tell(named)
                done = trainer.fit_loop.epoch_loop._batches_that_stepped
                self._own = {"step": done if step is None else step, "epoch": trainer.current_epoch}
                self._own |= {column(name): float(metrics[name]) for name in named}
            try:
                write(metrics, step)
            finally:
                self._own = {}

        connector.log_metrics = write_beside  # type: ignore[method-assign]
        for logger in others:
            _before(logger, self)

    def _tell(self, names: list[str]) -> None:
        for name in {*names} - self._told:
            self._told.add(name)
            log.warning(
                "the module logs a metric `%s`, which is a column of metrics.csv: the column stays what it is, and the "
                "metric is %s there and in the results (Lightning and its other loggers take `step` for the x axis)",
                name,
                column(name),
            )

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        values = {name: _scalar(value) for name, value in metrics.items()}
        values = {name: value for name, value in values.items() if value is not None}
        epoch = values.pop("epoch", None)
        if step is None and self._trainer is not None:
            step = self._trainer.global_step
        row: dict[str, Any] = {"step": step, "epoch": None if epoch is None else int(epoch)}
        row |= {column(name): value for name, value in values.items()} | self._own
        if row == self._last:  # another logger has shown it already
            return
        self._last = row
        row = {"attempt": self.attempt, "time": f"{time.time():.3f}"} | row
        if self._columns is None:
            self._columns = self._read_columns()
        new = [key for key in row if key not in self._columns]
        if new:
            self._columns = self._widen(self._columns, new)
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._columns).writerow(row)

    def last(self) -> dict[str, float]:
        """The last value of each metric, of all attempts."""
        if not self.path.exists():
            return {}
        values: dict[str, float] = {}
        with self.path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                values |= {name: float(text) for name, text in row.items() if _is_number(text)}
        return {name: value for name, value in values.items() if name not in INDEX}

    def _read_columns(self) -> list[str]:
        if not self.path.exists():
            return []
        text = self.path.read_text(encoding="utf-8")
        if not text.endswith("\n"):  # the last attempt was killed in the middle of a line
            write_atomic(self.path, text[: text.rfind("\n") + 1])
        with self.path.open(newline="", encoding="utf-8") as file:
            return next(csv.reader(file), [])

    def _widen(self, old: list[str], new: list[str]) -> list[str]:
        rows: list[dict[str, Any]] = []
        if old:
            with self.path.open(newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
        columns = [*INDEX, *sorted({*old, *new} - {*INDEX})]
        text = io.StringIO()
        writer = csv.DictWriter(text, columns)
        writer.writeheader()
        writer.writerows(rows)
        write_atomic(self.path, text.getvalue())
        return columns


def _before(logger: Logger, file: MetricsFile) -> None:
    """Let `file` see what is given to `logger`; Lightning gives it to both, one after the other."""
    write = logger.log_metrics

    def write_both(metrics: Any, *args: Any, **kwargs: Any) -> None:
        file.log_metrics(metrics, *args, **kwargs)
        write(metrics, *args, **kwargs)

    logger.log_metrics = write_both  # type: ignore[method-assign]


def _scalar(value: Any) -> Any:
    """A number or a word; None for what a table has no place for, such as pictures."""
    if isinstance(value, Tensor):
        return float(value) if value.numel() == 1 else None
    return value if isinstance(value, (Number, str)) else None


def _is_number(text: str | None) -> bool:
    try:
        float(text or "")
    except ValueError:  # no value in this row, or a word that a logger of one's own was given
        return False
    return True
