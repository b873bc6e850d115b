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
import torch
from conftest import SMALL, until

from bnlight.cli import main
from bnlight.run.ranks.processes import ended_how
from bnlight.run.status import read_status

Command = Callable[..., subprocess.CompletedProcess[str]]
Start = Callable[..., subprocess.Popen[str]]

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
                open("hangs", "w").close()
                time.sleep(1000)
            if self.act == "fork" and os.fork() == 0:
                raise RuntimeError("in the child")
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


def test_each_job_that_ends_its_worker_fails_alone_and_once(ours: Path, bnlight: Command) -> None:
    acts = "+norm.act=SIGKILL,fork,leave,hang,exit,nothing"
    done = bnlight("train", "-m", *CUSTOM, acts, "stall_limit=3s")
    assert done.returncode == 1, done.stderr
    found = statuses(ours)
    assert {act: status["error"] for act, status in found.items()} == {
        "SIGKILL": "the process was killed by SIGKILL: probably out of memory",
        "fork": None,  # the child does not go on with the sweep
        "leave": "the process left with exit code 0",
        "hang": "rank 0 has done no step for stall_limit=3s (after step 2)",
        "exit": "SystemExit: 3",
        "nothing": None,
    }
    assert "SIGKILL" in found["SIGKILL"]["log"].read_text()
    stacks = found["hang"]["log"].read_text()
    assert "mine.py" in stacks
    assert "in forward" in stacks
    assert "RuntimeError: in the child" in done.stderr
    assert all(status["attempt"] == 1 for status in found.values())
    assert done.stdout.count("A new worker takes the rest") == 3
    assert "done before, skipped" not in done.stdout  # nothing is told twice
    assert "6 jobs, 2 done, 4 failed" in done.stdout

    again = bnlight("train", "-m", *CUSTOM, "+norm.act=nothing,SIGKILL,exit", "--retry-failed", "--fail-fast")
    assert again.returncode == 1
    attempts = {act: status["attempt"] for act, status in statuses(ours).items()}
    assert attempts["SIGKILL"] == 2
    assert attempts["nothing"] == attempts["exit"] == 1  # the first failure has ended the sweep


def test_endings_in_words() -> None:
    assert ended_how(3) == "left with exit code 3"
    assert ended_how(-signal.SIGKILL) == "was killed by SIGKILL: probably out of memory"
    assert ended_how(-signal.SIGSEGV) == "was killed by SIGSEGV: a crash in native code"
    assert ended_how(-signal.SIGTERM) == "was killed by SIGTERM"


def test_ranks_that_are_killed_or_hang_in_a_collective_fail_their_job(
    ours: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ranks = ["trainer=ddp", "trainer.accelerator=cpu", "+norm.on_rank=1", "stall_limit=8s"]
    assert main(["train", "-m", *CUSTOM, *ranks, "+norm.act=SIGKILL,hang"]) == 1
    found = statuses(ours)
    assert {act: status["state"] for act, status in found.items()} == {"SIGKILL": "failed", "hang": "failed"}
    assert found["SIGKILL"]["error"] == "rank 1: was killed by SIGKILL: probably out of memory"
    assert "has done no step for stall_limit=8s" in found["hang"]["error"]
    log = found["hang"]["log"].read_text()
    assert "rank 0: rank 0 has done no step" in log
    assert "rank 1: rank 1 has done no step" in log
    assert 'mine.py"' in log


def test_a_job_over_its_time_limit_has_failed_and_a_retry_has_the_time_again(
    ours: Path, bnlight: Command
) -> None:
    long = [*CUSTOM, "trainer.max_epochs=100000", "time_limit=5s", "checkpoint_every=5"]
    assert bnlight("train", *long).returncode == 75  # its own watchdog's, as nobody supervises one job
    (status,) = statuses(ours).values()
    assert status["state"] == "failed"
    assert status["error"].startswith("time_limit=5s is used up (")
    (file,) = ours.glob("outputs/train/*/checkpoints/last.ckpt")
    first = torch.load(file, weights_only=True)["global_step"]
    assert bnlight("train", *long, "--retry-failed").returncode == 75
    (again,) = statuses(ours).values()
    assert again["attempt"] == 2
    assert torch.load(file, weights_only=True)["global_step"] > first > 0  # it went on from its checkpoint


def test_time_in_which_the_process_is_suspended_counts_for_no_limit(ours: Path, start: Start) -> None:
    process = start("train", *CUSTOM, "trainer.max_epochs=100000", "stall_limit=4s")
    until(lambda: list(ours.glob("outputs/train/*/checkpoints/last.ckpt")))
    process.send_signal(signal.SIGSTOP)
    time.sleep(5)
    process.send_signal(signal.SIGCONT)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 130
    (status,) = statuses(ours).values()
    assert status["state"] == "preempted"


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


def test_fail_fast_ends_the_sweep_with_the_first_failure(
    ours: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "-m", *CUSTOM, "+norm.act=exit,nothing", "--fail-fast"]) == 1
    assert statuses(ours).keys() == {"exit"}
    assert "1 failed" in capsys.readouterr().out  # the comparison is printed all the same


def test_a_worker_that_dies_between_two_jobs_is_replaced(ours: Path, bnlight: Command) -> None:
    (ours / "mine.py").write_text(
        MINE + "from pathlib import Path\n"
        "if Path('first').exists():\n"
        "    Path('first').unlink()\n"
        "    import bnlight.run.job as job\n"
        "    def leave(*_): os.kill(os.getpid(), signal.SIGKILL)\n"
        "    job.scores = leave\n"  # called when the job is done and recorded
    )
    (ours / "first").touch()
    done = bnlight("train", "-m", *CUSTOM, "seed=0,1")
    assert done.returncode == 0, done.stderr
    assert (
        "The sweep's worker was killed by SIGKILL: probably out of memory, outside of any job." in done.stderr
    )
    assert done.stdout.count("A new worker takes the rest") == 1
    assert "2 jobs, 2 done" in done.stdout


def test_a_signal_stops_the_sweep_at_a_step(ours: Path, start: Start) -> None:
    process = start("train", "-m", *CUSTOM, "trainer.max_epochs=3000", "seed=0,1", "--force")
    until(lambda: list(ours.glob("outputs/train/*/checkpoints/last.ckpt")))
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert errors.count("Without --force, which starts all again, it goes on where it stopped:\n") == 1
    assert "--force" not in errors.splitlines()[-1]
    (status,) = statuses(ours).values()
    assert status["state"] == "preempted"
    assert f"preempted at {status['stopped']}" in output
    assert status["stopped"].startswith("epoch ")
    assert status["seconds"] > 0
    assert "A new worker" not in output


@pytest.mark.parametrize(("name", "state"), [("SIGINT", "interrupted"), ("SIGTERM", "preempted")])
def test_a_signal_during_the_test_of_a_job_stops_it_and_is_not_its_failure(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, state: str
) -> None:
    (project / "mine.py").write_text(
        "import os, signal\nfrom bnlight.data import Digits\n"
        "class Data(Digits):\n"
        "    def test_dataloader(self):\n"
        "        if os.environ.pop('SIGNAL', None):\n"
        f"            os.kill(os.getpid(), signal.{name})\n"
        "        return super().test_dataloader()\n"
    )
    command = ["train", *SMALL, "data=custom", "data._target_=mine.Data", "progress=off"]
    monkeypatch.setenv("SIGNAL", "1")
    assert main(command) == 130
    assert f": {state}\n" in capsys.readouterr().out
    monkeypatch.delenv("SIGNAL", raising=False)
    assert main(command) == 0
    assert f"{state} before, continued" in capsys.readouterr().out


def test_ctrl_c_of_a_terminal_reaches_the_worker_once(ours: Path) -> None:
    process, leader = _in_a_terminal(ours)
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


def test_a_terminal_that_is_closed_stops_the_sweep_at_a_step(ours: Path) -> None:
    process, leader = _in_a_terminal(ours)
    os.close(leader)
    assert process.wait(60) == 130
    (status,) = statuses(ours).values()  # the second job was not begun
    assert status["state"] == "preempted"
    assert status["stopped"].startswith("epoch ")


def _in_a_terminal(project: Path) -> tuple[subprocess.Popen[bytes], int]:
    """A sweep with a terminal of its own, whose other end is the number returned, once its first job trains."""
    import pty

    leader, follower = pty.openpty()
    arguments = ["train", "-m", *CUSTOM, "trainer.max_epochs=3000", "seed=0,1"]
    command = [sys.executable, "-m", "bnlight", *arguments]
    code = f"import fcntl, os, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv({command[0]!r}, {command!r})"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=project,
        stdin=follower,
        stdout=follower,
        stderr=follower,
        start_new_session=True,
    )
    os.close(follower)
    until(lambda: list(project.glob("outputs/train/*/checkpoints/last.ckpt")))
    return process, leader


def test_a_second_ctrl_c_kills_a_worker_that_does_not_stop(ours: Path, start: Start) -> None:
    process = start("train", "-m", *CUSTOM, "+norm.act=hang")
    until((ours / "hangs").exists)
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "The same command goes on" in errors
    (status,) = statuses(ours).values()
    assert status["state"] == "interrupted"


def test_the_supervisor_is_small_and_nothing_outlives_it(ours: Path, start: Start) -> None:
    two = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.max_epochs=3000"]
    process = start("train", "-m", *CUSTOM, *two)
    until(lambda: list(ours.glob("outputs/train/*/checkpoints/last.ckpt")))
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
