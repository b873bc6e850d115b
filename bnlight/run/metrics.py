"""`metrics.csv`: every metric of a job, one wide table that needs no service to be read."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities import rank_zero_only

from bnlight.run.status import write_atomic

INDEX = ("attempt", "step", "epoch", "time")  # time: unix seconds


class MetricsFile(Logger):
    """A Lightning logger that appends rows to `metrics.csv` in the job's directory.

    A metric seen for the first time widens the table: the file is then written anew, atomically. A resumed job
    appends under its own `attempt`; readers keep the last attempt of each step.
    """

    def __init__(self, directory: Path, attempt: int) -> None:
        super().__init__()
        self.path = directory / "metrics.csv"
        self.attempt = attempt
        self._columns: list[str] | None = None  # read by the rank that writes

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> int:
        return self.attempt

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The job's `config.yaml` holds them."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        row: dict[str, Any] = {
            "attempt": self.attempt,
            "step": step,
            "epoch": None,
            "time": f"{time.time():.3f}",
        }
        row |= {key: int(value) if key == "epoch" else value for key, value in metrics.items()}
        if self._columns is None:
            self._columns = self._read_columns()
        new = [key for key in row if key not in self._columns]
        if new:
            self._columns = self._widen(self._columns, new)
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._columns).writerow(row)

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
