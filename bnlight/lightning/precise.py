"""Evaluates and saves by statistics that fit the weights."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import StochasticWeightAveraging, WeightAveraging
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch import nn

from bnlight.lightning.training_data import Dataloader, training_batches
from bnlight.population import UnconvergedAverages, precise_statistics
from bnlight.population.observe import Forward, frozen, layers_of

_ESTIMATED = ("running_mean", "running_var")


class PreciseStatistics(pl.Callback):
    """Calls `bnlight.precise_statistics` on training batches before each validation and the checkpoints after it.

    That is before every validation of the fit, and before the checkpoints at the end of an epoch and at the end
    of training where no validation has come since the last step. Checkpoints in the middle of an epoch hold the
    averages of training. Training goes on from the estimate. Its batches and random numbers are those it would
    have had, and so are its weights, except where a layer trains by its averages (BatchRenorm, FullNorm).

    With weight averaging (Lightning's `WeightAveraging`, `EMAWeightAveraging`, `StochasticWeightAveraging`) the
    statistics are the averaged model's, its counters and other buffers of norms the current model's, never
    averaged. Such callbacks stand before this one in the list: ValueError.

    Under DDP each rank reads its own part of the data, and all ranks end with the same statistics.

    Args:
        num_batches: how many on each rank, at most all; 10**3 to 10**4 samples are enough.
        every_n_epochs: only in every n-th epoch; the end of training always.
        forward: called as `forward(module, batch)`; None calls the module with the batch, or with its first element.
        dataloader: batches instead of the training's own, or a function that returns them; needed where those
            cannot be read twice (an IterableDataset, several loaders: TypeError).

    Raises TypeError at the start if the module has no `forward` of its own and none is given.
    """

    def __init__(
        self,
        num_batches: int = 200,
        *,
        every_n_epochs: int = 1,
        forward: Forward | None = None,
        dataloader: Dataloader | None = None,
    ) -> None:
        if num_batches < 1 or every_n_epochs < 1:
            raise ValueError(
                "PreciseStatistics: num_batches and every_n_epochs must be at least 1, got "
                f"num_batches={num_batches}, every_n_epochs={every_n_epochs}"
            )
        self.num_batches = num_batches
        self.every_n_epochs = every_n_epochs
        self.forward = forward
        self.dataloader = dataloader
        self._step = -1  # the one whose weights the statistics belong to
        self._layers: dict[str, nn.Module] = {}
        self._still: set[str] = set()
        self._told = False

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step, self._layers, self._told = -1, layers_of(pl_module), False
        if self.forward is None and not is_overridden("forward", pl_module):
            raise TypeError(
                f"PreciseStatistics passes batches through {type(pl_module).__name__}.forward, which does not exist; "
                "write it, or say what to do instead: forward=lambda module, batch: module.net(batch[0])"
            )
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        for later in callbacks[callbacks.index(self) :]:
            if isinstance(later, WeightAveraging | StochasticWeightAveraging):
                raise ValueError(
                    f"PreciseStatistics stands before {type(later).__name__} in the callbacks, whose averaged weights "
                    "it would not see; move it behind"
                )

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._still = {path for path, layer in self._layers.items() if frozen(layer, pl_module)}

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._estimate_in_turn(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._estimate_in_turn(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        swa = any(isinstance(c, StochasticWeightAveraging) for c in trainer.callbacks)  # type: ignore[attr-defined]
        if swa or self._step != trainer.global_step:
            self._estimate(trainer, pl_module, pl_module)

    def _estimate_in_turn(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        due = (trainer.current_epoch + 1) % self.every_n_epochs == 0
        if trainer.state.fn == "fit" and due and self._step != trainer.global_step:
            self._estimate(trainer, pl_module, averaged_model(trainer) or pl_module)
            self._step = trainer.global_step

    def _estimate(self, trainer: pl.Trainer, pl_module: pl.LightningModule, model: nn.Module) -> None:
        layers = layers_of(model)
        if not layers.keys() - self._still:
            return
        with torch.no_grad():
            for path, current in self._layers.items():
                for name, buffer in current.named_buffers(recurse=False):
                    if model is not pl_module and name not in _ESTIMATED:
                        layers[path].get_buffer(name).copy_(buffer)
        with (
            training_batches(trainer, pl_module, self.num_batches, self.dataloader) as batches,
            trainer.precision_plugin.forward_context(),
            _training(model, [layer for path, layer in layers.items() if path not in self._still]),
            warnings.catch_warnings(),
        ):
            if self._told:  # the averages come from the last estimate, not from their initial values
                warnings.simplefilter("ignore", UnconvergedAverages)
            self._told = True
            precise_statistics(model, batches, forward=self.forward)


def averaged_model(trainer: pl.Trainer) -> nn.Module | None:
    """What validation and checkpoints take in place of the current model, if a callback averages it."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WeightAveraging) and callback._average_model is not None:
            inner = callback._average_model.module
            assert isinstance(inner, nn.Module)
            return inner
    return None


@contextmanager
def _training(model: nn.Module, moving: list[nn.Module]) -> Iterator[None]:
    """The model and these layers in training mode, its other layers frozen."""
    flags = [(module, module.training) for module in (model, *layers_of(model).values())]
    for module, _ in flags:
        module.training = False
    for module in (model, *moving):
        module.training = True
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training
