"""Lightning's logger of a job's W&B run: what dashboards read of its metrics, and its best checkpoint."""

from __future__ import annotations

import csv
import logging
import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.utilities import rank_zero_only

from bnlight.run.tracking.pieces import GLOBAL_STEP, KNOWN

log = logging.getLogger(__name__)


class JobLogger(WandbLogger):
    """Logs a job's metrics; the best value so far of the monitored one is `best_<metric>` in the run's summary.

    W&B's own process may be gone (SLURM's SIGTERM reaches it too), or the module has ended the run: the job
    goes on, since `metrics.csv` has it all. With `log_model="best"`, `checkpoints/best.ckpt` becomes the run's
    artifact when training has ended.
    """

    def __init__(
        self,
        run: Any,
        directory: Path,
        monitor: str | None = None,
        mode: str = "max",
        log_model: str | None = None,
    ) -> None:
        super().__init__(experiment=run, save_dir=directory)
        self._directory, self._monitor, self._mode = directory, monitor, mode
        self._best = _best_before(directory / "metrics.csv", monitor, mode)
        self._model = log_model
        self._gone = False
        _define_metrics(run, monitor, mode)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._try(super().log_metrics, metrics, step)
        if self._monitor is not None and self._monitor in metrics:
            value = float(metrics[self._monitor])
            if math.isfinite(value) and value == _better(self._mode, value, self._best) != self._best:
                self._best = value
                self._try(self.experiment.summary.update, {f"best_{self._monitor}": value})

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        self._try(super().log_hyperparams, params)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Called when training has ended, and again when the test has."""
        if status == "success" and self._model:
            self._model = None
            self._try(self._log_best_checkpoint)

    def _try(self, send: Callable[..., object], *arguments: Any) -> None:
        if not self._gone:
            import wandb

            try:
                send(*arguments)
            except (OSError, RuntimeError, wandb.Error) as error:
                self._gone = True
                log.warning("W&B takes no more of this job: %s", error)

    def _log_best_checkpoint(self) -> None:
        """The artifact of the run's best checkpoint; the piece on disk keeps the file, by a hard link where it can.

        So an upload finds it later, also if the job's checkpoints have been pruned.
        """
        import wandb

        best, run = self._directory / "checkpoints" / "best.ckpt", self.experiment
        if run.disabled:
            return
        if not best.exists():
            log.warning("logger.log_model=best: %s does not exist, so W&B gets no checkpoint", best)
            return
        kept = Path(run.dir).parent / "model.ckpt"
        try:
            os.link(best, kept)
        except OSError:
            shutil.copyfile(best, kept)
        about = {"monitor": self._monitor, "mode": self._mode, "value": self._best}
        artifact = wandb.Artifact(f"model-{run.id}", type="model", metadata=about)
        artifact.add_file(str(kept.absolute()), name="model.ckpt", policy="immutable", skip_cache=True)
        run.log_artifact(artifact, aliases=["best"])


def _define_metrics(run: Any, monitor: str | None, mode: str) -> None:
    """The x axis of every chart is the optimizer step; the summary has the best and the last of what is known."""
    run.define_metric(GLOBAL_STEP)
    run.define_metric("*", step_metric=GLOBAL_STEP, step_sync=True)
    run.define_metric("epoch", step_metric=GLOBAL_STEP, hidden=True)
    for name, best in (KNOWN | ({monitor: mode} if monitor else {})).items():
        run.define_metric(name, step_metric=GLOBAL_STEP, summary=f"{best},last")


def _best_before(file: Path, metric: str | None, mode: str) -> float | None:
    """The best value that earlier attempts of the job have logged."""
    best = None
    if metric and file.exists():
        with file.open(newline="", encoding="utf-8") as rows:
            for text in (row.get(metric) for row in csv.DictReader(rows)):
                if text and math.isfinite(float(text)):
                    best = _better(mode, float(text), best)
    return best


def _better(mode: str, value: float, other: float | None) -> float:
    return value if other is None else (min if mode == "min" else max)(value, other)
