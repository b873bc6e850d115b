"""Checkpoints that know their own metrics and whose folder may move."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ModelCheckpoint


class Checkpoint(ModelCheckpoint):
    """Lightning's `ModelCheckpoint`, with two differences.

    The checkpoint holds the metrics of the moment it was taken, `checkpoint["metrics"]`. And a job that resumes
    after its folder has moved still knows which checkpoint was best: Lightning would forget the score, and
    overwrite the best with the next one.
    """

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["metrics"] = {name: float(value) for name, value in trainer.callback_metrics.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        def moved(path: str) -> str:
            return str(Path(self.dirpath or "") / Path(path).name) if path else path

        paths = ("best_model_path", "kth_best_model_path", "last_model_path")
        state = dict(state_dict) | {key: moved(state_dict[key]) for key in paths}
        state["best_k_models"] = {moved(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict(state | {"dirpath": self.dirpath})
