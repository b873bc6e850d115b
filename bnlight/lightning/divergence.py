"""Stops a training whose loss is no longer a number."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor


class StopOnDivergence(pl.Callback):
    """Stops when the training's loss is NaN or infinite, and keeps the reason.

    Looked at are what `training_step` returns, what it hands to `manual_backward`, and every metric logged in
    training that is named `.../loss` or `..._loss`; where a step shows none of them, the parameters at the end of
    the epoch. That is whenever `Trainer(log_every_n_steps)` steps have passed, and at the end of an epoch. A
    validation that is not finite is a bad score, and no divergence: running averages may need some more steps.

    A diverged job is a result of its setting, not a failure: its state is `diverged`, and a rerun skips it. A
    module may see what only its own rank sees: the ranks agree, and all stop at the same step.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._seen: list[tuple[str, Tensor]] = []  # the losses of the last step

    def state_dict(self) -> dict[str, Any]:
        return {"reason": self.reason}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.reason = state_dict["reason"]

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._seen = []

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        if not pl_module.automatic_optimization and getattr(trainer.precision_plugin, "scaler", None) is None:
            self._seen.append(
                ("the training loss", loss.detach())
            )  # a scaled one may be infinite once in a while

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor):
            self._seen.append(("the training loss", loss.detach()))
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and trainer.global_step % every == 0:
            self._check(trainer, [*_logged(trainer), *self._seen])

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        watched = [*_logged(trainer), *self._seen]
        self._check(trainer, watched or list(pl_module.named_parameters()))

    def _check(self, trainer: pl.Trainer, watched: list[tuple[str, Tensor]]) -> None:
        found = next(((name, value) for name, value in watched if not torch.isfinite(value).all()), None)
        if trainer.strategy.reduce_boolean_decision(found is not None, all=False) and self.reason is None:
            what = _said(*found) if found else "a loss is not finite on another rank"
            self.reason = f"{what} at step {trainer.global_step}"
            trainer.should_stop = True


def _logged(trainer: pl.Trainer) -> Iterator[tuple[str, Tensor]]:
    """The losses that are logged, but for those of an evaluation."""
    results = trainer.fit_loop.epoch_loop.val_loop._results
    validation = {result.meta.name for result in results.values()}
    for name, value in trainer.callback_metrics.items():
        evaluated = name in validation or name.startswith(("val", "test"))
        if name.endswith(("/loss", "_loss")) and not evaluated:
            yield name, value


def _said(name: str, value: Tensor) -> str:
    return f"{name} is {float(value.detach()[~torch.isfinite(value)][0])}"
