"""Jobs of which a process is stopped (SIGSTOP) for longer than `stall_limit`: it cannot end itself, others must."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

from bnlight.lightning.stop import seconds
from bnlight.run.status import read_json, update_status
from bnlight.run.survive.command import unfinished

SECONDS_BETWEEN_LOOKS = 1.0
SECONDS_FOR_THE_WATCHDOGS = 5.0  # those of the other ranks know where they were


class Suspended:
    """Looks at the processes of a command's jobs every second (Linux; elsewhere it finds none stopped).

    Looks are counted, not time: while the supervisor itself is stopped (Ctrl-Z, `scontrol suspend`) nothing counts.
    """

    def __init__(self, journal: Path) -> None:
        self.journal = journal
        self.looks: dict[int, int] = {}  # by the process that leads a job: how often in a row it was seen so

    def look(self) -> None:
        """End each job that has been stopped for too long, and say in its status why."""
        seen = {}
        for entry in unfinished(self.journal):
            process, job = int(entry["pid"]), Path(entry["job"])
            if stopped := [one for one in family(process) if state(one) == "T"]:
                seen[process] = self.looks.get(process, 0) + 1
                limit = _stall_limit(job)
                if limit and seen[process] * SECONDS_BETWEEN_LOOKS > limit + SECONDS_FOR_THE_WATCHDOGS:
                    _end(
                        job, process, f"process {stopped[0]} was stopped (SIGSTOP) for stall_limit={limit:g}s"
                    )
        self.looks = seen


def _end(job: Path, process: int, why: str) -> None:
    if read_json(job / "status.json").get("state") == "running":  # else a watchdog has said more
        update_status(job, state="failed", error=why, traceback=why, ended=time.time())
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)  # the others die with it


def family(process: int) -> list[int]:
    """A process and all below it."""
    found = [process]
    for one in found:
        with contextlib.suppress(OSError):
            children = Path(f"/proc/{one}/task/{one}/children").read_text()
            found += [int(child) for child in children.split()]
    return found


def state(process: int) -> str:
    """As `ps` has it: R, S, D, T (stopped), ...; empty for none."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return stat.rpartition(")")[2].split()[0]


def _stall_limit(job: Path) -> float | None:
    import yaml  # rarely needed

    with contextlib.suppress(OSError, yaml.YAMLError, ValueError):
        return seconds(yaml.safe_load((job / "config.yaml").read_text(encoding="utf-8")).get("stall_limit"))
    return None
