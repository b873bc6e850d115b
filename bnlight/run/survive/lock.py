"""Who runs a job: one process at a time, on one machine or on several that share the directory.

On one machine the kernel's lock on `.lock` decides; it is freed at any death. Between machines that lock may not
reach (many shared file systems keep it to each host), so an owner also writes who it is into the file, touches it
every few seconds, and claims its turn by creating `.claim-N`, which succeeds once whoever else tries.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from bnlight.run.survive.held import held

STALE_SECONDS = 120.0  # an owner on another host that has been silent for longer is a dead one
SECONDS_BETWEEN_BEATS = 15.0
LENGTH = 400  # of what an owner writes: process, host, turn
ATTEMPTS, SECONDS_BETWEEN_ATTEMPTS = 5, 0.1  # a reader that only looks holds the lock for an instant


class JobBusy(RuntimeError):
    """Another living process owns this job's directory."""


@contextlib.contextmanager
def own(directory: Path) -> Iterator[float | None]:
    """Own the job's directory for the duration of the block; yields when its last owner was last alive (unix time).

    Raises JobBusy, naming the owner, if a living process holds it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".lock").open("a+") as lock:
        reaches = _lock(lock, directory)
        seen = os.fstat(lock.fileno()).st_mtime
        before = _read(lock)
        if before and (before["host"] != socket.gethostname() or not reaches) and _alive(lock, before):
            raise JobBusy(_busy(directory, before))
        turn = _claim(directory, int(before.get("turn", 0)) + 1)
        try:
            _write(lock, {"pid": os.getpid(), "host": socket.gethostname(), "turn": turn})
        except OSError:  # the disk is full: others need not wait for this turn
            (directory / f".claim-{turn}").unlink(missing_ok=True)
            raise
        held.add(lock)
        stop = threading.Event()
        beat = threading.Thread(target=_beat, args=(directory / ".lock", stop), daemon=True)
        beat.start()
        try:
            yield seen if before.get("pid") else None
        finally:
            stop.set()
            beat.join()
            with contextlib.suppress(OSError):  # the disk is full: the lock is freed all the same
                _write(lock, {"pid": None, "host": socket.gethostname(), "turn": turn})
            (directory / f".claim-{turn}").unlink(missing_ok=True)
            held.discard(lock)


def owner(directory: Path) -> dict[str, Any]:
    """The process that holds the job's directory, `pid` and `host`; empty if no living process does."""
    try:
        with (directory / ".lock").open() as lock:
            found = _read(lock)
            if _is_held(lock, found):
                return found or {"pid": None, "host": socket.gethostname()}
    except FileNotFoundError:
        return {}
    turn = found.get("turn", 0)
    taken = any(_turn_of(claim) > turn and _is_fresh(claim) for claim in directory.glob(".claim-*"))
    return {"pid": None, "host": "another machine"} if taken else {}


def _is_held(lock: IO[str], found: dict[str, Any]) -> bool:
    if found.get("host", socket.gethostname()) != socket.gethostname():
        return _alive(lock, found)
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without such locks
        return _alive(lock, found)
    return False


def _lock(lock: IO[str], directory: Path) -> bool:
    """Take the kernel's lock; False on a file system that has none."""
    for attempt in range(ATTEMPTS):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if attempt == ATTEMPTS - 1:
                raise JobBusy(_busy(directory, _read(lock))) from None
            time.sleep(SECONDS_BETWEEN_ATTEMPTS)
        except OSError:
            return False
    return False


def _alive(lock: IO[str], found: dict[str, Any]) -> bool:
    """Whether the owner that the file names has given a sign of life; both times are the file server's."""
    if found.get("pid") is None:
        return False
    if found["host"] == socket.gethostname():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(found["pid"], 0)
            return True
        return False
    return time.time() - os.fstat(lock.fileno()).st_mtime < STALE_SECONDS


def _claim(directory: Path, turn: int) -> int:
    """Create the claim of this turn; of several hosts that try at once, one succeeds."""
    while True:
        path = directory / f".claim-{turn}"
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            if _is_fresh(path):
                raise JobBusy(f"{directory} is being taken by another machine at this moment") from None
            turn += 1  # who claimed it died before it said who it was
            continue
        for old in directory.glob(".claim-*"):
            if _turn_of(old) < turn:
                old.unlink(missing_ok=True)
        return turn


def _turn_of(claim: Path) -> int:
    return int(claim.name.rpartition("-")[2])


def _is_fresh(claim: Path) -> bool:
    """Whether who has claimed a turn may still be about to say who it is."""
    with contextlib.suppress(FileNotFoundError):
        return time.time() - claim.stat().st_mtime < STALE_SECONDS
    return False


def _busy(directory: Path, found: dict[str, Any]) -> str:
    pid, host = found.get("pid") or "?", found.get("host") or "this host"
    return f"{directory} is being run by process {pid} on {host}"


def _read(lock: IO[str]) -> dict[str, Any]:
    lock.seek(0)
    with contextlib.suppress(ValueError):  # empty, or just being written
        found = json.loads(lock.read())
        if isinstance(found, dict) and "host" in found:
            return found
    return {}


def _write(lock: IO[str], content: dict[str, Any]) -> None:
    """Write over what is there in one piece, always of one length: a reader never finds a part of it."""
    with open(lock.name, "r+b", buffering=0) as file:  # noqa: PTH123 - "a" would append
        file.write(json.dumps(content).ljust(LENGTH).encode())


def _beat(path: Path, stop: threading.Event) -> None:
    while not stop.wait(SECONDS_BETWEEN_BEATS):
        with contextlib.suppress(OSError):
            os.utime(path)
