"""Sets the lengths of weight-normalized layers from the first training batch."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch

from bnlight.norm import initialize_weight_norm


class InitializeWeightNorm(pl.Callback):
    """Calls `bnlight.norm.initialize_weight_norm` with the first batch of a training that starts afresh.

    The module's `forward` gets the batch, or its first element if it is a tuple or list. A training that resumes
    keeps its values. With several processes (DDP), rank 0's batch decides: all ranks get its parameters.
    """

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step or batch_idx:
            return
        initialize_weight_norm(pl_module, batch)
        if trainer.world_size > 1:
            for parameter in pl_module.parameters():
                torch.distributed.broadcast(parameter.detach(), src=0)
