"""The launcher of a job's ranks: `python -m bnlight.run.ranks.elastic JOB_DIRECTORY PROCESSES [LABEL]`.

A thin use of torch's elastic launcher: it finds a free port, starts the ranks from the job's directory, ends all
when one fails, and says which failed first and how.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import uuid
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing import api as multiprocessing
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from bnlight.run.ranks.processes import die_with_parent, ended_how, parenthood
from bnlight.run.status import read_json, update_status
from bnlight.run.survive.command import DIED, STOPPED_BY_SIGNAL
from bnlight.run.survive.output import outlive_the_reader


def main() -> int:
    """Start the ranks, wait for them, and leave the first failure's traceback in the job's status."""
    die_with_parent()
    outlive_the_reader()
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the status says it better
    os.environ.update(parenthood())
    _stop_once()
    directory, processes, *label = sys.argv[1:]
    with tempfile.TemporaryDirectory(prefix="bnlight-ranks-") as scratch:
        return _launch(Path(directory), int(processes), label, scratch)


def _stop_once() -> None:
    """Have the first signal end the ranks in order, and those after it do nothing: schedulers send several.

    SIGUSR1 and SIGUSR2 end them too; torch's launcher does not know these.
    """
    first = multiprocessing._terminate_process_handler
    asked: list[int] = []

    def once(signum: int, frame: Any) -> None:
        if not asked:
            asked.append(signum)
            first(signal.SIGTERM if signum in (signal.SIGUSR1, signal.SIGUSR2) else signum, frame)

    multiprocessing._terminate_process_handler = once
    for signum in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(signum, once)


def _launch(directory: Path, processes: int, label: list[str], scratch: str) -> int:
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.2,
        logs_specs=DefaultLogsSpecs(log_dir=scratch),  # where a failed rank leaves its traceback
    )
    try:
        elastic_launch(config, sys.executable)("-m", "bnlight.run.ranks.rank", str(directory), *label)
    except ChildFailedError as error:
        if error.get_first_failure()[1].exitcode == STOPPED_BY_SIGNAL:
            return STOPPED_BY_SIGNAL
        what, trace = _first_failure(error, directory)
        update_status(directory, error=what, traceback=trace)
        return 1
    except SignalException as stop:  # the job's owner stops it
        return 128 + stop.sigval
    return 0


def _first_failure(error: ChildFailedError, directory: Path) -> tuple[str, str]:
    """What went wrong in words, and the traceback of the rank that failed first."""
    # The launcher ends the other ranks by SIGTERM, which may be noticed before what it did so for.
    own = {rank: failure for rank, failure in error.failures.items() if failure.exitcode != -signal.SIGTERM}
    rank, failure = min((own or error.failures).items(), key=lambda item: item[1].timestamp)
    if failure.exitcode == DIED and (written := read_json(directory / "status.json")).get("watchdog"):
        return written["error"], written["traceback"]
    message = failure.error_file_data.get("message", {})
    trace = message.get("extraInfo", {}).get("py_callstack") if isinstance(message, dict) else None
    how = ended_how(failure.exitcode) if failure.exitcode < 0 else f"exited with {failure.exitcode}"
    what = message.get("message", failure.message) if isinstance(message, dict) else failure.message
    if failure.exitcode < 0 or not isinstance(message, dict):
        what = how
    return f"rank {rank}: {what}", f"rank {rank} {how}\n{trace or failure.message}"


if __name__ == "__main__":
    sys.exit(main())
