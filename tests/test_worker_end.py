"""What stops, suspends or ignores a sweep from outside: SIGSTOP, a second Ctrl-C, a reader that goes away."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from conftest import SMALL, until
from test_supervisor import CUSTOM, MINE, statuses

from bnlight.run.status import read_status

Start = Callable[..., subprocess.Popen[str]]
RANKS = ["trainer=ddp", "trainer.accelerator=cpu", "+norm.on_rank=1"]


@pytest.fixture
def ours(project: Path) -> Path:
    (project / "mine.py").write_text(MINE)
    return project


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ([], r"was stopped (SIGSTOP) for stall_limit=8s"),
        pytest.param(RANKS, "rank 0 has done no step for stall_limit=8s", marks=pytest.mark.slow),
        pytest.param(
            ["hydra/launcher=parallel", "hydra.launcher.n_jobs=2"],
            r"was stopped (SIGSTOP) for stall_limit=8s",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["worker", "rank", "a process of hydra/launcher=parallel"],
)
def test_a_suspended_process_fails_its_job_and_the_sweep_goes_on(
    ours: Path, start: Start, more: list[str], said: str
) -> None:
    process = start("train", "-m", *CUSTOM, *more, "stall_limit=8s", "+norm.act=SIGSTOP,nothing")
    family = psutil.Process(process.pid)
    output, errors = process.communicate(timeout=150)
    assert process.returncode == 1, errors
    assert not family.is_running()
    found = statuses(ours)
    assert {act: status["state"] for act, status in found.items()} == {"SIGSTOP": "failed", "nothing": "done"}
    assert said in found["SIGSTOP"]["error"]
    assert "2 jobs, 1 done, 1 failed" in output
    left = [one for one in psutil.process_iter(["cwd"]) if one.info["cwd"] == str(ours)]
    assert [one.pid for one in left] == [os.getpid()]


def test_a_second_ctrl_c_ends_suspended_ranks_at_once(ours: Path, start: Start) -> None:
    process = start("train", "-m", *CUSTOM, *RANKS, "+norm.act=SIGSTOP")
    supervisor = psutil.Process(process.pid)
    until(lambda: "stopped" in {one.status() for one in supervisor.children(recursive=True)})
    family = supervisor.children(recursive=True)
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=10)
    assert process.returncode == 130
    assert "The same command goes on" in errors
    assert not psutil.wait_procs(family, timeout=10)[1]
    (status,) = statuses(ours).values()
    assert status["state"] == "interrupted"


def test_a_supervisor_that_is_stopped_for_a_while_goes_on(ours: Path, start: Start) -> None:
    process = start("train", "-m", *CUSTOM, "trainer.max_epochs=20", "checkpoint_every=20")
    until(lambda: list(ours.glob("outputs/train/*/checkpoints/last.ckpt")))
    process.send_signal(signal.SIGSTOP)
    time.sleep(2)  # longer than it waits for a signal
    process.send_signal(signal.SIGCONT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors


@pytest.mark.parametrize(
    "more",
    [
        [],
        pytest.param(["hydra/launcher=parallel", "hydra.launcher.n_jobs=2"], marks=pytest.mark.slow),
        pytest.param(["trainer=ddp", "trainer.accelerator=cpu"], marks=pytest.mark.slow),
    ],
    ids=["serial", "parallel", "ranks"],
)
def test_a_reader_that_goes_away_costs_no_job(project: Path, more: list[str]) -> None:
    sweep = ["train", "-m", *SMALL, *more, "seed=0,1", "progress=plain", "trainer.log_every_n_steps=1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "bnlight", *sweep], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline()  # as `head -1` does
    process.stdout.close()
    assert process.wait(120) == 0
    assert [read_status(path.parent)["state"] for path in project.glob("outputs/train/*/status.json")] == [
        "done",
        "done",
    ]
    assert (project / "outputs" / "train" / "comparison.html").exists()


@pytest.mark.parametrize(
    ("redirection", "environment"),
    [
        ("<&- >&- 2>&-", {}),
        ("> /dev/full 2>&1", {}),
        ("> said 2>&1", {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}),
    ],
    ids=["closed", "a full disk", "ascii"],
)
def test_output_that_cannot_be_written_costs_no_job(
    project: Path, redirection: str, environment: dict[str, str]
) -> None:
    sweep = shlex.join([sys.executable, "-m", "bnlight", "train", "-m", *SMALL, "progress=plain"])
    done = subprocess.run(f"{sweep} {redirection}", shell=True, env=os.environ | environment, check=False)
    assert done.returncode == 0
    (job,) = project.glob("outputs/train/*/status.json")
    assert read_status(job.parent)["state"] == "done"
    assert (project / "outputs" / "train" / "comparison.html").exists()
    if redirection.startswith("> said"):
        said = (project / "said").read_text()
        assert "1 job, 1 done" in said
        assert "could not be made" not in said
