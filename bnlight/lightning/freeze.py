"""Lets the norms stand still from a step of the run on."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_warn
from torch import nn

from bnlight.lightning.renorm import planned_steps
from bnlight.norm.paths import Patterns, chosen, paths_of
from bnlight.population import reduce_statistics
from bnlight.surgery import freeze_norm, unfreeze_norm
from bnlight.surgery.freeze import Frozen
from bnlight.surgery.known import is_norm


class FreezeNorm(pl.Callback):
    """Calls `bnlight.freeze_norm` from an optimizer step of the run on, until its end.

    From then on the norms normalize by their running averages, and these, weights and biases stay to the bit, also
    in a run that is resumed after that step, and under DDP, whose ranks first merge their averages
    (`bnlight.reduce_statistics`). At the end of the fit the model is given back as it was.

    Args:
        at: an optimizer step (int), or a fraction of the run (float from 0 to 1).
        include, exclude: patterns of the layers' paths in the module, as in `freeze_norm`.
        affine: False freezes the statistics, and trains weights and biases on.

    Raises ValueError at the start of training for a fraction of a run whose length the Trainer does not know, or a
    pattern that matches no norm.
    """

    def __init__(
        self,
        at: float = 0.5,
        *,
        include: Patterns = None,
        exclude: Patterns = None,
        affine: bool = True,
    ) -> None:
        if at < 0 or (isinstance(at, float) and at > 1):
            raise ValueError(
                f"FreezeNorm: at must be a step (int) or a fraction of the run from 0.0 to 1.0, got {at!r}"
            )
        self.at = at
        self.chosen = {"include": include, "exclude": exclude}
        self.affine = affine
        self._first = 0
        self._layers: dict[nn.Module, bool] = {}  # that this has frozen, and whether they trained before
        self._parameters: list[nn.Parameter] = []  # theirs, that trained before

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._first = (
            round(self.at * planned_steps(trainer, "FreezeNorm", "an int"))
            if isinstance(self.at, float)
            else self.at
        )
        norms: dict[nn.Module, list[str]] = paths_of(pl_module, is_norm)
        if norms:
            chosen("FreezeNorm", norms, **self.chosen)  # so that a wrong pattern fails now
        else:
            rank_zero_warn("FreezeNorm has nothing to do: the model has no norms")

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not self._layers and trainer.global_step >= self._first:
            self._freeze(pl_module)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        for parameter in self._parameters:
            parameter.grad = None  # what an optimizer leaves alone, with momentum and weight decay

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._give_back()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._give_back()

    def _give_back(self) -> None:
        for layer, training in self._layers.items():
            unfreeze_norm(layer)
            layer.training = training  # Lightning changes flags without a word to the layer
        self._layers, self._parameters = {}, []

    def _freeze(self, pl_module: pl.LightningModule) -> None:
        reduce_statistics(pl_module)
        modes = {m: m.training for m in pl_module.modules() if not isinstance(m, Frozen)}
        trained = [parameter for parameter in pl_module.parameters() if parameter.requires_grad]
        if paths_of(pl_module, is_norm):
            freeze_norm(pl_module, **self.chosen, affine=self.affine)
        self._layers = {m: training for m, training in modes.items() if isinstance(m, Frozen)}
        self._parameters = [parameter for parameter in trained if not parameter.requires_grad]
        for parameter in self._parameters:  # DDP counts on the gradients that it has known from the start
            parameter.requires_grad_(True)
