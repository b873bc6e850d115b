"""What the processes of one command know of each other: when it began, and which jobs it has dealt with.

A sweep's worker may be replaced, and launchers start processes of their own; they find the command's time and
journal in the environment. The journal has a line for each job that is begun, ended, left out or left to another.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SINCE, JOURNAL, WORKER = "BNLIGHT_SINCE", "BNLIGHT_JOURNAL", "BNLIGHT_WORKER"
WATCHED = "BNLIGHT_WATCHED"  # the supervisor shows what the jobs are doing: they need not
STOPPED_BY_SIGNAL = 76  # the exit code of rank 0, and of its launcher, after a stop that all ranks agreed on
DIED = 75  # the exit code of a process that its watchdog has ended: the job's status says why


@contextlib.contextmanager
def command() -> Iterator[Path]:
    """The environment of a command for the duration of the block, unless a supervisor has made it; its journal."""
    if JOURNAL in os.environ:
        yield Path(os.environ[JOURNAL])
        return
    handle, name = tempfile.mkstemp(prefix="bnlight-", suffix=".jsonl")
    os.close(handle)
    os.environ.update({SINCE: repr(time.time()), JOURNAL: name})
    try:
        yield Path(name)
    finally:
        for key in (SINCE, JOURNAL):
            os.environ.pop(key, None)
        Path(name).unlink(missing_ok=True)


def this_command() -> str | None:
    """What tells this command from others: when it began."""
    return os.environ.get(SINCE)


def of_this_command(status: dict[str, Any]) -> bool:
    """Whether the job's last attempt was begun by this command, or by another after this one began."""
    since = this_command()
    if since is None or status.get("command") == since:  # whatever has become of the clock
        return since is not None
    return float(since) <= float(status.get("started") or 0) <= time.time()


def note(event: str, directory: Path) -> None:
    """Write into the journal that the job in `directory` was `begun`, `ended`, `left` (finished before), `busy`."""
    journal = os.environ.get(JOURNAL)
    if journal is None or not Path(journal).exists():  # a machine of its own, started by a launcher
        return
    line = json.dumps({"event": event, "pid": os.getpid(), "job": str(directory.absolute())}) + "\n"
    with contextlib.suppress(OSError), open(journal, "a", encoding="utf-8") as file:  # noqa: PTH123
        file.write(line)


def journal(path: Path | None = None) -> list[dict[str, Any]]:
    """The journal's entries in order."""
    place = path or Path(os.environ.get(JOURNAL, os.devnull))
    if not place.is_file():
        return []
    entries = []
    for line in place.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):  # it is just being written, or a full disk has cut it off
            entries.append(json.loads(line))
    return entries


def unfinished(path: Path | None = None) -> list[dict[str, Any]]:
    """The entries of the jobs that were begun and never ended."""
    open_: dict[str, dict[str, Any]] = {}
    for entry in journal(path):
        if entry["event"] == "begun":
            open_[entry["job"]] = entry
        elif entry["event"] == "ended":
            open_.pop(entry["job"], None)
    return list(open_.values())


def told(directory: Path) -> bool:
    """Whether an earlier worker or pass of this command has said what became of the job."""
    return str(directory.absolute()) in _told


def begin_pass() -> None:
    """A pass over the sweep's jobs begins: what the journal has by now need not be said again."""
    _told.clear()
    _told.update(entry["job"] for entry in journal() if entry["event"] in ("ended", "left"))


_told: set[str] = set()
