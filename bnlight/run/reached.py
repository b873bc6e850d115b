"""Which jobs the last sweep of a directory has come to, in files there: so that those still to come can be counted."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bnlight.run.status import read_json, write_json

SAID = ".sweep.json"  # how many jobs the last sweep has, and its key
REACHED = ".sweep.jobs"  # a line for each job that a command has come to: the sweep's key and the job's name


def key_of(what: Any) -> str:
    """A sweep's key, from all that makes its jobs: commands that work off one sweep together have the same."""
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:8]


def announce(sweep: Path, total: int | None, key: str) -> None:
    """A sweep of `total` jobs (None: nobody knows) begins in its directory."""
    with contextlib.suppress(OSError):  # for display alone
        write_json(sweep / SAID, {"total": total, "key": key})


def reach(sweep: Path, key: str, job: str) -> None:
    """The sweep has come to the job of that name."""
    with contextlib.suppress(OSError), (sweep / REACHED).open("a", encoding="utf-8") as file:
        file.write(f"{key} {job}\n")


def to_come(sweep: Path, known: Iterable[str] = ()) -> int:
    """How many jobs the last sweep of the directory has beside those that it has come to, and those in `known`."""
    said = read_json(sweep / SAID)
    lines = (sweep / REACHED).read_text(encoding="utf-8").splitlines() if (sweep / REACHED).is_file() else []
    names = {name for key, _, name in (line.partition(" ") for line in lines) if key == said.get("key")}
    return max(0, int(said.get("total") or 0) - len(names | {*known}))
