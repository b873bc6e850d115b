"""What a sweep is doing, from its files alone: `bnlight status DIR`, and the live view of `bnlight sweep`.

Nothing here imports torch, and nothing is asked of the processes that run the jobs: it works for a sweep on a cluster.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bnlight.run.duration import duration
from bnlight.run.launch.submitted import has_begun, waiting
from bnlight.run.prune import find_jobs
from bnlight.run.reached import to_come
from bnlight.run.status import read_status

STATES = ("done", "running", "submitted", "failed", "diverged", "preempted", "interrupted")
SECONDS_BETWEEN_LOOKS, SECONDS_BETWEEN_LINES = 1.0, 60.0
SHOWN = 12  # running jobs, and failures, in the view


@dataclass
class Job:
    """One job as its files show it; `progress` is the share of its training steps, `left` the seconds to its end."""

    name: str
    state: str
    epoch: int | None = None
    max_epochs: int | None = None
    step: int | None = None
    metric: str | None = None
    value: float | None = None
    progress: float | None = None
    left: float | None = None
    seconds: float | None = None
    host: str | None = None
    error: str | None = None
    slurm_job: str | None = None

    def where(self) -> str:
        """Such as `epoch 3/8, step 120, val/accuracy 0.913, 40 s left`."""
        parts = [f"epoch {self.epoch}/{self.max_epochs}" if self.epoch else "starting"]
        parts += [f"step {self.step}"] if self.step else []
        parts += [f"{self.metric} {self.value:.4f}"] if self.value is not None else []
        parts += [f"{duration(self.left)} left"] if self.left is not None else []
        return ", ".join(parts)


@dataclass
class Overview:
    """All jobs of a directory; `left` is how many more the last sweep there has, which have not begun."""

    directory: Path
    left: int = 0
    jobs: list[Job] = field(default_factory=list)

    @property
    def total(self) -> int:
        """Those that are there and those to come."""
        return self.left + len(self.jobs)

    def of(self, *states: str) -> list[Job]:
        """The jobs in one of `states`."""
        return [job for job in self.jobs if job.state in states]

    def counts(self) -> dict[str, int]:
        """Jobs by state, in a fixed order, without zeros; `left` at the end."""
        found = Counter(job.state for job in self.jobs)
        counted = {state: found[state] for state in (*STATES, *sorted({*found} - {*STATES})) if found[state]}
        return counted | ({"left": self.left} if self.left else {})

    def time_left(self) -> float | None:
        """Seconds to the end, if as many jobs run at a time as now, each for the mean of those that are over."""
        running, new = self.of("running"), self.left + len(self.of("submitted"))
        took = [job.seconds for job in self.of("done", "diverged") if job.seconds]
        if not running or (not took and (new or any(job.left is None for job in running))):
            return None
        mean = sum(took) / len(took) if took else 0.0
        work = new * mean + sum(mean if job.left is None else job.left for job in running)
        return max(work / len(running), max(job.left or 0.0 for job in running))

    def summary(self) -> str:
        """Such as `12 of 18 jobs: 9 done, 2 running, 1 failed, 6 left; 3 min left`."""
        counts = ", ".join(f"{count} {state}" for state, count in self.counts().items())
        left = self.time_left()
        number = f"{len(self.jobs)} of {self.total}" if self.left else f"{len(self.jobs)}"
        return f"{number} jobs: {counts or 'none yet'}" + (
            f"; {duration(left)} left" if left is not None else ""
        )

    def lines(self) -> list[str]:
        """The summary, then the jobs that run, that wait, and that did not come to their end."""
        running, waiting = self.of("running"), self.of("submitted")
        broken = self.of("failed", "preempted", "interrupted")
        lines = [self.summary()]
        lines += [f"  {job.name}  {job.where()}" for job in running[:SHOWN]]
        lines += [f"  and {len(running) - SHOWN} more that run"] if len(running) > SHOWN else []
        lines += [f"  {job.name}  submitted to SLURM as job {job.slurm_job}" for job in waiting[:SHOWN]]
        lines += [f"  and {len(waiting) - SHOWN} more submitted"] if len(waiting) > SHOWN else []
        lines += [
            f"  {job.name}  {job.state}{f': {job.error}' if job.error else ''}" for job in broken[:SHOWN]
        ]
        lines += [f"  and {len(broken) - SHOWN} more that have not ended well"] if len(broken) > SHOWN else []
        return lines


class Reader:
    """Reads a directory again and again; a file that has not changed is not opened twice."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._known: dict[Path, tuple[int, Job]] = {}

    def read(self) -> Overview:
        """The directory as it is now. Raises FileNotFoundError if there is none."""
        found = {path: self._job(path) for path in find_jobs(self.directory)}
        left = 0
        for sweep in {self.directory, *(path.parent for path in found)}:
            submitted = waiting(sweep)
            for name, number in submitted.items():
                if not has_begun(sweep / name, number):
                    found[sweep / name] = Job(name, "submitted", slurm_job=number)
            left += to_come(sweep, submitted)
        return Overview(self.directory, left, [found[path] for path in sorted(found)])

    def _job(self, directory: Path) -> Job:
        changed = (directory / "status.json").stat().st_mtime_ns
        known = self._known.get(directory)
        if known and known[0] == changed and known[1].state != "running":  # a running one may have died since
            return known[1]
        try:
            job = _job(directory.name, read_status(directory))
        except ValueError as error:
            job = Job(directory.name, "unknown", error=str(error))
        self._known[directory] = changed, job
        return job


def show(directory: Path, as_json: bool = False) -> int:
    """Print the sweep once, in plain lines or as JSON."""
    overview = Reader(directory).read()
    if as_json:
        jobs = [asdict(job) for job in overview.jobs]
        head = {
            "directory": str(directory),
            "total": overview.total,
            "counts": overview.counts(),
        }
        print(json.dumps(head | {"time_left": overview.time_left(), "jobs": jobs}, indent=2))
    else:
        print("\n".join(overview.lines()))
    return 0


def watch(directory: Path) -> int:
    """Show the sweep until nothing runs: live on a terminal, elsewhere a line at each change or minute."""
    from rich.console import Console
    from rich.live import Live

    reader, console = Reader(directory), Console()
    if not console.is_terminal:
        said, at = "", 0.0
        while True:
            overview = reader.read()
            counts = str(overview.counts())
            if counts != said or time.monotonic() - at > SECONDS_BETWEEN_LINES:
                print(overview.summary(), flush=True)
                said, at = counts, time.monotonic()
            if not overview.of("running", "submitted"):
                return 0
            time.sleep(SECONDS_BETWEEN_LOOKS)
    overview = reader.read()
    with Live(view(overview), console=console, auto_refresh=False, transient=True) as live:
        while overview.of("running", "submitted"):
            time.sleep(SECONDS_BETWEEN_LOOKS)
            overview = reader.read()
            live.update(view(overview), refresh=True)
    print("\n".join(overview.lines()))
    return 0


def view(overview: Overview) -> Any:
    """The live view: a line of counts with a bar, and a line for each running job, none longer than the terminal."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    over = len(overview.of("done", "diverged", "failed"))
    head = Table.grid(padding=(0, 1))
    bar = ProgressBar(total=max(overview.total, 1), completed=over, width=20)
    head.add_row(bar, Text(overview.summary(), no_wrap=True, overflow="ellipsis"))
    rows = Table.grid(padding=(0, 1))
    for job in overview.of("running")[:SHOWN]:
        name = Text(job.name, style="cyan", no_wrap=True, overflow="ellipsis")
        rows.add_row(
            ProgressBar(total=1.0, completed=job.progress or 0.0, width=10),
            name,
            Text(job.where(), no_wrap=True, overflow="ellipsis"),
        )
    return Group(head, rows)


def main(arguments: Sequence[str]) -> int:
    """`bnlight status DIR [--watch] [--json]`; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="bnlight status", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument("directory", type=Path, help="a sweep's, such as outputs/norms")
    parser.add_argument("--watch", action="store_true", help="until nothing runs any more")
    parser.add_argument("--json", action="store_true", help="for programs")
    options = parser.parse_args(arguments)
    try:
        return watch(options.directory) if options.watch else show(options.directory, options.json)
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # the sweep goes on
        return 0


def _job(name: str, status: dict[str, Any]) -> Job:
    state, metric, progress = str(status.get("state") or "new"), status.get("monitor"), status.get("progress")
    error = str(status.get("error") or "").strip().splitlines()
    now, since = float(status.get("heartbeat") or 0), float(status.get("started") or 0)
    trained = max(0.0, now - float(status.get("training_since") or since))  # in this attempt
    began = float(status.get("resumed_at") or 0.0)  # the share that an earlier attempt had done
    left = None
    if state == "running" and progress and progress > began:
        left = max(0.0, trained * (1 - progress) / (progress - began))
    return Job(
        name,
        state,
        status.get("epoch"),
        status.get("max_epochs"),
        status.get("step"),
        metric,
        (status.get("metrics") or {}).get(metric or ""),
        progress,
        left,
        status.get("seconds") if state != "running" else max(0.0, now - since),
        status.get("host"),
        error[0] if error else None,
    )
