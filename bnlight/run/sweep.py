"""What a sweep knows of its jobs while it runs: which of how many, and how long the rest will take."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, read_write

from bnlight.run.duration import duration as duration
from bnlight.run.groups import as_option
from bnlight.run.identity import NOT_IDENTITY, typed
from bnlight.run.launch.listed import each_job
from bnlight.run.reached import announce, key_of
from bnlight.run.read_once import read_once
from bnlight.run.status import read_status
from bnlight.run.survive.command import JOURNAL, journal, note
from bnlight.run.survive.lock import owner

ENDED = ("done", "diverged", "failed")
SECONDS_BETWEEN_LOOKS = 0.5


@dataclass
class Sweep:
    """A running sweep: `total` is None where the sweeper decides on the way."""

    directory: Path
    total: int | None
    key: str = ""
    seconds: list[float] = field(default_factory=list)  # of the jobs that were run, not skipped
    at_a_time: int = 1
    empty: list[str] = field(default_factory=list)  # what was asked for and matches nothing
    inside_job: bool = False  # this process runs one job for a launcher; the sweep itself is elsewhere

    @property
    def shown(self) -> Path:
        """The directory as one would type it here."""
        here = Path.cwd()
        return self.directory.relative_to(here) if self.directory.is_relative_to(here) else self.directory

    def label(self, number: int) -> str:
        """Such as `[3/18, 2 min left]` for the third job; the estimate is the mean job times those to come."""
        if self.total is None:
            return f"[{number + 1}]"
        place = f"{number + 1:>{len(str(self.total))}}/{self.total}"
        if not self.seconds:
            return f"[{place}]"
        left = sum(self.seconds) / len(self.seconds) * (self.total - number) / self.at_a_time
        return f"[{place}, {duration(left)} left]"


current: Sweep | None = None  # of this process; a process runs one sweep at a time


class SweepProgress(Callback):
    """A Hydra callback that notes where the sweep is and how many jobs it has; config files are then read once."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        global current
        read_once()
        if params := config.hydra.sweeper.get("params"):
            with read_write(config.hydra):
                for key, value in params.items():
                    params[key] = as_option(f"{key}={value}").partition("=")[2]
        total, empty = _count(config)
        current = Sweep(Path(config.hydra.sweep.dir).absolute(), total, _key(config), empty=empty)
        if JOURNAL in os.environ:  # not a dry run
            announce(current.directory, current.total, current.key)
            note("sweep", current.directory)


def wait(directory: Path) -> None:
    """Return when no living process runs the job any more."""
    while owner(directory):
        time.sleep(SECONDS_BETWEEN_LOOKS)


def wait_for_others() -> bool:
    """Wait for the jobs of this command that other processes run; whether all of them have come to an end.

    False means that an owner died: the job is there to be taken.
    """
    busy = {Path(entry["job"]) for entry in journal() if entry["event"] == "busy"}
    running = sorted(path.name for path in busy if owner(path))
    if running:
        shown = ", ".join(running[:3]) + (" ..." if len(running) > 3 else "")
        print(
            f"Waiting for {len(running)} jobs that run elsewhere: {shown} (Ctrl-C leaves them alone)",
            flush=True,
        )
    for path in busy:
        wait(path)
    return all(read_status(path).get("state") in ENDED for path in busy)


def others_failed() -> bool:
    """Whether a job of this command has failed in another process."""
    busy = {Path(entry["job"]) for entry in journal() if entry["event"] == "busy"}
    return any(read_status(path).get("state") == "failed" for path in busy)


def _key(config: DictConfig) -> str:
    """What the sweep's jobs are made from, without how they are run and shown."""
    kept = [text for text in typed(config.hydra) if _top(text) not in NOT_IDENTITY]
    sweeper = OmegaConf.to_container(config.hydra.sweeper, resolve=False)
    return key_of([config.hydra.job.config_name, sorted(kept), sweeper])


def _top(override: str) -> str:
    return override.lstrip("+~").split("=")[0].split(".")[0]


def _count(config: DictConfig) -> tuple[int | None, list[str]]:
    """How many jobs there are, None where the sweeper decides on the way, and what has no values."""
    sweeper = config.hydra.sweeper
    listed = sweeper._target_ == "hydra_plugins.bnlight.List"
    if listed and not sweeper.jobs:  # the sweeper says so
        return None, []
    if not listed and not sweeper._target_.endswith(".BasicSweeper"):
        return None, []
    arguments = [f"{key}={value}" for key, value in (sweeper.params or {}).items()]
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    try:
        overrides = parser.parse_overrides([*arguments, *typed(config.hydra)])
        several = [one for one in overrides if one.is_discrete_sweep()]
        empty = [str(one.input_line) for one in several if not any(True for _ in one.sweep_iterator())]
        if listed:
            return len(each_job(sweeper.jobs, overrides)), empty
        return sum(len(batch) for batch in BasicSweeper.split_arguments(overrides, None)), empty
    except HydraException:  # which the sweeper will say again
        return None, []
