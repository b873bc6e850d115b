"""A run that is stopped in the middle of an epoch goes on with the batches that the loader's workers owe it."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import SMALL
from test_survival import assert_same_run

from bnlight.cli import main

# A user's data, augmented at random in the workers by torch's, numpy's and Python's numbers; its network notes
# each batch, and stops its process at the step that the test says.
MINE = """
import os, pathlib, random, signal
import numpy, pytorch_lightning as pl, torch
from torch.utils.data import DataLoader, Dataset
from bnlight.models import MLP

class Augmented(Dataset):
    def __init__(self, count):
        generator = torch.Generator().manual_seed(0)
        self.x, self.y = torch.randn(count, 1, 8, 8, generator=generator), torch.arange(count) % 10

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        noise = random.random() + numpy.random.rand() + torch.rand(())
        return self.x[index] + noise, self.y[index]

class Data(pl.LightningDataModule):
    num_classes, input_shape = 10, (1, 8, 8)

    def __init__(self, persistent):
        super().__init__()
        self.options = {"num_workers": 2, "persistent_workers": persistent}

    def train_dataloader(self):
        return DataLoader(Augmented(96), 8, shuffle=True, **self.options)

    def val_dataloader(self):
        return DataLoader(Augmented(32), 8, **self.options)

class Net(MLP):
    steps = 0

    def forward(self, x):
        if self.training:
            self.steps += 1
            with open(os.environ["SEEN"], "a") as file:
                print(repr(float(x.double().sum())), file=file)
            if self.steps == int(os.environ.get("AT", 0)):
                os.kill(os.getpid(), signal.SIGTERM)
        return super().forward(x)
"""
JOB = [
    *(argument for argument in SMALL if not argument.startswith(("model", "trainer.max"))),
    "model=custom", "model._target_=mine.Net", "+model.width=16", "+model.depth=1", "trainer.max_epochs=3",
    "trainer.log_every_n_steps=5", "data=custom", "data._target_=mine.Data", "progress=off",
]  # fmt: skip


@pytest.mark.parametrize("persistent", [False, True])
def test_batches_of_worker_processes_are_those_of_the_run_that_was_not_stopped(
    project: Path, monkeypatch: pytest.MonkeyPatch, persistent: bool
) -> None:
    (project / "mine.py").write_text(MINE)
    job = ["train", *JOB, f"+data.persistent={persistent}"]
    monkeypatch.setenv("SEEN", "whole.txt")
    assert main([*job, "paths.outputs=whole"]) == 0
    whole = Path("whole.txt").read_text().splitlines()
    assert len(whole) == len({*whole}) == 36
    for step in (5, 12, 29):  # in the first epoch of 12 batches, at its end, in the third
        monkeypatch.setenv("SEEN", f"{step}.txt")
        monkeypatch.setenv("AT", str(step))
        assert main([*job, f"paths.outputs=at-{step}"]) == 130
        monkeypatch.delenv("AT")
        assert len(Path(f"{step}.txt").read_text().splitlines()) == step
        assert main([*job, f"paths.outputs=at-{step}"]) == 0
        assert Path(f"{step}.txt").read_text().splitlines() == whole
        assert_same_run(Path("whole"), Path(f"at-{step}"))
