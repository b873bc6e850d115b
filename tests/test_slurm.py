"""On a real SLURM with two virtual nodes: the `slurm` launcher, and `bnlight train` started in every way."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL
from four_jobs import MINE, OWN, RANKS, Command, check_four_jobs, inside, seen
from slurm import cluster, slurm

from bnlight.run.launch import submit
from bnlight.run.ranks.started import Started
from bnlight.run.status import read_status

assert slurm  # fixtures
assert cluster
assert inside
BNLIGHT = [sys.executable, "-m", "bnlight"]
LAUNCHER = ["hydra/launcher=slurm", "hydra.launcher.cpus_per_task=1"]


@pytest.fixture(autouse=True)
def mine(cluster: None, project: Path) -> None:
    (project / "mine.py").write_text(MINE)


def run(*command: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


def batch(project: Path, command: list[str], *options: str) -> tuple[int, str]:
    """The exit code and the output of a batch script; `sbatch --wait` would look every half a minute."""
    (project / "code").unlink(missing_ok=True)
    (project / "said").unlink(missing_ok=True)
    (project / "job.sh").write_text(f"#!/bin/bash\n{' '.join(command)}\necho $? > .code; mv .code code\n")
    submitted = run("sbatch", "--output=said", *options, "job.sh")
    assert submitted.returncode == 0, submitted.stderr
    wait_for((project / "code").exists)
    return int((project / "code").read_text()), (project / "said").read_text()


def wait_for(what: Callable[[], object], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.2)


def test_four_jobs_as_a_job_array(project: Path, inside: Command) -> None:
    printed = check_four_jobs(project, inside, inside, *LAUNCHER, "logger=csv")
    (array,) = re.findall(r"4 jobs given to SLURM \((\d+)\)", printed)
    assert {path.name for path in (project / "outputs/train/.submitit").glob(f"{array}_*")} == {
        f"{array}_{task}" for task in range(4)
    }


def test_one_task_per_rank_on_two_nodes_from_inside_an_allocation(project: Path) -> None:
    two = [
        "trainer.devices=1",
        "trainer.num_nodes=2",
        "hydra.launcher.nodes=2",
        "hydra.launcher.tasks_per_node=1",
    ]
    sweep = [*BNLIGHT, "train", "-m", *SMALL, *OWN, *RANKS, *two, "+norm.fails=false,true", *LAUNCHER]
    done = run(
        "salloc", "--quiet", "--ntasks=3", "--mem-per-cpu=10", *sweep
    )  # of a shape that the jobs cannot have
    assert done.returncode == 1, done.stderr
    assert "2 jobs, 1 done, 1 failed" in done.stdout
    assert sorted(place[1:] for place in seen(project)) == [(0, 2), (0, 2), (1, 2), (1, 2)]
    for path in project.glob("outputs/train/*/status.json"):
        status = read_status(path.parent)
        assert status["state"] in ("done", "failed")
        if status["state"] == "failed":
            assert status["error"] == "rank 1: RuntimeError: as asked on rank 1"
        else:
            assert json.loads((path.parent / "result.json").read_text())["world_size"] == 2


# How the command is started, with which options, and what becomes of a job of two ranks and of one rank: the world
# size it trains with, or what it says instead.
WRONG_2 = r"SLURM_STEP_NUM_TASKS=2, but trainer.devices=1 x trainer.num_nodes=1 wants 1: "
ROWS = [
    ("sbatch", [], ["--ntasks=1"], 2, 1),
    ("sbatch", [], ["--ntasks=2", "--ntasks-per-node=2"], 2, 1),
    ("sbatch", ["srun"], ["--ntasks=1"], 2, 1),
    ("sbatch", ["srun"], ["--ntasks=2"], 2, WRONG_2),
    ("sbatch", ["srun"], ["--nodes=1", "--ntasks-per-node=2"], 2, WRONG_2),
    ("salloc", [], ["--ntasks=2"], 2, 1),
    ("salloc", ["srun"], ["--ntasks=1", "--ntasks-per-node=1"], 2, 1),
    ("salloc", ["srun"], ["--ntasks=2"], 2, WRONG_2),
]
TRAINED = (3, 5)  # the others only as evidence
PROBE = """
import json, pathlib
from bnlight.run.ranks.started import WrongRanks, check_ranks, started

place, said = started(), []
for devices in (2, 1):
    try:
        check_ranks({"num_nodes": 1}, devices)
        said.append(place.world_size if place else devices)
    except WrongRanks as error:
        said.append(str(error))
pathlib.Path(f"place-{place.rank if place else 0}").write_text(json.dumps(said))
"""


def started_by(project: Path, start: str, step: list[str], options: list[str], command: list[str]) -> Any:
    """The exit code and the output of `command` started so."""
    if start == "sbatch":
        return batch(project, [*step, *command], *options)
    done = run("salloc", "--quiet", *options, *step, *command)
    return done.returncode, done.stdout + done.stderr


def test_a_process_knows_its_place_however_it_is_started(project: Path) -> None:
    (project / "probe.py").write_text(PROBE)
    for start, step, options, *wanted in ROWS:
        code, said = started_by(project, start, step, options, [sys.executable, "probe.py"])
        assert code == 0, said
        places = sorted(project.glob("place-*"))
        assert len(places) == (2 if WRONG_2 in wanted else 1), (start, step, options)
        for path in places:
            for found, expected in zip(json.loads(path.read_text()), wanted, strict=True):
                same = re.match(str(expected), str(found)) if isinstance(expected, str) else found == expected
                assert same, (start, step, options, found)
            path.unlink()


@pytest.mark.parametrize(
    ("start", "step", "options", "of_two", "of_one"),
    [row if i in TRAINED else pytest.param(*row, marks=pytest.mark.slow) for i, row in enumerate(ROWS)],
)
def test_however_it_is_started_it_trains_rightly_or_says_what_is_wrong(
    project: Path, start: str, step: list[str], options: list[str], of_two: int, of_one: int | str
) -> None:
    for devices, wanted in ((2, of_two), (1, of_one)):
        if devices == 1 and wanted == 1 and (step or "--ntasks=1" not in options):
            continue  # one process for one rank: as in the first row
        train = [
            *BNLIGHT,
            "train",
            *SMALL,
            *RANKS,
            "+trainer.limit_train_batches=3",
            f"trainer.devices={devices}",
        ]
        begun = time.monotonic()
        code, said = started_by(project, start, step, options, train)
        results = [json.loads(path.read_text()) for path in project.glob("outputs/train/*/result.json")]
        if isinstance(wanted, str):
            assert code == 2, said
            assert len(re.findall(wanted, said)) == 1
            assert time.monotonic() - begun < 30
        else:
            assert code == 0, said
            assert [result["world_size"] for result in results].count(wanted) == 1
            assert said.count("done in") == 1
    assert not list(project.glob("outputs/train/.ranks/*"))


def test_ranks_on_the_wrong_nodes_and_ranks_that_nobody_started_are_named(project: Path) -> None:
    train = [*BNLIGHT, "train", *SMALL, *RANKS]
    done = run("srun", "--nodes=2", "--ntasks=2", *train, "trainer.devices=2")
    assert done.returncode != 0
    assert (
        "SLURM_STEP_TASKS_PER_NODE=1(x2), but trainer.devices=2 x trainer.num_nodes=1 wants 2" in done.stderr
    )
    done = run("salloc", "--quiet", "--nodes=2", *train, "trainer.devices=1", "trainer.num_nodes=2")
    assert done.returncode == 2
    assert "wanted 2" in done.stderr
    assert "SLURM_STEP_NUM_TASKS=unset" in done.stderr
    assert "`srun --nodes=2 --ntasks-per-node=1`" in done.stderr
    assert not list(project.glob("**/status.json"))


def test_a_sweep_in_a_batch_script_runs_its_jobs_one_after_the_other(project: Path) -> None:
    sweep = [*BNLIGHT, "train", "-m", *SMALL, *RANKS, "+trainer.limit_train_batches=3", "trainer.devices=1,2"]
    code, said = batch(project, sweep, "--ntasks=2")
    assert code == 0, said
    assert "2 jobs, 2 done" in said
    results = [json.loads(path.read_text()) for path in project.glob("outputs/train/*/result.json")]
    assert sorted(result["world_size"] for result in results) == [1, 2]


def test_nodes_are_counted_as_slurm_writes_them() -> None:
    def nodes(text: str) -> list[int]:
        return Started("srun", "x", "", 1, 0, 0, text).nodes()

    assert nodes("2") == [2]
    assert nodes("2(x3),1") == [2, 2, 2, 1]
    assert nodes("") == []


def steps_by_attempt(job: Path) -> dict[int, list[int]]:
    with (job / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    found: dict[int, list[int]] = {}
    for row in rows:
        found.setdefault(int(row["attempt"]), []).append(int(row["step"]))
    return found


# At the end of its time SLURM sends USR2: the case `time` waits for that.
@pytest.mark.parametrize(
    "how", ["requeue", pytest.param("time", marks=pytest.mark.slow), "USR2 to two ranks"]
)
def test_a_job_that_slurm_takes_back_goes_on_where_it_was(project: Path, how: str) -> None:
    ranks = (
        ["trainer.devices=2", "hydra.launcher.tasks_per_node=2"] if "ranks" in how else ["trainer.devices=1"]
    )
    # 3 batches an epoch: the middle of one is where it will be caught. No fast machine may end the job before SLURM
    long = ["trainer.max_epochs=100000", "+trainer.limit_train_batches=3", "trainer.log_every_n_steps=1"]
    own = [*SMALL, *RANKS, *ranks, *long, "logger=wandb", "seed=1,2" if how == "requeue" else "seed=1"]
    limit = ["hydra.launcher.timeout_min=2", "hydra.launcher.signal_delay_s=30"] if how == "time" else []
    sweep = subprocess.Popen(
        [*BNLIGHT, "train", "-m", *own, *LAUNCHER, *limit],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        count = 2 if how == "requeue" else 1
        wait_for(lambda: len(list(project.glob("outputs/train/*/metrics.csv"))) == count)
        time.sleep(2)
        jobs = [path.parent for path in project.glob("outputs/train/*/metrics.csv")]
        ids = [read_status(job)["wandb_id"] for job in jobs]
        folders = [path.name for path in project.glob("outputs/train/.submitit/*") if path.is_dir()]
        (array,) = {name.split("_")[0] for name in folders}
        if how == "requeue":
            subprocess.run(["scontrol", "requeue", array], check=True)
        elif "USR2" in how:
            subprocess.run(["scancel", "--signal=USR2", array], check=True)

        def again() -> bool:
            statuses = [read_status(job) for job in jobs]
            assert not any(status["state"] in ("done", "failed") for status in statuses), statuses
            return all(status.get("attempt") == 2 for status in statuses)

        wait_for(again, 300)
        wait_for(lambda: all(2 in steps_by_attempt(job) for job in jobs))
        assert [read_status(job)["wandb_id"] for job in jobs] == ids
        for job in jobs:
            steps = steps_by_attempt(job)
            # not one step lost or trained twice
            assert 0 <= max(steps[1]) - min(steps[2]) + 1 <= 1, steps[2][:3]
            wandb_id = read_status(job)["wandb_id"]
            assert all(run.name.endswith(wandb_id) for run in job.glob("wandb/offline-run-*"))
        assert sweep.poll() is None  # and the launching process waits for them
        sweep.send_signal(signal.SIGINT)
        output, errors = sweep.communicate(timeout=90)
        assert sweep.returncode == 130, errors
        assert "Cancelling" in output
        wait_for(lambda: {read_status(job)["state"] for job in jobs} <= {"preempted", "interrupted"}, 60)
    finally:
        sweep.kill()
        sweep.communicate()


def test_a_job_that_slurm_kills_is_failed_and_one_that_waits_is_not(
    project: Path, inside: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submit, "SECONDS_BETWEEN_QUEUE_LOOKS", 1)
    monkeypatch.setattr(submit, "SECONDS_FOR_FILES", 2)  # much less than the second job waits for the first
    (project / "mine.py").write_text(
        "import os\nfrom bnlight.data import Digits\n\nclass Data(Digits):\n    def setup(self, stage):\n"
        "        os.kill(os.getpid(), 9)\n"
    )
    own = [*SMALL, "data=custom", "data._target_=mine.Data", "seed=1,2", "hydra.launcher.array_parallelism=1"]
    done = inside("train", "-m", *own, *LAUNCHER)
    assert done.returncode == 1, done.stderr
    assert done.stdout.count("failed: SLURM job ") == 2
    errors = [read_status(path.parent)["error"] for path in project.glob("outputs/train/*/status.json")]
    assert all(re.search(r"SLURM job \d+_\d ended: FAILED.*log.err", error) for error in errors)
    assert os.environ["SLURM_CONF"]
