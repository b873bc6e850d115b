"""Checkpoints that know their own metrics and whose folder may move."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor

from bnlight.lightning.classifier import is_plain


class Checkpoint(ModelCheckpoint):
    """Lightning's `ModelCheckpoint`, with some differences.

    The checkpoint holds the metrics of the moment it was taken, `checkpoint["metrics"]`, and of the module's
    hyperparameters the plain ones and tensors, so that it loads with `weights_only=True`. A job that resumes
    after its folder has moved still knows which checkpoint was best: Lightning would forget the score, and
    overwrite the best with the next one. A score that is not finite is the worst there is. A `monitor` that was not
    logged is an error also where nothing is validated; it lists what was logged.
    """

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        to_come = trainer.val_dataloaders is None or sum(trainer.num_val_batches) > 0
        validates = trainer.enable_validation and to_come  # perhaps in a later epoch
        if self.monitor is not None and self.monitor not in trainer.callback_metrics and not validates:
            raise ValueError(self._not_logged(trainer))
        with self._told(trainer):
            super().on_train_epoch_end(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        with self._told(trainer):
            super().on_validation_end(trainer, pl_module)

    def _save_monitor_checkpoint(self, trainer: pl.Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        score = monitor_candidates.get(str(self.monitor))
        if score is not None and not torch.isfinite(score):
            worst = -math.inf if self.mode == "max" else math.inf
            monitor_candidates = monitor_candidates | {str(self.monitor): torch.full_like(score, worst)}
        super()._save_monitor_checkpoint(trainer, monitor_candidates)

    @contextlib.contextmanager
    def _told(self, trainer: pl.Trainer) -> Iterator[None]:
        try:
            yield
        except MisconfigurationException as error:
            if self.monitor is None or self.monitor in trainer.callback_metrics:
                raise
            raise ValueError(self._not_logged(trainer)) from error

    def _not_logged(self, trainer: pl.Trainer) -> str:
        logged = ", ".join(sorted(trainer.callback_metrics)) or "nothing"
        return (
            f"the best checkpoint is chosen by {self.monitor}, which was not logged; logged: {logged}. Choose one of "
            "these (monitor.metric=... monitor.mode=min or max), log it in the module, or keep the last checkpoint "
            "as the best (monitor.metric=null)"
        )

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["metrics"] = {name: float(value) for name, value in trainer.callback_metrics.items()}
        given = checkpoint.get(pl_module.CHECKPOINT_HYPER_PARAMS_KEY, {})
        if isinstance(given, dict):
            kept = {k: v for k, v in given.items() if is_plain(v) or isinstance(v, Tensor)}
            checkpoint[pl_module.CHECKPOINT_HYPER_PARAMS_KEY] = kept

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        def moved(path: str) -> str:
            return str(Path(self.dirpath or "") / Path(path).name) if path else path

        paths = ("best_model_path", "kth_best_model_path", "last_model_path")
        state = dict(state_dict) | {key: moved(state_dict[key]) for key in paths}
        state["best_k_models"] = {moved(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict(state | {"dirpath": self.dirpath})
