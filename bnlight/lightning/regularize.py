"""Keeps the parameters of the norms near their neutral values, or inside bounds."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_warn
from torch.utils.hooks import RemovableHandle

from bnlight.surgery import Bounds, constrain_norm, norm_penalty


class PenalizeNorm(pl.Callback):
    """Trains with the loss plus `bnlight.surgery.norm_penalty`, whose arguments it takes.

    The penalty's gradient is added just before each optimizer step, once however many micro-batches that step
    has, and before gradients are clipped; the loss that is logged does not contain it. Each optimizer gets the
    gradients of its own parameters. Warns if the model has no norm.
    """

    def __init__(
        self, *, weight: float = 1e-4, bias: float = 1e-4, target: float = 1.0, power: float = 2.0
    ) -> None:
        self.options = {"weight": weight, "bias": bias, "target": target, "power": power}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not norm_penalty(pl_module, **self.options).requires_grad:
            rank_zero_warn(
                "PenalizeNorm has nothing to do: no norm in the model has a weight or bias to train"
            )

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        with torch.enable_grad():
            penalty = norm_penalty(pl_module, **self.options)
        if not penalty.requires_grad:
            return
        scaler = trainer.scaler
        if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            penalty = scaler.scale(penalty)  # a fused optimizer divides the gradients itself
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        gradients = torch.autograd.grad(penalty, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)


class ConstrainNorm(pl.Callback):
    """Calls `bnlight.surgery.constrain_norm`, whose arguments it takes, after every step of every optimizer."""

    def __init__(self, *, weight: Bounds = (None, None), bias: Bounds = (None, None)) -> None:
        self.options = {"weight": weight, "bias": bias}
        self._hooks: list[RemovableHandle] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        def constrain(*_: Any) -> None:
            constrain_norm(pl_module, **self.options)

        self._hooks = [optimizer.register_step_post_hook(constrain) for optimizer in trainer.optimizers]

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._remove()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._remove()

    def _remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
