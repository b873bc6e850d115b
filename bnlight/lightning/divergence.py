"""Stops a training whose loss is no longer a number."""

from __future__ import annotations

import math
from typing import Any

import pytorch_lightning as pl


class StopOnDivergence(pl.Callback):
    """Stops when a logged metric named `.../loss` or `..._loss` is NaN or infinite, and keeps the reason.

    A diverged job is a result of its setting, not a failure: its state is `diverged`, and a rerun skips it. A
    module may log what only its own rank sees: the ranks agree, and all stop at the same step. `train/loss` is
    looked at whenever `Trainer(log_every_n_steps)` has passed, `val/loss` after each validation.
    """

    def __init__(self) -> None:
        self.reason: str | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"reason": self.reason}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.reason = state_dict["reason"]

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and trainer.global_step % every == 0:
            self._check(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._check(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._check(trainer)

    def _check(self, trainer: pl.Trainer) -> None:
        found = [
            f"{name} is {float(value)}"
            for name, value in trainer.callback_metrics.items()
            if name.endswith(("/loss", "_loss")) and not math.isfinite(float(value))
        ]
        if trainer.strategy.reduce_boolean_decision(bool(found), all=False) and self.reason is None:
            what = found[0] if found else "a loss is not finite on another rank"
            self.reason = f"{what} at step {trainer.global_step}"
            trainer.should_stop = True
