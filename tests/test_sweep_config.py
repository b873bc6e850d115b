"""What a sweep's jobs are composed from: the files as they were when it began, and each job's own overrides."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SMALL
from omegaconf import DictConfig

from bnlight.run.application import run_hydra

OWN = """
defaults: [train, {override hydra/sweeper: list}, {override optimizer: own}, _self_]
hydra:
  mode: MULTIRUN
  sweeper:
    jobs: ["optimizer.momentum=0.5 norm=group", "seed=1", "seed=2 optimizer=sgd"]
"""
RATE = "_target_: torch.optim.SGD\n_partial_: true\nlr: {}\nmomentum: 0.1\n"


@pytest.fixture
def files(project: Path) -> Path:
    """A sweep file, and an optimizer of one's own beside it."""
    folder = project / "sweeps"
    (folder / "optimizer").mkdir(parents=True)
    (folder / "own.yaml").write_text(OWN)
    (folder / "optimizer" / "own.yaml").write_text(RATE.format(0.25))
    return folder


def test_a_file_that_is_edited_during_a_sweep_changes_none_of_its_jobs(files: Path) -> None:
    seen: list[tuple[object, ...]] = []

    def job(config: DictConfig) -> None:
        (files / "optimizer" / "own.yaml").write_text(RATE.format(0.75))
        seen.append((config.seed, config.optimizer.lr, config.optimizer.momentum, config.norm._target_))

    run_hydra([], "own", files, task=job)
    default = "bnlight.norm.BatchNorm"
    assert seen[0] == (0, 0.25, 0.5, "bnlight.norm.GroupNorm")
    assert seen[1] == (1, 0.25, 0.1, default), "the first job's overrides are not the second's"
    assert seen[2] == (2, 0.1, 0.9, default)
    run_hydra([], "own", files, task=job)
    assert seen[4] == (1, 0.75, 0.1, default), "the next sweep reads the files anew"


def test_jobs_of_a_parallel_sweep_say_what_is_left(project: Path) -> None:
    command = [sys.executable, "-m", "bnlight", "train", "-m", *SMALL, "seed=0,1", "hydra/launcher=parallel"]
    done = subprocess.run([*command, "hydra.launcher.n_jobs=1"], capture_output=True, text=True, check=True)
    assert re.search(r"^\[1/2\] ", done.stdout, re.M)
    assert re.search(r"^\[2/2, .+ left\] ", done.stdout, re.M)
