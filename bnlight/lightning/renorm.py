"""Relaxes the bounds of batch renormalization over the Trainer's steps."""

from __future__ import annotations

import math
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import GradientAccumulationScheduler
from pytorch_lightning.utilities import rank_zero_warn

from bnlight.norm.schedule import renorm_schedule


class RenormSchedule(pl.Callback):
    """Calls `bnlight.norm.renorm_schedule` before each optimizer step, with `trainer.global_step`.

    Micro-batches of one step, validation and passes outside of training do not advance it. A resumed run goes
    on as if it had not stopped, given the same plan. A model without `BatchRenorm` is trained as it is, with a
    warning: the same callback may stand in a sweep over norms.

    Args:
        total_steps: optimizer steps planned; None asks the Trainer (`estimated_stepping_batches`). It is in
            units of `trainer.global_step`, which with several optimizers counts each one's step.
        r_max, d_max, warmup, r_max_at, d_max_at: as in `renorm_schedule`.

    Raises ValueError at the start of training if the Trainer cannot know the number of steps: no limit, data
    without length, several optimizers limited by epochs, or an accumulation that changes with the epoch.
    """

    def __init__(
        self,
        total_steps: int | None = None,
        *,
        r_max: float = 3.0,
        d_max: float = 5.0,
        warmup: float = 0.04,
        r_max_at: float = 0.32,
        d_max_at: float = 0.2,
    ) -> None:
        self.total_steps = total_steps
        self.shape = {
            "r_max": r_max,
            "d_max": d_max,
            "warmup": warmup,
            "r_max_at": r_max_at,
            "d_max_at": d_max_at,
        }
        self._total = 0
        self._step = -1  # the one whose bounds are set

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._total = (
            planned_steps(trainer, "RenormSchedule", "total_steps=...")
            if self.total_steps is None
            else self.total_steps
        )
        if self._set(trainer, pl_module) == 0:
            rank_zero_warn(
                "RenormSchedule has nothing to do: the model has no bnlight.norm.BatchRenorm. Choose norm=renorm, "
                "or leave the callback out"
            )

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        last = max(self.shape["r_max_at"], self.shape["d_max_at"]) * self._total
        if trainer.global_step != self._step and self._step < last:
            self._set(trainer, pl_module)

    def _set(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> int:
        self._step = trainer.global_step
        return renorm_schedule(pl_module, self._step, self._total, **self.shape)


def planned_steps(trainer: pl.Trainer, name: str, instead: str) -> int:
    """The number that `trainer.global_step` will reach; ValueError where the Trainer cannot know it.

    The error speaks for the callback `name`, which would take `instead`.
    """
    steps = trainer.estimated_stepping_batches
    reason = None
    if not 0 < steps < math.inf:
        reason = (
            f"max_epochs={trainer.max_epochs}, max_steps={trainer.max_steps} and "
            f"{trainer.num_training_batches} batches in an epoch set no limit"
        )
    elif steps != trainer.max_steps:
        if len(trainer.optimizers) > 1:
            reason = f"global_step counts the steps of all {len(trainer.optimizers)} optimizers, an epoch its batches"
        elif any(isinstance(c, GradientAccumulationScheduler) for c in trainer.callbacks):  # type: ignore[attr-defined]
            reason = "GradientAccumulationScheduler changes the steps of an epoch"
    if reason:
        raise ValueError(
            f"{name}: the Trainer does not know its number of optimizer steps: {reason}. Give "
            f"{name}({instead}), or limit the run with Trainer(max_steps=...)"
        )
    return int(steps)
