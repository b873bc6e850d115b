"""What users have reported of training jobs elsewhere, tried here; docs/tested-against.md lists the reports."""

from __future__ import annotations

import csv
import importlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import SMALL
from own_code import MAE, MINE, SERIES
from wandb_file import records

from bnlight import load
from bnlight.cli import main
from bnlight.run.status import read_status

MORE = '''
import os, signal
import numpy as np
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from torchmetrics import R2Score


class Uneven(Series):
    """Five samples to test by."""

    def setup(self, stage):
        super().setup(stage)
        self.parts = self.parts[0], TensorDataset(*self.parts[1][:5])


class Tested(Regression):
    """Logs a mean of its own rank, and a metric object of what is no mean over batches."""

    def __init__(self):
        super().__init__()
        self.r2 = R2Score()

    def test_step(self, batch, index):
        found = self(batch[0])
        self.log("test/mae", F.l1_loss(found, batch[1]))
        self.r2(found, batch[1])
        self.log("test/r2", self.r2)


class Noise(Series):
    def setup(self, stage):
        super().setup(stage)
        self.parts = Drawn(self.parts[0]), self.parts[1]

    def train_dataloader(self):
        return DataLoader(self.parts[0], self.batch_size, num_workers=2, multiprocessing_context="fork")


class Drawn(torch.utils.data.Dataset):
    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        draw = torch.distributions.Uniform(0.0, 1.0).sample().item()
        with open("drawn", "a") as file:
            file.write(f"{np.random.rand()} {draw}\\n")
        return self.data[index]


class TwoSets(Series):
    def val_dataloader(self):
        return [super().val_dataloader(), DataLoader(self.parts[0], 16)]


class TwoScores(Regression):
    """The second set is scored best in the first epoch, and the first in the last."""

    def validation_step(self, batch, index, dataloader_idx=0):
        self.log("val/mae", float(self.current_epoch if dataloader_idx else -self.current_epoch))


class OwnCallbacks(Regression):
    def configure_callbacks(self):
        return [ModelCheckpoint("own", monitor="val/mae", mode="max"), EarlyStopping("val/mae", patience=99)]


class Watched(Regression):
    def on_fit_start(self):
        for logger in self.loggers:
            if type(logger).__name__.endswith("WandbLogger"):
                logger.watch(self.net, log_freq=1)


class Exact(Regression):
    def validation_step(self, batch, index):
        self.log("val/mae", 0.123456789)


class Worse(Regression):
    """Never better than in its first validation; its process is sent a signal in the epoch that AT says."""

    def on_train_epoch_start(self):
        if self.current_epoch == int(os.environ.get("AT", -1)):
            os.kill(os.getpid(), signal.SIGTERM)

    def validation_step(self, batch, index):
        self.log("val/mae", float(self.current_epoch))
'''
OWN = [*SERIES, *MAE, "module=custom", "replace_norm=true"]
RANKS = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
RATES = ["callbacks=[default]", "+callbacks.lr._target_=pytorch_lightning.callbacks.LearningRateMonitor"]


@pytest.fixture
def mine(project: Path) -> Path:
    (project / "mine.py").write_text(MINE + MORE)
    return project


def train(*arguments: str, code: int = 0) -> Path:
    before = {*Path("outputs").rglob("status.json")}
    assert main(["train", *arguments]) == code
    (job,) = {*Path("outputs").rglob("status.json")} - before
    return job.parent


def metrics(job: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads((job / "result.json").read_text())["metrics"]
    return found


def rows(job: Path, *names: str) -> list[dict[str, float]]:
    """The lines of metrics.csv that have a value in each column."""
    with (job / "metrics.csv").open() as file:
        return [
            {name: float(row[name]) for name in names}
            for row in csv.DictReader(file)
            if all(row.get(name) for name in names)
        ]


def test_a_test_on_two_ranks_counts_each_sample_once(mine: Path) -> None:
    """Lightning-AI/pytorch-lightning#7929, Lightning-AI/pytorch-lightning#4732, pytorch/pytorch#25162: the sampler of
    several ranks repeats samples until all ranks have as many, and the test metrics are wrong.

    Lightning-AI/torchmetrics#597: a metric that is no mean over batches must be logged as an object.
    """
    job = train(*OWN, *RANKS, "module._target_=mine.Tested", "data._target_=mine.Uneven")
    user = importlib.import_module("mine")
    data = user.Uneven()
    data.setup("test")
    x, y = data.parts[1].tensors
    module = load(job / "checkpoints" / "best.ckpt", user.Tested).eval()
    with torch.no_grad():
        found = module(x)
    assert metrics(job)["test/mae"] == pytest.approx(float((found - y).abs().mean()), rel=1e-5)
    r2 = 1 - float(((found - y) ** 2).sum() / ((y - y.mean()) ** 2).sum())
    assert metrics(job)["test/r2"] == pytest.approx(r2, rel=1e-4)


def test_workers_and_epochs_draw_different_random_numbers(mine: Path) -> None:
    """Lightning-AI/pytorch-lightning#6960, Lightning-AI/pytorch-lightning#20412: all workers, or all epochs, apply the
    same augmentations."""
    train(*OWN, "module._target_=mine.Regression", "data._target_=mine.Noise")
    draws = [line.split() for line in Path("drawn").read_text().splitlines()]
    for by_numpy_or_torch in zip(*draws, strict=True):
        assert len({*by_numpy_or_torch}) == len(draws) == 2 * 96


def test_the_learning_rate_follows_the_optimizers_steps_and_each_of_its_values_is_kept(project: Path) -> None:
    """Lightning-AI/pytorch-lightning#1476: schedules step with each batch, not with each accumulated step.

    wandb/wandb#1534: W&B drops the learning rates, as their step is less than the last that was logged.
    Lightning-AI/pytorch-lightning#1220: the W&B run has no test results.
    """
    small = [argument for argument in SMALL if argument != "logger=csv"]
    accumulated = ["trainer.accumulate_grad_batches=4", "trainer.log_every_n_steps=1", "data.batch_size=64"]
    job = train(*small, *RATES, *accumulated, "logger=wandb", "scheduler=onecycle", "optimizer.lr=0.1")
    steps = json.loads((job / "result.json").read_text())["steps"]
    batches = -(-1437 * 4 // 5 // 64)
    assert steps == -(-batches // 4)
    (path,) = job.glob("wandb/offline-run-*/run-*.wandb")
    rates, names = [], set()
    for record in records(path):
        if record.WhichOneof("record_type") == "history":
            items = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
            names |= {*items}
            rates += [float(value) for name, value in items.items() if name == "train/lr"]
    expected = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(expected, max_lr=0.1, total_steps=steps)
    wanted = [schedule.get_last_lr()[0]]
    for _ in range(steps - 1):
        expected.step()
        schedule.step()
        wanted.append(schedule.get_last_lr()[0])
    assert rates == pytest.approx(wanted)
    assert "test/accuracy" in names
    assert [row["train/lr"] for row in rows(job, "train/lr")] == pytest.approx(wanted)


def test_one_of_two_validation_sets_is_monitored_by_the_name_that_lightning_gives_it(mine: Path) -> None:
    """Lightning-AI/pytorch-lightning#4848: with several loaders each metric has a suffix."""
    own = [*OWN, "module._target_=mine.TwoScores", "data._target_=mine.TwoSets"]
    for index, epoch in enumerate([1, 0]):
        job = train(*own, f"monitor.metric=val/mae/dataloader_idx_{index}")
        assert torch.load(job / "checkpoints" / "best.ckpt", weights_only=True)["epoch"] == epoch
        assert metrics(job)[f"val/mae/dataloader_idx_{index}"] == -epoch * (1 - 2 * index)


def test_callbacks_that_a_module_configures_take_no_checkpoint_from_the_job(mine: Path) -> None:
    """Lightning-AI/pytorch-lightning#5621: callbacks of a module replace those of the same type in the Trainer."""
    job = train(*OWN, "module._target_=mine.OwnCallbacks", "callbacks=early_stopping", "trainer.max_epochs=3")
    kept = {path.name for path in (job / "checkpoints").iterdir()}
    assert kept == {"best.ckpt", "last.ckpt"}
    scores = [row["val/mae"] for row in rows(job, "val/mae")]
    assert metrics(job)["val/mae"] == pytest.approx(min(scores))  # by the job's own monitor
    assert len([*Path("own").iterdir()]) == 1


def test_a_job_with_wandb_switched_off_trains(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning-AI/pytorch-lightning#14021, wandb/wandb#8618: WandbLogger and wandb.watch raise in mode "disabled"."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    job = train(*OWN, "module._target_=mine.Watched", "logger=wandb")
    assert read_status(job)["state"] == "done"
    assert not [*job.glob("wandb/*run-*")]


def test_a_logged_number_keeps_its_digits_in_half_precision(mine: Path) -> None:
    """Lightning-AI/pytorch-lightning#18984: self.log rounds to the module's precision, bfloat16 in bf16-true."""
    job = train(*OWN, "module._target_=mine.Exact", "trainer.precision=bf16-true")
    assert metrics(job)["val/mae"] == pytest.approx(0.123456789, rel=1e-6)


STOPPING = [*OWN, "module._target_=mine.Worse", "callbacks=early_stopping", "trainer.max_epochs=9"]


def test_a_resumed_job_stops_as_early_as_one_that_was_not_interrupted_and_leaves_others_alone(
    mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning-AI/pytorch-lightning#1464: the state of EarlyStopping in a checkpoint is one epoch behind.

    Lightning-AI/pytorch-lightning#11379: resuming a copy of a run deletes checkpoints of the original.
    """
    patience = "callbacks.early_stopping.patience=3"
    whole = train(*STOPPING, patience)
    monkeypatch.setenv("AT", "2")
    original = train(*STOPPING, patience, "paths.outputs=outputs/first", code=130)
    shutil.copytree("outputs/first", "outputs/copy")
    before = {path: path.read_bytes() for path in original.rglob("*") if path.is_file()}
    monkeypatch.delenv("AT")
    assert main(["train", *STOPPING, patience, "paths.outputs=outputs/copy"]) == 0
    (copy,) = (path.parent for path in Path("outputs/copy").glob("train/*/result.json"))
    assert {path: path.read_bytes() for path in original.rglob("*") if path.is_file()} == before
    results = [json.loads((job / "result.json").read_text()) for job in (whole, copy)]
    assert [result["epochs"] for result in results] == [4, 4]
    assert [result["metrics"]["val/mae"] for result in results] == [0, 0]
