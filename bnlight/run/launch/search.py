"""A search: Hydra's Optuna sweeper over a study that outlives the processes that work on it."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import json
import logging
import math
import os
import secrets
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, cast

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from bnlight.lightning.build import instantiate
from bnlight.run import sweep
from bnlight.run.identity import identity
from bnlight.run.job import CommandError, FailFast, JobFailed
from bnlight.run.survive.command import SINCE
from bnlight.run.survive.lock import own, owner

DIRECTIONS = {"max": "maximize", "min": "minimize"}
PLUGIN = "hydra_plugins.hydra_optuna_sweeper"


class Search(Sweeper):
    """Hydra's Optuna sweeper, `n_jobs` trials at a time until the study has `n_trials`, whoever ran them.

    What it adds: a trial whose process died is taken up again with its values, under its number; trials that failed
    stay failed until `--retry-failed`, and `--force` begins a new study; a diverged trial is as bad as the worst
    that has finished, so that the sampler learns from it; a changed question (search space, fixed settings, metric)
    is another study. Several processes may work on one study.
    """

    def __init__(self, **options: Any) -> None:
        self.options = options

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        import optuna
        from hydra_plugins.hydra_optuna_sweeper.optuna_sweeper import OptunaSweeper

        optuna.logging.set_verbosity(logging.WARNING)
        plugin = OptunaSweeper(**self.options)
        plugin.setup(hydra_context=hydra_context, task_function=task_function, config=config)
        self.context, self.root, self.stock = hydra_context, config, cast("Any", plugin.sweeper)
        self.folder = Path(config.hydra.sweep.dir)
        self.runner, self.stock.launcher = self.stock.launcher, self
        self.extend = self.stock.custom_search_space_extender
        self.stock.custom_search_space_extender = self._chosen

    def sweep(self, arguments: list[str]) -> None:
        """Run trials until the study has `n_trials`. Raises JobFailed if a trial of the study has failed."""
        from bnlight.run import plan

        arguments = self._enumerated(arguments)
        self.stock.params = {}  # they are among the arguments now
        self._read(arguments)
        if plan.looking:
            print(plan.CHOOSES_ITSELF.format(sweeper="Search"))
            return
        self.waiting = False
        self.worker = f"{os.getpid()}-{secrets.token_hex(4)}"
        self.workers = self.folder / ".search"
        with own(self.workers / self.worker), Turn(self.workers / ".turn") as self.turn:
            self.turn.take()
            self._open()
            while (left := self._left()) > 0 or self._wait():
                if left <= 0:
                    continue
                self.trials: list[Any] = []
                self.stock.n_trials = self.stock.n_jobs = min(left, self.at_a_time)
                self._batch(arguments)
                self.turn.take()
            self._conclude()

    def launch(self, overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Stands between the sweeper and its launcher: the trials are chosen, here they are run and judged."""
        self.turn.give()
        returns: Sequence[JobReturn] = self.runner.launch(overrides, initial_job_idx)
        self.have_run = True
        for trial, returned in zip(self.trials, returns, strict=True):
            value = returned.return_value if returned.status == JobStatus.COMPLETED else None
            if isinstance(value, float) and math.isnan(value):
                trial.set_user_attr("diverged", True)
                returned.return_value = self._worst()
            elif value is None and returned.status == JobStatus.COMPLETED:
                returned.status = JobStatus.FAILED
                returned.return_value = JobFailed(f"it has ended without {self.base.monitor.metric}")
        if self.base.get("fail_fast") and any(one.status == JobStatus.FAILED for one in returns):
            raise FailFast
        return returns

    def _read(self, arguments: list[str]) -> None:
        """What is searched, by which metric, and so which study it is."""
        parsed = OverridesParser.create(config_loader=self.context.config_loader).parse_overrides(arguments)
        last = {override.get_key_element(): override for override in parsed}
        space = sorted(str(o.input_line) for o in last.values() if o.is_sweep_override())
        if not space:
            raise CommandError(
                "there is nothing to search: give a range, such as 'optimizer.lr=tag(log,interval(0.001,1))'"
            )
        fixed = [str(o.input_line) for o in last.values() if not o.is_sweep_override()]
        self.base = self.context.config_loader.load_sweep_config(self.root, fixed)
        if self.base.monitor.metric is None:
            raise CommandError(
                "a search needs a metric to judge its trials by, and monitor.metric is null: choose one, such as "
                "monitor.metric=val/accuracy"
            )
        mode = self.base.monitor.mode
        self.direction = self.stock.direction or DIRECTIONS.get(mode, "maximize")
        self.direction = getattr(self.direction, "name", self.direction)
        if self.direction not in DIRECTIONS.values():
            raise CommandError(
                f"hydra.sweeper.direction={self.direction}: expected maximize, minimize or null"
            )
        if self.stock.n_trials < 1:
            raise CommandError(f"hydra.sweeper.n_trials={self.stock.n_trials}: a search has at least 1 trial")
        asked = [identity(self.base, complete=False), *space, str(self.base.monitor.metric), self.direction]
        digest = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:8]
        self.name = self.stock.study_name or f"{self.folder.name}-{digest}"
        self.n_trials = self.stock.n_trials
        self.at_a_time = self.stock.n_jobs or at_a_time(self.runner)

    def _enumerated(self, arguments: Sequence[str]) -> list[str]:
        """`hydra.sweeper.params` and the command line, with the options that match in place of `norm=glob(b*)`."""
        given = [f"{key}={value}" for key, value in (self.stock.params or {}).items()] + list(arguments)
        parser = OverridesParser.create(config_loader=self.context.config_loader)
        texts = []
        for override in parser.parse_overrides(given):
            text = str(override.input_line)
            if isinstance(override.value(), Glob):
                matching = list(override.sweep_string_iterator())
                if not matching:
                    raise CommandError(f"the search has no values: {text} matches nothing")
                text = f"{override.get_key_element()}=choice({','.join(matching)})"
            texts.append(text)
        return texts

    def _open(self) -> None:
        """Open the study, or begin it; `--force` begins it anew, once per command."""
        import optuna
        from sqlalchemy.exc import SQLAlchemyError

        try:
            storage = optuna.storages.get_storage(self.stock.storage)
        # No such address, no driver for it, or nobody answers.
        except (SQLAlchemyError, ImportError) as error:
            raise CommandError(
                f"hydra.sweeper.storage={self.stock.storage} is not to be opened: {error}"
            ) from error
        since = float(os.environ.get(SINCE, "inf"))
        how: dict[str, Any] = {"study_name": self.name, "storage": storage, "load_if_exists": True}
        study = optuna.create_study(**how, directions=[self.direction])
        if self.base.get("rerun") == "all" and study.user_attrs.get("forced", 0.0) < since < math.inf:
            optuna.delete_study(study_name=self.name, storage=storage)
            study = optuna.create_study(**how, directions=[self.direction])
            study.set_user_attr("forced", since)
        self.study = study
        self.stock.storage, self.stock.study_name = storage, self.name
        self.stock.direction = self.direction
        sampler: Any = OmegaConf.to_container(self.root.hydra.sweeper.sampler, resolve=True)
        if sampler.get("seed") is not None:  # the same seed again would repeat the first trials' values
            sampler["seed"] += len(study.get_trials(deepcopy=False))
        self.stock.sampler = instantiate(sampler)
        self.since = since

    def _left(self) -> int:
        """How many trials are to be begun; those of dead processes, and failed ones to retry, queue first."""
        from optuna.trial import TrialState

        latest = self._latest()
        held = len(latest)
        for number, trial in latest.items():
            retry = _has_failed(trial) and self._is_to_retry(trial)
            if trial.state == TrialState.RUNNING and not self._is_alive(trial):
                self.study.tell(trial.number, state=TrialState.FAIL)
                retry = True
            if retry and not trial.params:  # it died before it had values
                self._renumber(trial.number, None)
            elif retry:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # an experiment in Optuna 2, no longer in 3
                    self.study.enqueue_trial(trial.params)
                self._renumber(self._trials()[-1].number, number)
            held -= retry or trial.state == TrialState.WAITING
        return int(self.n_trials - held)

    def _wait(self) -> bool:
        """Wait a moment for the trials that other processes run, each of which may die; False if there are none."""
        running = [
            trial for trial in self._trials() if trial.state.name == "RUNNING" and self._is_alive(trial)
        ]
        if not running:
            return False
        if not self.waiting:
            print(
                f"Waiting for {len(running)} trials that run elsewhere (Ctrl-C leaves them alone)", flush=True
            )
            self.waiting = True
        self.turn.give()
        time.sleep(sweep.SECONDS_BETWEEN_LOOKS)
        self.turn.take()
        return True

    def _is_alive(self, trial: Any) -> bool:
        return "worker" in trial.user_attrs and bool(owner(self.workers / trial.user_attrs["worker"]))

    def _is_to_retry(self, trial: Any) -> bool:
        return self.base.get("rerun") == "failed" and bool(trial.datetime_complete.timestamp() < self.since)

    def _latest(self) -> dict[int, Any]:
        """The last try under each number."""
        found = {self._number_of(trial): trial for trial in self._trials()}
        return {number: trial for number, trial in found.items() if number is not None}

    def _number_of(self, trial: Any) -> int | None:
        """Counted without the tries that took up another; None for a trial that died before it had values."""
        others = self._others()
        if trial.number in others:
            return others[trial.number]
        return int(trial.number - sum(other < trial.number for other in others))

    def _others(self) -> dict[int, int | None]:
        """The trials of the study that have another one's number, or none."""
        return {int(key): value for key, value in self.study.user_attrs.get("numbers", {}).items()}

    def _renumber(self, trial: int, number: int | None) -> None:
        numbers = self._others() | {trial: number}
        self.study.set_user_attr("numbers", {str(key): value for key, value in numbers.items()})

    def _chosen(self, config: DictConfig, trial: Any) -> None:
        """The plugin's hook after the values of a trial are chosen."""
        if self.extend:
            self.extend(config, trial)
        trial.set_user_attr("worker", self.worker)
        if not self.trials:
            self.stock.job_idx = self._number_of(trial)
        self.trials.append(trial)

    def _batch(self, arguments: list[str]) -> None:
        sampler, self.have_run = self.stock.sampler, False
        try:
            self.stock.sweep(list(arguments))
        except ValueError as error:
            if not self.trials:
                raise CommandError(f"no trial can be chosen: {error}") from error
            if not self.have_run or self._values():
                raise  # else no trial has finished yet, so the sweeper finds no best one
        finally:
            self.stock.sampler = sampler

    def _trials(self) -> list[Any]:
        return cast("list[Any]", self.study.get_trials(deepcopy=False))

    def _values(self) -> list[float]:
        return [trial.value for trial in self._trials() if trial.state.name == "COMPLETE"]

    def _worst(self) -> float | None:
        values = self._values()
        return (min if self.direction == "maximize" else max)(values) if values else None

    def _conclude(self) -> None:
        """Say which trial was best. Raises JobFailed if one has failed."""
        if self._values():
            best = self.study.best_trial
            chosen = " ".join(f"{key}={value}" for key, value in best.params.items())
            print(f"Best {self.base.monitor.metric} {best.value:.4g} with {chosen}", flush=True)
        failed = [number + 1 for number, trial in self._latest().items() if _has_failed(trial)]
        if failed:
            raise JobFailed(f"{len(failed)} trials have failed")


def _has_failed(trial: Any) -> bool:
    return trial.state.name == "FAIL" and not trial.user_attrs.get("diverged")


class Turn:
    """One process at a time chooses trials (where the file system has locks)."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Turn:
        self.file: IO[str] = self.path.open("a")
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def take(self) -> None:
        with contextlib.suppress(OSError):
            fcntl.flock(self.file, fcntl.LOCK_EX)

    def give(self) -> None:
        with contextlib.suppress(OSError):
            fcntl.flock(self.file, fcntl.LOCK_UN)


def at_a_time(launcher: Any) -> int:
    """How many trials to choose at once for `n_jobs: 0`: as many as `hydra/launcher=parallel` runs, else one."""
    from bnlight.run.launch.parallel import Parallel

    if not isinstance(launcher, Parallel):
        return 1
    import joblib

    return launcher._at_a_time(joblib.effective_n_jobs)


def installed() -> bool:
    """Whether Hydra's Optuna sweeper is there."""
    try:
        return importlib.util.find_spec(PLUGIN) is not None
    except ModuleNotFoundError:
        return False
