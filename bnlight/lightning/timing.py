"""Measures what a training step costs, validation and checkpoints left out."""

from __future__ import annotations

import time
from typing import Any

import pytorch_lightning as pl
import torch

SECONDS_PER_STEP = "train/seconds_per_step"


class StepTimer(pl.Callback):
    """Logs `train/seconds_per_step`, the wall time of an epoch's training steps over their number.

    The clock runs from the start of a batch to the end of the last one before something else happens
    (validation, checkpoint, end of epoch); the device is waited for only there, so steps stay asynchronous.
    """

    def __init__(self) -> None:
        self._begun: float | None = None
        self._seconds = 0.0
        self._steps = 0

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._begun is None:
            self._begun = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._steps += 1

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._pause(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._pause(trainer)
        if self._steps:
            metrics = {SECONDS_PER_STEP: self._seconds / self._steps, "epoch": trainer.current_epoch}
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=trainer.global_step)
        self._seconds, self._steps = 0.0, 0

    def _pause(self, trainer: pl.Trainer) -> None:
        if self._begun is not None:
            if trainer.strategy.root_device.type == "cuda":
                torch.cuda.synchronize()
            self._seconds += time.perf_counter() - self._begun
            self._begun = None
