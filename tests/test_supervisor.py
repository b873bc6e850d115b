"""A sweep outlives its worker: crashes, kills, hangs and limits cost one job each; signals stop it in order."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import SMALL

from bnlight.cli import main
from bnlight.run.status import read_status

Command = Callable[..., subprocess.CompletedProcess[str]]

# A norm that does something to its process, in the training's third step.
MINE = """
import os, signal, time
from bnlight.norm import BatchNorm

class Norm(BatchNorm):
    def __init__(self, channels, act="nothing", on_rank=None):
        super().__init__(channels)
        self.act, self.on_rank, self.steps = act, on_rank, 0

    def forward(self, x, mask=None):
        self.steps += self.training
        if self.steps == 3 and self.on_rank in (None, int(os.environ.get("RANK", 0))):
            if self.act == "leave":
                os._exit(0)
            if self.act == "exit":
                raise SystemExit(3)
            if self.act == "hang":
                time.sleep(1000)
            if self.act.startswith("SIG"):
                os.kill(os.getpid(), getattr(signal, self.act))
        return super().forward(x, mask)
"""
CUSTOM = [*SMALL, "norm=custom", "norm._target_=mine.Norm", "progress=off"]


@pytest.fixture
def ours(project: Path) -> Path:
    (project / "mine.py").write_text(MINE)
    return project


def statuses(project: Path) -> dict[str, dict[str, Any]]:
    """Each job's status by what its norm does."""
    import yaml

    found = {}
    for path in project.glob("outputs/train/*/status.json"):
        act = yaml.safe_load((path.parent / "config.yaml").read_text())["norm"].get("act", "nothing")
        found[act] = read_status(path.parent) | {"log": path.parent / "job.log"}
    return found


def test_a_job_that_kills_its_worker_fails_alone_and_once(ours: Path, bnlight: Command) -> None:
    acts = "+norm.act=SIGKILL,nothing,SIGSEGV,leave,exit"
    done = bnlight("train", "-m", *CUSTOM, acts)
    assert done.returncode == 1, done.stderr
    found = statuses(ours)
    assert {act: status["state"] for act, status in found.items()} == {
        "SIGKILL": "failed", "nothing": "done", "SIGSEGV": "failed", "leave": "failed", "exit": "failed",
    }  # fmt: skip
    assert found["SIGKILL"]["error"] == "the process was killed by SIGKILL: probably out of memory"
    assert found["SIGSEGV"]["error"] == "the process was killed by SIGSEGV: a crash in native code"
    assert found["leave"]["error"] == "the process left with exit code 0"
    assert found["exit"]["error"] == "SystemExit: 3"
    assert "SIGKILL" in found["SIGKILL"]["log"].read_text()
    assert all(status["attempt"] == 1 for status in found.values())
    assert done.stdout.count("A new worker takes the rest") == 3
    assert "done before, skipped" not in done.stdout  # nothing is told twice
    assert "5 jobs, 1 done, 4 failed" in done.stdout

    again = bnlight("train", "-m", *CUSTOM, acts.replace(",leave,exit", ""), "--retry-failed")
    assert again.returncode == 1
    assert {act: status["attempt"] for act, status in statuses(ours).items()} == {
        "SIGKILL": 2, "nothing": 1, "SIGSEGV": 2, "leave": 1, "exit": 1,
    }  # fmt: skip


def test_a_killed_rank_fails_its_job_in_words(ours: Path, bnlight: Command) -> None:
    ranks = ["trainer=ddp", "trainer.accelerator=cpu", "+norm.on_rank=1"]
    done = bnlight("train", "-m", *CUSTOM, *ranks, "+norm.act=SIGKILL,nothing")
    assert done.returncode == 1
    found = statuses(ours)
    assert {act: status["state"] for act, status in found.items()} == {"SIGKILL": "failed", "nothing": "done"}
    assert found["SIGKILL"]["error"] == "rank 1: was killed by SIGKILL: probably out of memory"


def test_a_hanging_job_is_ended_with_its_stacks_and_the_rest_goes_on(ours: Path, bnlight: Command) -> None:
    begun = time.monotonic()
    done = bnlight("train", "-m", *CUSTOM, "+norm.act=hang,nothing", "stall_limit=3s")
    assert time.monotonic() - begun < 90
    assert done.returncode == 1
    found = statuses(ours)
    assert found["nothing"]["state"] == "done"
    assert found["hang"]["state"] == "failed"
    assert found["hang"]["error"] == "rank 0 has done no step for stall_limit=3s (after step 2)"
    log = found["hang"]["log"].read_text()
    assert "mine.py" in log
    assert "in forward" in log
    assert "stall_limit=3s" in done.stdout


def test_a_rank_that_hangs_in_a_collective_ends_its_job_with_the_stacks_of_all(
    ours: Path, bnlight: Command
) -> None:
    ranks = ["trainer=ddp", "trainer.accelerator=cpu", "+norm.on_rank=1", "stall_limit=8s"]
    done = bnlight("train", "-m", *CUSTOM, *ranks, "+norm.act=hang", timeout=150)
    assert done.returncode == 1
    (status,) = statuses(ours).values()
    assert status["state"] == "failed"
    assert "has done no step for stall_limit=8s" in status["error"]
    log = status["log"].read_text()
    assert "rank 0: rank 0 has done no step" in log
    assert "rank 1: rank 1 has done no step" in log
    assert 'mine.py"' in log


def test_a_job_over_its_time_limit_has_failed_and_a_retry_has_the_time_again(
    ours: Path, bnlight: Command
) -> None:
    long = [*CUSTOM, "trainer.max_epochs=100000", "time_limit=4s", "checkpoint_every=20"]
    assert bnlight("train", "-m", *long).returncode == 1
    (status,) = statuses(ours).values()
    assert status["state"] == "failed"
    assert status["error"].startswith("time_limit=4s is used up (")
    assert bnlight("train", "-m", *long, "--retry-failed").returncode == 1
    (again,) = statuses(ours).values()
    assert again["attempt"] == 2
    assert again["step"] > status["step"]  # it went on from its checkpoint


@pytest.mark.parametrize(
    "limit", ["time_limit=soon", "stall_limit=-3s", "time_limit=true", "time_limit=2 days"]
)
def test_a_limit_that_is_no_duration_is_refused(
    project: Path, capsys: pytest.CaptureFixture[str], limit: str
) -> None:
    assert main(["train", *SMALL, limit]) == 2
    assert "is not a duration: write 90, 90s, 30min, 2h, 1d or null" in capsys.readouterr().err
    assert not list(project.glob("**/status.json"))


def test_limits_are_no_part_of_a_jobs_identity(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *SMALL]) == 0
    limits = ["time_limit=2h", "stall_limit=null", "checkpoint_every=5", "fail_fast=true"]
    assert main(["train", *SMALL, *limits]) == 0
    assert "done before, skipped" in capsys.readouterr().out


def test_fail_fast_ends_the_sweep_with_the_first_failure(ours: Path, bnlight: Command) -> None:
    done = bnlight("train", "-m", *CUSTOM, "+norm.act=exit,nothing", "--fail-fast")
    assert done.returncode == 1
    assert statuses(ours).keys() == {"exit"}
    done = bnlight("train", "-m", *CUSTOM, "+norm.act=SIGKILL,nothing", "fail_fast=true")
    assert done.returncode == 1
    assert statuses(ours).keys() == {"exit", "SIGKILL"}
    assert "1 failed" in done.stdout  # the comparison is printed all the same


def _running(project: Path, *arguments: str) -> subprocess.Popen[str]:
    """A sweep in a session of its own, returned once its first job has a checkpoint."""
    command = [sys.executable, "-m", "bnlight", "train", "-m", *CUSTOM, "trainer.max_epochs=3000", *arguments]
    process = subprocess.Popen(
        command,
        cwd=project,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not list(project.glob("outputs/train/*/checkpoints/last.ckpt")) and time.monotonic() < deadline:
        time.sleep(0.05)
    return process


@pytest.mark.parametrize(("stop", "state"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "preempted")])
def test_the_first_signal_stops_the_sweep_at_a_step(ours: Path, stop: signal.Signals, state: str) -> None:
    process = _running(ours, "seed=0,1")
    process.send_signal(stop)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert errors.count("The same command goes on where it stopped:\n  bnlight train -m ") == 1
    (status,) = statuses(ours).values()
    assert status["state"] == state
    assert f"{state} at {status['stopped']}" in output
    assert status["stopped"].startswith("epoch ")
    assert status["seconds"] > 0
    assert "A new worker" not in output


def test_ctrl_c_of_a_terminal_reaches_the_worker_once(ours: Path) -> None:
    import pty

    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "bnlight", "train", "-m", *CUSTOM, "trainer.max_epochs=3000", "seed=0,1"]
    code = f"import fcntl, os, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv({command[0]!r}, {command!r})"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ours,
        stdin=follower,
        stdout=follower,
        stderr=follower,
        start_new_session=True,
    )
    os.close(follower)
    deadline = time.monotonic() + 120
    while not list(ours.glob("outputs/train/*/checkpoints/last.ckpt")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.write(leader, b"\x03")
    output = b""
    try:
        while part := os.read(leader, 4096):
            output += part
    except OSError:  # the terminal is closed by its last user
        pass
    assert process.wait(60) == 130
    os.close(leader)
    assert b"Stopping after this step; Ctrl-C again stops at once." in output
    assert b"interrupted at epoch " in output
    assert output.count(b"The same command goes on where it stopped") == 1
    assert b"Traceback" not in output


def test_a_second_ctrl_c_kills_a_worker_that_does_not_stop(ours: Path) -> None:
    command = [sys.executable, "-m", "bnlight", "train", "-m", *CUSTOM, "+norm.act=hang"]
    process = subprocess.Popen(
        command, cwd=ours, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not list(ours.glob("outputs/train/*/job.log")) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(4)  # the model is in its third step
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "The same command goes on" in errors
    (status,) = statuses(ours).values()
    assert status["state"] == "interrupted"


def test_the_supervisor_is_small_and_nothing_outlives_it(ours: Path) -> None:
    process = _running(ours, "trainer=ddp", "trainer.accelerator=cpu")
    supervisor = psutil.Process(process.pid)
    family = supervisor.children(recursive=True)
    assert len(family) >= 4  # worker, launcher, two ranks
    assert supervisor.memory_info().rss < 30 * 2**20
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive
    (status,) = statuses(ours).values()
    assert status["state"] == "interrupted"


def test_a_dry_run_tells_each_jobs_state_and_touches_nothing(
    ours: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    acts = "+norm.act=exit,nothing"
    assert main(["train", "-m", *CUSTOM, acts]) == 1
    capsys.readouterr()
    before = {path: path.stat().st_mtime_ns for path in ours.rglob("*") if "multirun.yaml" not in path.name}
    slurm = ["hydra/launcher=slurm", "hydra.launcher.timeout_min=3"]  # nothing is submitted either
    assert main(["train", "-m", *CUSTOM, acts, "seed=0,1", "--dry-run", *slurm]) == 0
    output = capsys.readouterr().out
    assert "failed, is left (--retry-failed runs it: SystemExit: 3)" in output
    assert "done, is skipped" in output
    assert output.count("new, runs") == 2
    assert "4 jobs: 1 is left, 2 runs, 1 is skipped" in output
    after = {path: path.stat().st_mtime_ns for path in ours.rglob("*") if "multirun.yaml" not in path.name}
    assert before.keys() == after.keys()
    assert {path for path in before if path.is_file() and before[path] != after[path]} == set()
    assert main(["train", "-m", *CUSTOM, acts, "--dry-run", "--retry-failed"]) == 0
    assert "failed, runs again" in capsys.readouterr().out
