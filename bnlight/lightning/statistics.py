"""Running statistics of several ranks, and of accumulated batches, taken together."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.nn.modules.batchnorm import _NormBase

from bnlight.lightning.precise import averaged_model
from bnlight.norm.batch import BatchStatistics
from bnlight.population import PooledStatistics, pool_statistics, reduce_statistics

_IGNORED = "_ddp_params_and_buffers_to_ignore"


class ReduceStatistics(pl.Callback):
    """Calls `bnlight.reduce_statistics` before every validation and checkpoint of a training on several ranks.

    Without it DistributedDataParallel copies rank 0's running averages over the others' at each forward: the
    other ranks' data never count, and the ranks differ by their last batch. With it each rank keeps averages of
    its own (DDP leaves them out of that copy), and all ranks validate, save and go on with the merged ones. The
    metrics of a validation are those of its checkpoint in any number of processes.

    On one device nothing changes, synchronized layers neither. The copy of a model that `WeightAveraging` averages
    is merged too. Checkpoints of weights only (`save_weights_only=True`) that are saved within an epoch tell no
    callback: with such the ranks merge after every step. Saving after an exception merges nothing, since the
    other ranks may be gone.
    """

    def __init__(self) -> None:
        self._step = -1
        self._users: list[str] | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit" or trainer.world_size == 1:
            return
        own = [
            f"{path}.{name}"
            for path, layer in pl_module.named_modules()
            if isinstance(layer, BatchStatistics | _NormBase)
            for name, _ in layer.named_buffers(recurse=False)
        ]
        self._users = getattr(pl_module, _IGNORED, None)
        setattr(pl_module, _IGNORED, [*(self._users or []), *own])

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.world_size > 1:  # by now DDP knows
            pl_module.__dict__.pop(_IGNORED, None)
            if self._users is not None:
                setattr(pl_module, _IGNORED, self._users)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._step != trainer.global_step and any(map(_saves_silently, trainer.checkpoint_callbacks)):
            self._reduce(trainer, pl_module)
        self._step = trainer.global_step

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit":
            self._reduce(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._reduce(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._reduce(trainer, pl_module)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._reduce(trainer, pl_module)  # whose buffers the checkpoint holds

    def _reduce(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.world_size == 1 or trainer.interrupted:
            return
        reduce_statistics(pl_module)
        averaged = averaged_model(trainer)
        if averaged is not None:
            reduce_statistics(averaged)


class PoolStatistics(pl.Callback):
    """`bnlight.pool_statistics`: with `accumulate_grad_batches` the averages move once per optimizer step.

    All micro-batches since the last step move them together, however many there are, the last ones of an epoch
    included. Works with manual optimization, where every step of any optimizer counts.
    """

    def __init__(self) -> None:
        self._pool: PooledStatistics | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._pool = pool_statistics(pl_module)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if self._pool is not None:
            self._pool.step()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._pool is not None:
            self._pool.step()  # what no optimizer has stepped for

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._close()

    def _close(self) -> None:
        if self._pool is not None:
            self._pool.close()
            self._pool = None


def _saves_silently(callback: pl.Callback) -> bool:
    return (
        isinstance(callback, ModelCheckpoint)
        and callback.save_weights_only
        and (callback._every_n_train_steps > 0 or callback._train_time_interval is not None)
    )
