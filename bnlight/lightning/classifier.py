"""The LightningModule for classification."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy

from bnlight.lightning.build import Config, instantiate
from bnlight.surgery import norm_parameters

STEPS_OF_THE_RUN = ("T_max", "total_steps", "total_iters")  # scheduler arguments whose null means every step


class Classifier(pl.LightningModule):
    """Trains a network with cross-entropy and reports loss and accuracy.

    Args:
        model: an `nn.Module` that maps a batch to logits `(N, num_classes)`, or a config dict (`_target_` and
            arguments) of one. From dicts alone, a checkpoint is loadable with `weights_only=True` and by
            `Classifier.load_from_checkpoint(path)` without further arguments.
        num_classes: the number of classes.
        optimizer: a factory called with parameter groups, or a config dict with `_partial_: true`. Norm
            parameters and biases are in a group of their own without weight decay.
        scheduler: likewise, called with the optimizer; stepped after every optimizer step. An argument
            `T_max`, `total_steps` or `total_iters` that is None becomes the run's number of optimizer steps.
        label_smoothing: share of the target spread over all classes (training loss only).

    Logs `train/loss`, `train/accuracy` and `train/lr` as means since the last log, every
    `Trainer(log_every_n_steps)` steps and at the end of an epoch; `val/...` and `test/...` once an epoch. Between
    logs the sums stay on the device: a log call per step would halve the speed of a small model.
    """

    def __init__(
        self,
        model: nn.Module | Config,
        num_classes: int,
        optimizer: Callable[..., torch.optim.Optimizer] | Config,
        scheduler: Callable[..., Any] | Config | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        given = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
        self.save_hyperparameters(
            logger=False, ignore=[name for name, value in given.items() if not is_plain(value)]
        )
        self.model: nn.Module = model if isinstance(model, nn.Module) else instantiate(model)
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.label_smoothing = label_smoothing
        self.metrics = nn.ModuleDict(
            {
                f"{stage}_{name}": metric
                for stage in ("val", "test")
                for name, metric in (
                    ("loss", MeanMetric(nan_strategy="disable")),
                    ("accuracy", MulticlassAccuracy(num_classes, average="micro", validate_args=False)),
                )
            }
        )
        self._window: list[Tensor] = []  # loss sum, hits and samples since the last log
        self._logged_at = 0
        self._lr = 0.0

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        self._lr = self.trainer.optimizers[0].param_groups[0]["lr"]  # the one this step uses
        logits = _full(self(x))
        loss = F.cross_entropy(logits, y, label_smoothing=self.label_smoothing)
        with torch.no_grad():
            hits = (logits.argmax(dim=1) == y).sum()
            seen = [loss.detach() * len(y), hits, torch.full_like(hits, len(y))]
            self._window = [a + b for a, b in zip(self._window, seen, strict=True)] if self._window else seen
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = self.trainer.global_step
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and step % every == 0 and step != self._logged_at:
            self._log_window()

    def on_train_epoch_end(self) -> None:
        self._log_window()

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate("val", batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate("test", batch)

    def on_validation_epoch_start(self) -> None:
        # precision="bf16-true" casts it with the weights.
        self._metric("val", "loss").set_dtype(torch.float32)

    def on_test_epoch_start(self) -> None:
        self._metric("test", "loss").set_dtype(torch.float32)

    def on_validation_epoch_end(self) -> None:
        self._log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        self._log_evaluation("test")

    def configure_optimizers(self) -> Any:
        undecayed = list(norm_parameters(self))
        ids = {id(parameter) for parameter in undecayed}
        decayed = [parameter for parameter in self.parameters() if id(parameter) not in ids]
        groups: list[dict[str, Any]] = [{"params": decayed}, {"params": undecayed, "weight_decay": 0.0}]
        optimizer = _build(self.optimizer, [group for group in groups if group["params"]])
        scheduler = self.scheduler
        if scheduler is None or (isinstance(scheduler, dict) and not scheduler.get("_target_")):
            return optimizer
        if isinstance(scheduler, dict):
            scheduler = scheduler_filled(scheduler, self.trainer, optimizer)
        schedule = {"scheduler": _build(scheduler, optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def rank_state_dict(self) -> dict[str, Any]:
        """What this rank has seen since the last log, for a checkpoint in the middle of an epoch."""
        return {"window": self._window, "logged_at": self._logged_at, "lr": self._lr}

    def load_rank_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with what `rank_state_dict` found."""
        self._window = [value.to(self.device) for value in state["window"]]
        self._logged_at, self._lr = state["logged_at"], state["lr"]

    def _log_window(self) -> None:
        if not self._window:
            return
        sums = torch.stack([value.to(self._window[0].dtype) for value in self._window])
        self._window, self._logged_at = [], self.trainer.global_step
        loss, hits, count = self.trainer.strategy.reduce(sums, reduce_op="sum").tolist()
        metrics = {"train/loss": loss / count, "train/accuracy": hits / count, "train/lr": self._lr}
        self.trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})
        self._write(metrics)

    def _evaluate(self, stage: str, batch: tuple[Tensor, Tensor]) -> None:
        x, y = batch
        logits = _full(self(x))
        if len(y):  # a rank may have no sample left while the others still do
            self._metric(stage, "loss").update(F.cross_entropy(logits, y, reduction="none"))
            self._metric(stage, "accuracy").update(logits, y)

    def _log_evaluation(self, stage: str) -> None:
        values = {}
        for name in ("loss", "accuracy"):
            metric = self._metric(stage, name)
            values[f"{stage}/{name}"] = metric.compute()
            metric.reset()
        self.log_dict(values, logger=False)
        self._write({name: float(value) for name, value in values.items()})

    def _metric(self, stage: str, name: str) -> Metric:
        metric = self.metrics[f"{stage}_{name}"]
        assert isinstance(metric, Metric)
        return metric

    def _write(self, metrics: dict[str, float]) -> None:
        """To the loggers, at the number of steps done (Lightning would write the last step's index)."""
        for logger in self.loggers:
            logger.log_metrics(metrics | {"epoch": self.current_epoch}, step=self.trainer.global_step)


def _full(logits: Tensor) -> Tensor:
    """Logits in at least float32: a loss of half-precision logits has three digits."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def scheduler_filled(
    scheduler: Config, trainer: pl.Trainer, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """The scheduler's config with what only the run knows.

    The run's number of optimizer steps where None means all of them; and OneCycleLR cycles the momentum only if the
    optimizer has one, unless the config says otherwise: torch's refuses an optimizer without, and makes 0 to 0.95.
    """
    steps = int(trainer.estimated_stepping_batches)
    filled = {k: steps if v is None and k in STEPS_OF_THE_RUN else v for k, v in scheduler.items()}
    moving = any(group.get("momentum") or "betas" in group for group in optimizer.param_groups)
    if str(scheduler.get("_target_")).endswith(".OneCycleLR") and not moving:
        filled.setdefault("cycle_momentum", False)
    return filled


def _build(factory: Any, *args: Any) -> Any:
    return instantiate(factory)(*args) if isinstance(factory, dict) else factory(*args)


def is_plain(value: Any) -> bool:
    """Whether the value is made of dicts, lists, strings and numbers alone."""
    if isinstance(value, dict):
        return all(is_plain(item) for item in value.values())
    if isinstance(value, Iterable) and not isinstance(value, str):
        return isinstance(value, list | tuple) and all(is_plain(item) for item in value)
    return value is None or isinstance(value, str | int | float | bool)
