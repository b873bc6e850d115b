"""Each optimizer with each schedule: what was chosen is what trains."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import SMALL

from bnlight.cli import main


def groups(directory: Path) -> list[dict[str, object]]:
    """The optimizer's groups at the end of a job's training."""
    checkpoint = torch.load(directory / "checkpoints" / "last.ckpt", weights_only=True)
    return list(checkpoint["optimizer_states"][0]["param_groups"])


def test_every_optimizer_trains_by_every_schedule(project: Path) -> None:
    every = ["optimizer=sgd,adam,adamw,rmsprop", "scheduler=none,cosine,linear,onecycle"]
    assert main(["train", "-m", *SMALL, *every]) == 0
    assert len([*project.glob("outputs/train/*/result.json")]) == 16


@pytest.mark.parametrize("optimizer", ["sgd", "rmsprop"])
def test_without_momentum_there_is_none_whatever_the_schedule(project: Path, optimizer: str) -> None:
    still = [f"optimizer={optimizer}", "optimizer.momentum=0", "scheduler=none,cosine,onecycle"]
    assert main(["train", "-m", *SMALL, *still]) == 0
    jobs = [path.parent for path in project.glob("outputs/train/*/result.json")]
    assert len(jobs) == 3
    for job in jobs:
        assert {group["momentum"] for group in groups(job)} == {0}
        assert {group.get("nesterov", False) for group in groups(job)} == {False}


def test_nesterov_momentum_is_the_default_and_can_be_left_out(project: Path) -> None:
    assert main(["train", "-m", *SMALL, "optimizer.nesterov=true,false"]) == 0
    assert main(["train", *SMALL]) == 0  # one of the two
    configs = [json.loads(path.read_text()) for path in project.glob("outputs/train/*/status.json")]
    assert len(configs) == 2
