"""A small search of one's own, `sweeps/ours.yaml`, whose trials do what the test says.

`from search import ours` in a test file makes the fixture known there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from bnlight.run.status import read_status

# Data that do to each job, one after the other, what the file `acts` says, and note who has trained with what.
MINE = """
import fcntl, os, signal, time
from bnlight.data import Digits
from bnlight.norm import BatchNorm

ACT = [""]

class Data(Digits):
    def setup(self, stage):
        super().setup(stage)
        if stage == "fit":
            with open("acts", "r+") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                ACT[0], *rest = file.read().split() or [""]
                file.seek(0)
                file.truncate()
                file.write(" ".join(rest))
            if ACT[0] == "fail":
                raise RuntimeError("as asked")
            if ACT[0] == "stop":
                raise KeyboardInterrupt
            if ACT[0] == "wait":
                open("begun", "w").close()
                while os.path.exists("begun"):
                    time.sleep(0.1)
            if ACT[0] == "kill":
                os.kill(os.getpid(), signal.SIGKILL)

class Norm(BatchNorm):
    def forward(self, x, mask=None):
        return super().forward(x, mask) * (float("nan") if ACT[0] == "diverge" else 1.0)
"""
SEARCH = """
# Which learning rate?
defaults: [train, {override model: mlp}, {override logger: csv}, {override trainer: cpu}, {override data: custom},
  {override norm: custom}, {override hydra/sweeper: search}, {override hydra/sweeper/sampler: random}, _self_]
model: {width: 16, depth: 1}
trainer: {max_epochs: 1, limit_train_batches: 3}
data: {_target_: mine.Data, batch_size: 16}
norm: {_target_: mine.Norm}
hydra:
  mode: MULTIRUN
  sweeper:
    n_trials: 6
    params: {optimizer.lr: "tag(log,interval(1e-3,1e-1))", data.batch_size: "choice(16,32)"}
"""


@pytest.fixture
def ours(project: Path) -> Path:
    (project / "mine.py").write_text(MINE)
    (project / "sweeps").mkdir()
    (project / "sweeps" / "ours.yaml").write_text(SEARCH)
    acts(project)
    return project / "outputs" / "ours"


def acts(project: Path, *names: str) -> None:
    (project / "acts").write_text(" ".join(names))


def trials(directory: Path) -> list[Any]:
    """The trials of the only study in the directory."""
    import optuna

    storage = f"sqlite:///{directory}/study.db"
    (summary,) = optuna.get_all_study_summaries(storage)
    return optuna.load_study(study_name=summary.study_name, storage=storage).trials


def rates(directory: Path) -> dict[float, str]:
    """Learning rate and state of each job."""
    found = {}
    for path in sorted(directory.glob("*/config.yaml"), key=lambda path: path.stat().st_ctime):
        lr = yaml.safe_load(path.read_text())["optimizer"]["lr"]
        assert lr not in found
        found[lr] = read_status(path.parent)["state"]
    return found
