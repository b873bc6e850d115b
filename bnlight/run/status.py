"""What is known of one job on disk: its state, its lock, and files that are never half written.

The job's directory is the source of truth. `status.json` says what happened last; the lock says whether a
living process owns the directory now, so a `running` left behind by a killed process reads as `interrupted`.
Nothing here imports torch: a status must be readable on a laptop.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bnlight.run.survive.lock import STALE_SECONDS, owner
from bnlight.run.survive.lock import JobBusy as JobBusy
from bnlight.run.survive.lock import own as own

STATES = ("running", "done", "failed", "diverged", "preempted", "interrupted")


def write_atomic(path: Path, text: str) -> None:
    """Write `text` to `path` so that a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)  # noqa: PTH101 - mkstemp makes the file private
        os.replace(temporary, path)  # noqa: PTH105
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)  # noqa: PTH108
        raise


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, atomically; NaN and infinities become null, so any JSON reader can read it."""
    write_atomic(path, json.dumps(_finite(value), indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; an absent file is an empty object. Raises ValueError for a broken file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); delete it to start this job again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, expected a JSON object")
    return value


def read_status(directory: Path) -> dict[str, Any]:
    """The job's status; `state` is absent when the job never started, and `interrupted` when its owner is gone."""
    status = read_json(directory / "status.json")
    if status.get("state") == "running" and not _owner_lives(directory, status):
        status["state"] = "interrupted"
    return status


def update_status(directory: Path, **fields: Any) -> dict[str, Any]:
    """Merge `fields` into the job's status file and return the whole."""
    with _alone(directory):
        status = read_json(directory / "status.json") | fields
        write_json(directory / "status.json", status)
    return status


def this_process() -> dict[str, Any]:
    """Who is running the job: the fields of the status that name an owner."""
    who = {"pid": os.getpid(), "host": socket.gethostname(), "heartbeat": time.time()}
    return who | {"slurm_job": _slurm_job()}


def _slurm_job() -> str | None:
    """The number of the SLURM job, or of the array's task, that this process is in."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ.get("SLURM_JOB_ID")


def _owner_lives(directory: Path, status: dict[str, Any]) -> bool:
    if owner(directory):
        return True
    elsewhere = status.get("host") not in (None, socket.gethostname())
    return elsewhere and time.time() - float(status.get("heartbeat") or 0) < STALE_SECONDS


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Keep other processes of this job from changing its status meanwhile, where the file system can."""
    try:
        handle = os.open(directory, os.O_RDONLY)
    except FileNotFoundError:
        yield
        return
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
