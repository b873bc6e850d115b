"""The LightningModule for classification, as one would use it without the command line."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.loggers.logger import Logger
from torch import nn

from bnlight.data import Digits
from bnlight.lightning import Classifier, StepTimer
from bnlight.models import MLP
from bnlight.norm import BatchNorm

SGD = {"_target_": "torch.optim.SGD", "_partial_": True, "lr": 0.1, "weight_decay": 0.1}


class Recorder(Logger):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    name = "recorder"
    version = 0

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None: ...

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))


def network() -> MLP:
    return MLP(input_shape=(1, 8, 8), num_classes=10, norm=BatchNorm, width=16, depth=1)


def fit(module: pl.LightningModule, path: Path, **options: Any) -> Recorder:
    recorder = Recorder()
    trainer = pl.Trainer(
        max_epochs=2, logger=recorder, accelerator="cpu", default_root_dir=path, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, **options,
    )  # fmt: skip
    trainer.fit(module, datamodule=Digits(batch_size=64, seed=0))
    return recorder


def test_a_module_object_and_a_factory_train_as_well_as_configs(tmp_path: Path) -> None:
    module = Classifier(network(), num_classes=10, optimizer=partial(torch.optim.SGD, lr=0.1))
    recorder = fit(module, tmp_path)
    accuracies = [row["val/accuracy"] for _, row in recorder.rows if "val/accuracy" in row]
    assert len(accuracies) == 2
    assert accuracies[-1] > max(0.5, accuracies[0])


def test_weights_are_decayed_and_norms_and_biases_are_not(tmp_path: Path) -> None:
    module = Classifier(network(), num_classes=10, optimizer=SGD)
    fit(module, tmp_path)
    decayed, undecayed = module.trainer.optimizers[0].param_groups
    assert (decayed["weight_decay"], undecayed["weight_decay"]) == (0.1, 0.0)
    linear = {id(layer.weight) for layer in module.modules() if isinstance(layer, nn.Linear)}
    assert {id(parameter) for parameter in decayed["params"]} == linear
    every = [*decayed["params"], *undecayed["params"]]
    assert len(every) == len({id(parameter) for parameter in every}) == len(list(module.parameters()))


@pytest.mark.parametrize("every", [1, 5, 7, 1000])
def test_training_is_logged_every_n_steps_as_the_mean_since_the_last_log(tmp_path: Path, every: int) -> None:
    seen: list[tuple[float, int]] = []

    class Spy(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            seen.append((loss.item(), len(batch[1])))
            return loss

    recorder = fit(Spy(network(), num_classes=10, optimizer=SGD), tmp_path, log_every_n_steps=every)
    steps = len(seen)
    epoch = steps // 2
    due = sorted({step for step in range(1, steps + 1) if step % every == 0} | {epoch, steps})
    rows = [(step, row) for step, row in recorder.rows if "train/loss" in row]
    assert [step for step, _ in rows] == due
    begun = 0
    for step, row in rows:
        window = seen[begun:step]
        mean = sum(loss * size for loss, size in window) / sum(size for _, size in window)
        assert row["train/loss"] == pytest.approx(mean, rel=1e-5)
        begun = step


def test_validation_loss_is_the_mean_over_samples_not_over_batches(tmp_path: Path) -> None:
    module = Classifier(network(), num_classes=10, optimizer=SGD, label_smoothing=0.1)
    recorder = fit(module, tmp_path)
    data = module.trainer.datamodule
    module.eval()
    with torch.no_grad():
        x, y = (torch.cat(parts) for parts in zip(*data.val_dataloader(), strict=True))
        logits = module(x)
    logged = [row for _, row in recorder.rows if "val/loss" in row][-1]
    assert logged["val/loss"] == pytest.approx(F.cross_entropy(logits, y).item(), rel=1e-5)
    assert logged["val/accuracy"] == pytest.approx((logits.argmax(1) == y).float().mean().item(), rel=1e-5)


def test_an_accumulated_step_is_logged_once(tmp_path: Path) -> None:
    module = Classifier(network(), num_classes=10, optimizer=SGD)
    recorder = fit(module, tmp_path, log_every_n_steps=1, accumulate_grad_batches=3)
    steps = [step for step, row in recorder.rows if "train/loss" in row]
    assert len(steps) == len(set(steps))


def test_the_step_timer_leaves_validation_out(tmp_path: Path) -> None:
    import time

    class SlowValidation(Classifier):
        def on_validation_epoch_end(self) -> None:
            time.sleep(0.5)
            super().on_validation_epoch_end()

    module = SlowValidation(network(), num_classes=10, optimizer=SGD)
    recorder = fit(module, tmp_path, callbacks=[StepTimer()])
    timed = [row["train/seconds_per_step"] for _, row in recorder.rows if "train/seconds_per_step" in row]
    assert len(timed) == 2
    assert max(timed) < 0.5 / 18
