"""How a job has ended: written into its directory, and said in a line."""

from __future__ import annotations

import contextlib
import re
import time
import traceback
from pathlib import Path
from typing import Any

from bnlight.run.ranks.processes import RankFailed
from bnlight.run.status import read_json, update_status


def record(directory: Path, **fields: Any) -> bool:
    """Update the job's status if the disk takes it; a job that could not be recorded reads as interrupted."""
    try:
        update_status(directory, **fields)
    except OSError:
        return False
    return True


def record_failure(directory: Path, title: str, error: BaseException, seconds: float) -> None:
    """Write down a failure; on a full disk, say at least that."""
    what, trace = _described(error)
    written = record(
        directory, state="failed", error=what, traceback=trace, seconds=seconds, ended=time.time()
    )
    with contextlib.suppress(OSError):
        _append(directory / "job.log", trace)
    see = f"see {directory / 'job.log'}" if written else "which could not be written down: the disk is full?"
    print(f"{title}: failed: {what}\n    {see}", flush=True)


def _described(error: BaseException) -> tuple[str, str]:
    """What went wrong in words, and the traceback."""
    if isinstance(error, RankFailed):
        return error.what, str(error)
    what = "".join(traceback.format_exception_only(error)).strip()
    return what, "".join(traceback.format_exception(error))


def _append(path: Path, text: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(text.rstrip() + "\n")


def scores(directory: Path, config: dict[str, Any]) -> str:
    """The monitored metric, and the same of the test."""
    metrics = read_json(directory / "result.json").get("metrics", {})
    monitored = (config.get("monitor") or {}).get("metric") or ""
    names = dict.fromkeys((monitored, re.sub(r"^val(?=[/_])", "test", monitored)))
    shown = {name: metrics[name] for name in names if name in metrics}
    return "".join(
        f"  {name} {'not finite' if value is None else format(value, '.4f')}" for name, value in shown.items()
    )
