"""How many processes a job needs, who starts them, and that none outlives its parent."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bnlight.lightning.stop import ASKING, Stopped, foreign
from bnlight.run.ranks.devices import WrongDevices as WrongDevices
from bnlight.run.ranks.devices import devices_of
from bnlight.run.ranks.started import started
from bnlight.run.status import read_json
from bnlight.run.survive.command import STOPPED_BY_SIGNAL

PR_SET_PDEATHSIG = 1  # linux/prctl.h
PARENT = "BNLIGHT_PARENT_PID"
SECONDS_TO_STOP = 45.0  # torch's launcher gives its ranks 30 s between SIGTERM and SIGKILL


class RankFailed(RuntimeError):
    """A rank of a job with several processes failed; the text is that rank's traceback, `what` its error."""

    def __init__(self, traceback: str, what: str | None = None) -> None:
        super().__init__(traceback)
        self.what = what or traceback


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies, however it dies (Linux; elsewhere: nothing).

    The parent has left its process id in the environment (`parenthood`), in case it died before this call.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(os.environ[PARENT]):
            os.kill(os.getpid(), signal.SIGKILL)


def parenthood() -> dict[str, str]:
    """What this process adds to the environment of a child that is to die with it."""
    return {PARENT: str(os.getpid())}


def already_started() -> bool:
    """Whether somebody else (torchrun, srun) has started the ranks, and this process is one of them."""
    return started() is not None


def this_rank() -> int:
    """The global rank of this process among ranks that somebody else has started; 0 if it was started alone."""
    place = started()
    return place.rank if place else 0


def processes_of(trainer: Mapping[str, Any]) -> int:
    """How many processes the trainer's config wants on this machine."""
    devices = devices_of(trainer)
    return devices if isinstance(devices, int) else len(devices)


def launch(directory: Path, processes: int, label: str, environment: Mapping[str, str] | None = None) -> None:
    """Start the job's ranks from its `config.yaml` with torch's elastic launcher, and wait for them.

    `environment` is added to theirs.

    Raises RankFailed, with the traceback of the rank that failed first.
    """
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    # In a session of its own, so that Ctrl-C reaches the ranks once: from here.
    agent = subprocess.Popen(
        [sys.executable, "-m", "bnlight.run.ranks.elastic", str(directory), str(processes), label],
        env=os.environ | parenthood() | {"OMP_NUM_THREADS": threads} | dict(environment or {}),
        start_new_session=True,
    )
    try:
        with stops():
            code = agent.wait()
    except BaseException as stop:
        try:
            agent.send_signal(signal.SIGINT)
            agent.wait(SECONDS_TO_STOP)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            agent.kill()
            agent.wait()
        if isinstance(stop, KeyboardInterrupt):  # the ranks have said where they stopped
            where = str(read_json(directory / "status.json").get("stopped") or "")
            signum: int = stop.signum if isinstance(stop, Stopped) else signal.SIGINT
            raise Stopped(signum, where, getattr(stop, "previous", None)) from None
        raise
    if code == STOPPED_BY_SIGNAL:  # one that reached a rank and not this process
        status = read_json(directory / "status.json")
        raise Stopped(int(status["signum"]), str(status["stopped"]))
    if code < 0:
        raise RankFailed(f"the launcher of the ranks {ended_how(code)}")
    if code > 0:
        status = read_json(directory / "status.json")
        raise RankFailed(status.get("traceback") or f"the ranks exited with {code}", status.get("error"))


def ended_how(code: int) -> str:
    """An exit code in words, such as `was killed by SIGKILL: probably out of memory`."""
    if code >= 0:
        return f"left with exit code {code}"
    name = signal.Signals(-code).name
    meaning = {
        "SIGKILL": "probably out of memory",
        "SIGSEGV": "a crash in native code",
        "SIGBUS": "a crash in native code, or a full /dev/shm",
        "SIGABRT": "a crash in native code",
    }.get(name)
    return f"was killed by {name}" + (f": {meaning}" if meaning else "")


@contextlib.contextmanager
def stops() -> Iterator[None]:
    """Have SIGTERM, SIGUSR1 and SIGUSR2 stop this process as Ctrl-C does, by the exception `Stopped`.

    Another tool's handler is called once the job has been recorded (`Stopped.previous`). Only a main thread can ask
    for it.
    """

    def stop(signum: int, _: Any) -> None:
        raise Stopped(signum, "", before[signum] if foreign(before.get(signum)) else None)

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for signum in ASKING[1:]:
            handler = signal.getsignal(signum)
            if signum == signal.SIGTERM and foreign(handler):
                continue  # as submitit, which passes it over
            stop.of_bnlight = None  # type: ignore[attr-defined]
            before[signum] = signal.signal(signum, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
