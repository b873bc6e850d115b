"""A job has one W&B run, whoever starts its ranks and however often it is asked for."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SMALL
from slurm import cluster, slurm
from test_agent import agent, ask

from bnlight.cli import main
from bnlight.run.status import read_status
from bnlight.run.tracking.offline import find_runs

assert slurm  # fixtures
assert cluster
TRACKED = [argument for argument in SMALL if not argument.startswith("logger")]
FEW = "+trainer.limit_train_batches=3"
RANKS = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]


def check_one_run_each(project: Path, count: int) -> None:
    """Each job's run is its own, has one piece, and is closed as done; there are no others."""
    found = find_runs([project])
    jobs = {
        path.parent.name: read_status(path.parent) for path in project.glob("outputs/train/*/status.json")
    }
    assert len(found) == len(jobs) == count
    assert len({run.run_id for run in found}) == count
    for run in found:
        assert run.run_id == jobs[run.job]["wandb_id"]
        assert [piece.exit_code for piece in run.pieces] == [0]
    assert len(list(project.rglob("*.wandb"))) == count


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(
    "ways",
    ["srun", pytest.param("launcher", marks=pytest.mark.slow)],  # a task per rank, as srun starts them
)
def test_two_ranks_of_slurm_have_one_run(project: Path, ways: str) -> None:
    job = [*TRACKED, FEW, *RANKS]
    if ways == "srun":
        step = ["srun", "--ntasks=2", "--nodes=1", sys.executable, "-m", "bnlight", "train", *job]
        done = subprocess.run(step, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, done.stderr
        check_one_run_each(project, 1)
    else:
        task_per_rank = ["hydra.launcher.tasks_per_node=2", "hydra.launcher.cpus_per_task=1"]
        assert main(["train", "-m", *job, "seed=1,2", "hydra/launcher=slurm", *task_per_rank]) == 0
        check_one_run_each(project, 2)


@pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="no ray here: pip install ray")
def test_two_jobs_of_ray_have_a_run_each(project: Path) -> None:
    ray = ["hydra/launcher=ray_local", "hydra.launcher.init.num_cpus=2"]
    assert main(["train", "-m", *TRACKED, FEW, "seed=1,2", *ray]) == 0
    check_one_run_each(project, 2)


def test_a_finished_job_that_wandbs_agent_asks_for_again_begins_no_second_run(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["${env}", "${interpreter}", "-m", "bnlight", "train", "${args_no_hyphens}", *TRACKED, FEW]
    wandb_agent = agent(project, monkeypatch, command)
    wanted = {"norm": "group", "optimizer.lr": 0.01}
    assert ask(wandb_agent, "run1", wanted) == 0
    check_one_run_each(project, 1)
    files = sorted((project / "outputs").rglob("*"))
    assert ask(wandb_agent, "run2", wanted) == 0
    assert sorted((project / "outputs").rglob("*")) == files
    check_one_run_each(project, 1)
    assert [run.run_id for run in find_runs([project])] == ["run1"]
