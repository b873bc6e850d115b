"""Jobs that wait in SLURM's queue: seen from files, taken up by the same command, never given to SLURM twice."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import SMALL, until
from slurm import cluster, queue, slurm

from bnlight.cli import main
from bnlight.run.launch import submit
from bnlight.run.launch.submitted import FOLDER
from bnlight.run.status import read_status

assert slurm, cluster  # fixtures
pytestmark = pytest.mark.usefixtures("cluster")
Start = Callable[..., subprocess.Popen[str]]

# Data that note who trains, and wait for the file `go`.
MINE = """
import pathlib, time
from bnlight.data import Digits

class Data(Digits):
    def setup(self, stage):
        if stage == "fit":
            with open("trained", "a") as file:
                print(pathlib.Path(self.trainer.default_root_dir).name, file=file)
            while not pathlib.Path("go").exists():
                time.sleep(0.1)
        super().setup(stage)
"""
SWEEP = ["train", "-m", *SMALL, "+trainer.limit_train_batches=2", "data=custom", "data._target_=mine.Data",
         "hydra/launcher=slurm", "hydra.launcher.cpus_per_task=1", "hydra.launcher.array_parallelism=1"]  # fmt: skip


@pytest.fixture
def orphaned(project: Path, start: Start) -> Path:
    """A sweep of three jobs whose command was killed when the first of them had begun; the sweep's directory."""
    (project / "mine.py").write_text(MINE)
    command = start(*SWEEP, "seed=1,2,3")
    until((project / "trained").exists)
    command.kill()
    command.communicate()
    assert sorted(queue(project).values()) == ["PENDING", "PENDING", "RUNNING"]
    return project / "outputs" / "train"


def test_what_waits_is_shown_from_files_and_taken_up_by_the_same_command(
    orphaned: Path,
    project: Path,
    start: Start,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("PATH", "")  # SLURM is not asked
        assert main(["status", str(orphaned)]) == 0
        said = capsys.readouterr().out
        assert main(["status", str(orphaned), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["counts"] == {"running": 1, "submitted": 2}
    assert said.startswith("3 jobs: 1 running, 2 submitted\n")
    before = queue(project)
    for number in (name for name, state in before.items() if state == "PENDING"):
        assert f"  submitted to SLURM as job {number}\n" in said
    assert main([*SWEEP, "seed=1,2,3", "--dry-run"]) == 0
    assert "3 jobs: 1 runs elsewhere, 2 is waited for" in capsys.readouterr().out

    again = start(*SWEEP, "seed=1,2,3,4")
    until(lambda: len(queue(project)) > 3)
    assert len(queue(project).keys() - before.keys()) == 1
    (project / "go").touch()
    said, errors = again.communicate(timeout=120)
    assert again.returncode == 0, errors
    assert "3 jobs are in SLURM's queue already" in said
    assert "1 jobs given to SLURM" in said
    assert "4 jobs, 4 done" in said
    trained = (project / "trained").read_text().splitlines()
    assert len(trained) == len({*trained}) == 4
    assert {read_status(orphaned / job)["attempt"] for job in trained} == {1}
    assert not list((orphaned / FOLDER).iterdir())
    assert not queue(project)


def test_force_takes_waiting_jobs_back_and_ctrl_c_those_of_a_killed_command(
    orphaned: Path, project: Path, start: Start
) -> None:
    before = queue(project)
    again = start(*SWEEP, "seed=1,2,3", "--force")
    until(lambda: len(queue(project).keys() - before.keys()) == 2)
    assert [before[number] for number in queue(project) if number in before] == ["RUNNING"]
    again.send_signal(signal.SIGINT)
    said, _ = again.communicate(timeout=60)
    assert again.returncode == 130
    assert "Cancelling 3 SLURM jobs" in said
    until(lambda: not queue(project), 60)
    assert main(["status", str(orphaned)]) == 0
    assert not list((orphaned / FOLDER).iterdir())


def test_what_slurm_does_not_take_is_said_in_its_own_words(project: Path, start: Start) -> None:
    refused = start(*SWEEP, "seed=1,2", "hydra.launcher.partition=nowhere")
    _, errors = refused.communicate(timeout=120)
    assert refused.returncode == 2
    assert errors.startswith(
        "SLURM takes none of the 2 jobs: sbatch: error: invalid partition specified: nowhere"
    )
    assert "'partition': 'nowhere'" in errors
    assert "Traceback" not in errors
    assert not queue(project)


def test_without_slurm_the_launcher_says_where_to_go(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("PATH", "/nowhere")
        assert main([*SWEEP, "seed=1,2"]) == 2
    assert (
        "PATH has no sbatch, squeue, scancel, srun: run this where jobs are submitted"
        in capsys.readouterr().err
    )


def test_a_controller_that_is_silent_is_told_from_jobs_that_have_long_ended(
    orphaned: Path, project: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert submit.queue(["99999998"]) == {}
    assert submit.queue(["99999998", "99999999"]) == {}
    with monkeypatch.context() as deaf:
        config = re.sub(
            r"(?m)^SlurmctldPort=.*$", "SlurmctldPort=9", Path(os.environ["SLURM_CONF"]).read_text()
        )
        (project / "slurm.conf").write_text(config)
        deaf.setenv("SLURM_CONF", str(project / "slurm.conf"))
        again = start(*SWEEP, "seed=1,2,3")
        _, errors = again.communicate(timeout=120)
    assert again.returncode == 2
    assert "squeue does not answer, and 3 jobs were given to SLURM before" in errors
    assert sorted(queue(project).values()) == ["PENDING", "PENDING", "RUNNING"]
