"""Launchers of a sweep's jobs beside Hydra's serial one; presets in conf/hydra/launcher choose them.

Each job runs in a process of its own, so one that dies is one failed job and the others go on. What a launcher adds is
only where that process runs; how a job runs, skips and resumes is `run_job`'s, the same everywhere.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, setup_globals
from hydra.core.utils import run_job as run_hydra_job
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from bnlight.lightning.stop import Stopped
from bnlight.run import identity, searchpath, sweep
from bnlight.run.job import FINISHED, CommandError, FailFast, JobFailed
from bnlight.run.launch.submitted import forget
from bnlight.run.status import read_status, update_status
from bnlight.run.survive.command import note, of_this_command

SECONDS_TO_BE_KILLED = 300.0  # SLURM's grace time and KillWait are shorter
# What each launcher needs beside bnlight's own dependencies, and the extra that brings it.
EXTRAS = {"cloudpickle": "parallel", "submitit": "slurm", "ray": "ray"}


@dataclass
class Job:
    """One job of a sweep, as it travels to the process that runs it."""

    context: HydraContext
    config: DictConfig
    task: TaskFunction
    overrides: list[str]
    number: int
    sweep: sweep.Sweep | None = None
    path: list[str] = field(default_factory=lambda: list(sys.path))  # the user's modules are found there too
    visible: str | None = field(default_factory=lambda: os.environ.get("CUDA_VISIBLE_DEVICES"))
    singletons: Any = field(default_factory=Singleton.get_state)
    place: Path | None = None  # the directory, once somebody has asked for it

    def __call__(self) -> JobReturn:
        """Run the job in this process, which was started for it (or for several, one after the other)."""
        sys.path[:] = [*self.path, *(folder for folder in sys.path if folder not in self.path)]
        setup_globals()
        Singleton.set_state(self.singletons)
        _restore("CUDA_VISIBLE_DEVICES", self.visible)  # ray and submitit_local have their own ideas of it
        identity.register()
        searchpath.register()
        slurm = os.environ.get("SUBMITIT_EXECUTOR") == "slurm"
        if slurm:  # submitit passes SIGTERM over, though scancel and `scontrol requeue` send nothing else
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        try:
            returned = self.here()
            if slurm:
                forget(self.directory())
            return returned
        except FailFast as failure:  # the launching process ends the sweep
            return not_done(self, str(failure))
        except Stopped as stop:
            if slurm and stop.signum == signal.SIGTERM:
                _wait_for_the_end()
            raise

    def here(self) -> JobReturn:
        """Run the job in this process, which has Hydra's state already."""
        before = sweep.current
        sweep.current = replace(self.sweep, inside_job=True) if self.sweep else None
        try:
            return run_hydra_job(
                hydra_context=self.context,
                task_function=self.task,
                config=self.composed(),
                job_dir_key="hydra.sweep.dir",
                job_subdir_key="hydra.sweep.subdir",
            )
        finally:
            sweep.current = before

    def composed(self) -> DictConfig:
        """The job's config, as the serial launcher composes it."""
        config = self.context.config_loader.load_sweep_config(self.config, self.overrides)
        with open_dict(config):
            config.hydra.job.num = self.number
            config.hydra.job.id = f"{config.hydra.job.name}_{self.number}"
            # Bars of several processes would overwrite each other.
            if config.get("progress") in ("auto", "bar"):
                config.progress = "plain"
        return config

    def directory(self) -> Path:
        """The job's directory, as Hydra will choose it."""
        if self.place is None:
            config, before = self.composed(), HydraConfig.instance().cfg
            try:
                HydraConfig.instance().set_config(config)
                root = OmegaConf.select(config, "hydra.sweep.dir")
                self.place = Path(root, OmegaConf.select(config, "hydra.sweep.subdir")).absolute()
            finally:
                HydraConfig.instance().cfg = before
        return self.place

    def checkpoint(self) -> Any:
        """For submitit, when a job is to be submitted again: it goes on from its own directory."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)

    @property
    def label(self) -> str:
        """Which job of how many."""
        return self.sweep.label(self.number) if self.sweep else f"[{self.number + 1}]"


class BnlightLauncher(Launcher):
    """What the launchers share: jobs that are over are not started, dead ones recorded, signals passed on."""

    needs = ""

    def __init__(self, **options: Any) -> None:
        self.options: dict[str, Any] = {
            name: OmegaConf.to_container(option, resolve=True) if OmegaConf.is_config(option) else option
            for name, option in options.items()
        }

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.context, self.task, self.config = hydra_context, task_function, config
        require(self.needs, str(config.hydra.runtime.choices.get("hydra/launcher", "")))

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """Run the jobs and return what each returned, in order."""
        setup_globals()
        Path(str(self.config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
        jobs = [
            Job(self.context, self.config, self.task, list(overrides), initial_job_idx + index, sweep.current)
            for index, overrides in enumerate(job_overrides)
        ]
        returns, open_ = {}, []
        for job in jobs:
            if self._is_over(job):
                returns[job.number] = job.here()  # which says so, and has the score
            else:
                open_.append(job)
        if open_:
            returns |= self.run(open_)
        return [returns[job.number] for job in jobs]

    def run(self, jobs: list[Job]) -> dict[int, JobReturn]:
        """Run `jobs`; what each returned, by its number."""
        raise NotImplementedError

    def failed(self, job: Job, what: str) -> JobReturn:
        """The return of a job whose process ended without one: recorded as failed unless the job says otherwise."""
        directory = job.directory()
        status = read_status(directory)
        if status.get("state") in FINISHED:  # it ended after that
            note("ended", directory)
            return job.here()
        if status.get("state") in (None, "interrupted"):
            status = update_status(directory, state="failed", error=what, ended=time.time())
            note("ended", directory)
            print(f"{job.label} {directory.name}: failed: {what}", flush=True)
        return not_done(job, f"{directory.name}: {status['state']}")

    def stops_after(self, returned: JobReturn) -> bool:
        """Whether this return ends the sweep (`fail_fast`)."""
        return returned.status == JobStatus.FAILED and bool(self.config.get("fail_fast"))

    def _is_over(self, job: Job) -> bool:
        try:
            status = read_status(job.directory())
        except ValueError:  # unreadable, as the job will say
            return False
        state, rerun = status.get("state"), None if of_this_command(status) else self.config.get("rerun")
        return (state in FINISHED and rerun != "all") or (state == "failed" and rerun is None)


def _wait_for_the_end() -> None:
    """After SIGTERM and its checkpoint: SLURM queues a preempted job again only if it has not ended by itself.

    submitit's handler is back by now: its signal, should it come, queues the job again at once.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(SECONDS_TO_BE_KILLED)


def not_done(job: Job, why: str) -> JobReturn:
    """The return of a job that has no result."""
    returned = JobReturn(overrides=job.overrides, status=JobStatus.FAILED)
    returned.return_value = JobFailed(why)
    return returned


def require(package: str, preset: str) -> None:
    """Raises CommandError with the command that installs `package` if it is absent."""
    if package and importlib.util.find_spec(package) is None:
        extra = EXTRAS[package]
        raise CommandError(f"hydra/launcher={preset} needs {package}: pip install 'bnlight[{extra}]'")


def register() -> None:
    """Make launchers and sweepers known to Hydra, whose 1.3 takes plugins from the package hydra_plugins only."""
    from bnlight.run.launch.listed import List
    from bnlight.run.launch.parallel import Parallel, RayLocal
    from bnlight.run.launch.search import Search
    from bnlight.run.launch.submit import Local, Slurm

    for plugin in (Parallel, RayLocal, Local, Slurm, Search, List):
        Plugins.instance().class_name_to_class[f"hydra_plugins.bnlight.{plugin.__name__}"] = plugin
    # Optuna 2's first import of SQLAlchemy, which Hydra 1.3 does for a sampler before any sweeper is asked
    warnings.filterwarnings("ignore", "Deprecated API features detected")


@contextlib.contextmanager
def environment(**values: str | None) -> Iterator[None]:
    """The environment with `values` for the block; None removes one."""
    before = {name: os.environ.get(name) for name in values}
    for name, value in values.items():
        _restore(name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            _restore(name, value)


def _restore(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value
