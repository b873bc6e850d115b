"""Jobs of several processes, on gloo: started from the job's config, ended together, nothing left."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from conftest import SMALL

from bnlight.run.ranks.processes import processes_of
from bnlight.run.status import read_status

RANKS = [*SMALL, "trainer=ddp", "trainer.accelerator=cpu"]
Command = Callable[..., subprocess.CompletedProcess[str]]

# A data module that tells who trains what, and a norm that fails on one rank.
MINE = """
import os, pathlib
from bnlight.data import Digits
from bnlight.norm import BatchNorm

class Data(Digits):
    def setup(self, stage):
        super().setup(stage)
        rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        pathlib.Path(f"seen-{os.getpid()}").write_text(f"{self.trainer.default_root_dir} {rank} {world}")

class Norm(BatchNorm):
    def __init__(self, channels, failing_rank=None):
        super().__init__(channels)
        self.failing_rank = failing_rank

    def forward(self, x, mask=None):
        if os.environ.get("RANK") == str(self.failing_rank):
            raise RuntimeError(f"as asked on rank {self.failing_rank}")
        return super().forward(x, mask)
"""


def jobs(project: Path) -> dict[str, dict[str, Any]]:
    return {
        path.parent.name: read_status(path.parent) for path in project.glob("outputs/train/*/status.json")
    }


def test_jobs_of_one_sweep_may_want_different_numbers_of_processes(project: Path, bnlight: Command) -> None:
    (project / "mine.py").write_text(MINE)
    custom = ["data=custom", "data._target_=mine.Data"]
    done = bnlight("train", "-m", *RANKS, *custom, "trainer.devices=2,1,2", "seed=5")
    assert done.returncode == 0, done.stderr
    worlds = {}
    for job in project.glob("outputs/train/*/result.json"):
        config = yaml.safe_load((job.parent / "config.yaml").read_text())
        result = json.loads(job.read_text())
        worlds[config["trainer"]["devices"]] = result["world_size"]
        assert result["metrics"]["test/accuracy"] > 0.3
    assert worlds == {2: 2, 1: 1}  # the third job equals the first: it was run once
    assert "done before, skipped" in done.stdout
    seen = sorted(tuple(path.read_text().split()) for path in project.glob("seen-*"))
    assert len(seen) == 3
    ranks = {(rank, world) for _, rank, world in seen}
    assert ranks == {("0", "2"), ("1", "2"), ("0", "1")}
    assert len({directory for directory, _, world in seen if world == "2"}) == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_a_failing_rank_fails_its_job_alone_and_soon(project: Path, bnlight: Command, rank: int) -> None:
    (project / "mine.py").write_text(MINE)
    custom = ["norm=custom", "norm._target_=mine.Norm", f"+norm.failing_rank={rank},7"]
    begun = time.monotonic()
    done = bnlight("train", "-m", *RANKS, *custom)
    assert done.returncode == 1
    assert time.monotonic() - begun < 90  # both jobs; the imports of five processes included
    states = {status["state"]: status for status in jobs(project).values()}
    assert states.keys() == {"failed", "done"}
    assert f"rank {rank} exited with 1" in states["failed"]["traceback"]
    assert f"RuntimeError: as asked on rank {rank}" in states["failed"]["traceback"]
    assert states["failed"]["error"] == f"rank {rank}: RuntimeError: as asked on rank {rank}"
    assert f"as asked on rank {rank}" in done.stdout
    assert "failed" in done.stdout
    left = [
        process
        for process in psutil.process_iter(["cmdline"])
        if str(project) in " ".join(process.info["cmdline"] or [])
    ]
    assert not left


def test_ranks_die_with_a_killed_parent(project: Path) -> None:
    command = [sys.executable, "-m", "bnlight", "train", *RANKS, "trainer.max_epochs=1000"]
    parent = subprocess.Popen(command, cwd=project, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not list(project.glob("outputs/train/*/metrics.csv")) and time.monotonic() < deadline:
            time.sleep(0.1)
        family = psutil.Process(parent.pid).children(recursive=True)
        assert len(family) >= 3  # the launcher and two ranks
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive
    (status,) = jobs(project).values()
    assert status["state"] == "interrupted"


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_stopping_a_job_stops_its_ranks_in_order(project: Path, stop: signal.Signals) -> None:
    command = [sys.executable, "-m", "bnlight", "train", *RANKS, "trainer.max_epochs=1000"]
    process = subprocess.Popen(
        command, cwd=project, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not list(project.glob("outputs/train/*/checkpoints/last.ckpt")) and time.monotonic() < deadline:
        time.sleep(0.1)
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(stop)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert "bnlight train" in errors
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive
    (status,) = jobs(project).values()
    assert status["state"] == ("interrupted" if stop == signal.SIGINT else "preempted")
    assert status["traceback"] is None
    assert status["stopped"].startswith("epoch ")


def test_a_sweep_inside_torchrun_is_refused_in_words(project: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "bnlight", "train", "-m", *RANKS, "trainer.devices=2", "seed=1,2"]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode != 0
    assert "A sweep starts the ranks of each of its jobs itself" in done.stderr
    assert not list(project.glob("**/status.json"))


def test_ranks_leave_no_scratch_folders(project: Path, bnlight: Command) -> None:
    (project / "tmp").mkdir()
    assert bnlight("train", *RANKS, TMPDIR=str(project / "tmp")).returncode == 0
    assert [
        path.name for path in (project / "tmp").iterdir() if "elastic" in path.name or "ranks" in path.name
    ] == []


def test_ranks_that_torchrun_has_started_are_used_as_they_are(project: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "bnlight", "train", *RANKS, "trainer.devices=2"]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    (result,) = project.glob("outputs/train/*/result.json")
    assert json.loads(result.read_text())["world_size"] == 2
    assert [status["state"] for status in jobs(project).values()] == ["done"]
    assert done.stdout.count("done in") == 1


@pytest.mark.parametrize(("devices", "processes"), [(1, 1), (2, 2), ("3", 3), ("auto", 1), (-1, 1)])
def test_the_number_of_processes_follows_devices(devices: Any, processes: int) -> None:
    assert processes_of({"devices": devices, "accelerator": "cpu"}) == processes


@pytest.mark.parametrize("devices", [0, "two", -3])
def test_a_wrong_number_of_devices_is_refused(devices: Any) -> None:
    with pytest.raises(ValueError, match="is not a number of devices"):
        processes_of({"devices": devices})
