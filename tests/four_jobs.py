"""A sweep of four small jobs, with one and with two ranks, one of which fails: the same for every launcher."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from conftest import SMALL

from bnlight.cli import main
from bnlight.run.status import read_status

Command = Callable[..., subprocess.CompletedProcess[str]]

# The user's own modules: data that tell who trains what, and a norm that fails on the second of two ranks.
MINE = """
import os, pathlib, time
from bnlight.data import Digits
from bnlight.norm import BatchNorm

class Data(Digits):
    def setup(self, stage):
        super().setup(stage)
        if stage == "fit":
            rank, world = self.trainer.global_rank, self.trainer.world_size
            job = pathlib.Path(self.trainer.default_root_dir).name
            pathlib.Path(f"seen-{time.time_ns()}-{os.getpid()}").write_text(f"{job} {rank} {world}")

class Norm(BatchNorm):
    def __init__(self, channels, fails=False):
        super().__init__(channels)
        self.fails = fails

    def forward(self, x, mask=None):
        if self.fails and os.environ.get("RANK") == "1":
            raise RuntimeError("as asked on rank 1")
        return super().forward(x, mask)
"""
OWN = ["data=custom", "data._target_=mine.Data", "norm=custom", "norm._target_=mine.Norm"]
RANKS = ["trainer=ddp", "trainer.accelerator=cpu"]
FOUR = [*SMALL, *OWN, *RANKS, "logger=wandb", "trainer.devices=1,2", "+norm.fails=false,true"]


@pytest.fixture
def inside(project: Path, capfd: pytest.CaptureFixture[str]) -> Command:
    """The command as the fixture `bnlight` runs it, but in this process, which has imported torch already."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        capfd.readouterr()
        code = main(arguments)
        return subprocess.CompletedProcess(arguments, code, *capfd.readouterr())

    return run


def seen(project: Path) -> list[tuple[str, int, int]]:
    """Job, rank and world size of each process that has trained."""
    lines = [path.read_text().split() for path in sorted(project.glob("seen-*"))]
    return [(job, int(rank), int(world)) for job, rank, world in lines]


def jobs(project: Path) -> dict[tuple[int, bool], dict[str, Any]]:
    """What is on disk of each job, by its devices and whether it is to fail."""
    found = {}
    for path in project.glob("outputs/train/*/config.yaml"):
        config = yaml.safe_load(path.read_text())
        result = path.parent / "result.json"
        found[config["trainer"]["devices"], config["norm"]["fails"]] = {
            "status": read_status(path.parent),
            "result": json.loads(result.read_text()) if result.exists() else None,
            "runs": len(list(path.parent.glob("wandb/offline-run-*"))),
        }
    return found


def check_four_jobs(project: Path, command: Command, again: Command, *launcher: str) -> str:
    """Run the sweep with `command` and then with `again`; returns what the first time printed."""
    (project / "mine.py").write_text(MINE)
    first = command("train", "-m", *FOUR, *launcher)
    assert first.returncode == 1, first.stderr
    found = jobs(project)
    states = {key: job["status"]["state"] for key, job in found.items()}
    assert states == {(1, False): "done", (1, True): "done", (2, False): "done", (2, True): "failed"}, (
        first.stdout
    )
    assert "as asked on rank 1" in found[2, True]["status"]["error"]
    assert "as asked on rank 1" in first.stdout
    worlds = {key: job["result"]["world_size"] for key, job in found.items() if job["result"]}
    assert worlds == {(1, False): 1, (1, True): 1, (2, False): 2}
    assert [job["runs"] for job in found.values()] == [0 if "logger=csv" in launcher else 1] * 4
    assert len(seen(project)) == len(set(seen(project))) == 6  # each rank of each job once
    assert "4 jobs, 3 done, 1 failed" in first.stdout
    assert (project / "outputs" / "train" / "comparison.html").exists()
    for number in range(1, 5):
        assert f"[{number}/4" in first.stdout
    assert not [process for process in psutil.process_iter(["cmdline"]) if _is_of(project, process)]
    second = again("train", "-m", *FOUR, *launcher)
    assert second.returncode == 1
    assert second.stdout.count("done before, skipped") == 3
    assert "--retry-failed runs it again" in second.stdout
    assert len(seen(project)) == 6
    return first.stdout


def _is_of(project: Path, process: psutil.Process) -> bool:
    return str(project) in " ".join(process.info["cmdline"] or [])
