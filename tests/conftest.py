"""Shared by the tests: a working directory of their own, and jobs small enough to run by the dozen."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Two tests run at a time on two cores: threads of one operation would only wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"

# A shell starts what it puts into the background with SIGINT ignored, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)  # a training to stop

# A job of a few steps on the embedded digits; its W&B run stays on this machine.
SMALL = ["model=mlp", "model.width=16", "model.depth=1", "trainer=cpu", "trainer.max_epochs=1", "logger=csv"]


@pytest.fixture(autouse=True)
def signals_as_before() -> Iterator[None]:
    """A test that leaves a handler of a signal behind fails itself, instead of the tests that come after it."""
    before = {signum: signal.getsignal(signum) for signum in ASKING}
    yield
    left = {
        signum.name: signal.getsignal(signum)
        for signum in ASKING
        if signal.getsignal(signum) is not before[signum]
    }
    for signum in ASKING:
        signal.signal(signum, before[signum])
    assert not left


@pytest.fixture(autouse=True)
def environment_as_before() -> Iterator[None]:
    """Lightning leaves MASTER_PORT behind, for instance, which every process that a later test starts would take."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, as a user's, that is the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in [name for name in os.environ if name.startswith(("WANDB_", "SLURM_", "BNLIGHT_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr("bnlight.run.sweep.current", None)
    monkeypatch.delitem(sys.modules, "mine", raising=False)  # the module of another test's user
    return tmp_path


@pytest.fixture
def start(project: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts the command in a session of its own and leaves it running; none outlives the test."""
    processes: list[subprocess.Popen[str]] = []

    def run(*arguments: str, **environment: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "bnlight", *arguments],
            cwd=project,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        processes.append(process)
        return process

    yield run
    for process in processes:
        process.kill()
        process.communicate()


def until(happened: Callable[[], object], seconds: float = 120) -> None:
    """Wait until something has happened; fails when it takes too long."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it has not happened"
        time.sleep(0.05)


@pytest.fixture
def bnlight(project: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """The command in a process of its own, run in the user's folder."""

    def run(*arguments: str, timeout: float = 180, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "bnlight", *arguments],
            cwd=project,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run
