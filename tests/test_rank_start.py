"""Ranks that somebody else has started meet without MASTER_ADDR, and refuse to train with different configs."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import SMALL
from slurm import cluster, slurm

from bnlight.run.status import write_json

assert slurm  # fixtures
assert cluster
Command = Callable[..., subprocess.CompletedProcess[str]]
BNLIGHT = [sys.executable, "-m", "bnlight"]
TWO = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "+trainer.limit_train_batches=3"]


def both(*of_each: str) -> list[tuple[int, str]]:
    """Start two ranks as a scheduler's own starter might, each with one more argument; their codes and output."""
    processes = []
    for rank, more in enumerate(of_each):
        place = {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}
        command = [*BNLIGHT, "train", *SMALL, *TWO, more]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MASTER_")}
        processes.append(
            subprocess.Popen(
                command, env=environment | place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    said = [process.communicate(timeout=200)[0] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


def test_ranks_find_each_other_where_killed_ones_have_left_their_notes(project: Path) -> None:
    for rank in (0, 1):
        stale = {"identity": "of another job", "go": True, "address": "127.0.0.1", "port": 1}
        write_json(project / "outputs" / "train" / ".ranks" / "-" / f"{rank}.json", stale)
    ended = both("seed=3", "seed=3")
    assert [code for code, _ in ended] == [0, 0], ended
    (result,) = project.glob("outputs/train/*/result.json")
    assert json.loads(result.read_text())["world_size"] == 2
    assert sum(text.count("done in") for _, text in ended) == 1


@pytest.mark.parametrize("devices", [1, 2])
def test_a_port_that_a_script_has_exported_is_none_of_a_process_started_alone(
    project: Path, bnlight: Command, devices: int
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        exported = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        done = bnlight("train", *SMALL, *TWO, f"trainer.devices={devices}", **exported)
    assert done.returncode == 0, done.stdout + done.stderr


def test_ranks_with_different_configs_name_both_values_and_train_nothing(project: Path) -> None:
    ended = both("optimizer.lr=0.01", "optimizer.lr=0.02")
    assert [code for code, _ in ended] == [2, 2], ended
    assert "rank 1 has another config than rank 0, so nothing was started" in ended[0][1]
    assert "optimizer.lr: rank 0 0.01, rank 1 0.02" in ended[0][1]
    assert not list(project.glob("**/status.json"))


@pytest.mark.usefixtures("cluster")
def test_tasks_of_srun_with_different_configs_do_so_too(project: Path) -> None:
    command = " ".join([*BNLIGHT, "train", *SMALL, *TWO, "optimizer.lr=0.0$((1 + SLURM_PROCID))"])
    step = ["srun", "--nodes=1", "--ntasks=2", "bash", "-c", command]
    done = subprocess.run(step, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("optimizer.lr: rank 0 0.01, rank 1 0.02") == 1
    assert not list(project.glob("**/status.json"))
