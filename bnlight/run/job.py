"""Runs one job: a resolved config in a directory of its own, trained here or by ranks started for it."""

from __future__ import annotations

import contextlib
import math
import os
import re
import secrets
import shutil
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from bnlight.lightning.stop import Stopped, seconds
from bnlight.run import sweep
from bnlight.run.identity import choices, identity
from bnlight.run.prune import KEEP, remove, superfluous
from bnlight.run.ranks.agree import agree
from bnlight.run.ranks.devices import devices_of, lease
from bnlight.run.ranks.processes import (
    RankFailed,
    WrongDevices,
    already_started,
    launch,
    processes_of,
    this_rank,
)
from bnlight.run.ranks.started import WrongRanks, check_ranks, follow, go, leading, meeting, together
from bnlight.run.status import (
    JobBusy,
    own,
    read_json,
    this_process,
    update_status,
    write_atomic,
    write_json,
)
from bnlight.run.survive.command import note, of_this_command, told
from bnlight.run.tracking.agent import run_id

FINISHED = ("done", "diverged")
NEEDED = (
    "norm",
    "model",
    "weight",
    "sync",
    "module",
    "data",
    "optimizer",
    "scheduler",
    "trainer",
    "callbacks",
    "logger",
    "seed",
)
RERUN = (None, "failed", "all")
STYLES = ("auto", "bar", "plain", "off")  # of progress


class JobFailed(RuntimeError):
    """A job failed; its directory holds the traceback."""


class FailFast(BaseException):
    """A job failed, and `fail_fast=true` ends the sweep with it; Hydra would go on after an Exception."""


class OwnershipError(ValueError):
    """The directory of a job holds something else."""


class CommandError(ValueError):
    """The command asks for something that does not exist; the text says what does."""


def run_job(config: DictConfig) -> float | None:
    """The Hydra task: run the job of `config` unless that was done before, and return its validation score.

    NaN if it has diverged, None if it has no score or runs elsewhere. Raises JobFailed after the failure was
    recorded in the job's directory.
    """
    hydra: Any = HydraConfig.get()
    check_command(config, hydra)
    directory = Path(hydra.runtime.output_dir)
    label = sweep.current.label(hydra.job.num) if sweep.current else ""
    resolved = resolve(config, hydra)
    try:
        agree(resolved, Path(hydra.runtime.output_dir).parent)
    except WrongRanks as error:
        with contextlib.suppress(OSError):
            directory.rmdir()  # Hydra has made it
        raise CommandError(str(error)) from None
    if already_started() and this_rank() > 0:
        _follow(resolved, directory)
    else:
        while not _led(resolved, directory, label):
            if sweep.current is None or sweep.current.total is not None:
                return None  # the command waits for it when the other jobs are done
            sweep.wait(directory)  # the sweeper wants the value before it chooses the next job
    result = read_json(directory / "result.json")
    if result.get("diverged"):
        return math.nan
    score = result.get("metrics", {}).get((resolved.get("monitor") or {}).get("metric"))
    return None if score is None else float(score)


def _led(config: dict[str, Any], directory: Path, label: str) -> bool:
    """Lead the job; False if another process runs it now."""
    title = f"{label} {directory.name}".strip()
    try:
        with leading(directory):
            if not _is_settled(_expect_same_job(config, directory), title, directory, config):
                with own(directory) as last_alive:
                    _lead(config, directory, label, last_alive)
    except JobBusy as busy:
        print(f"{title}: running elsewhere, skipped: {busy}", flush=True)
        note("busy", directory)
        return False
    except (OwnershipError, OSError) as error:  # OSError: not even the lock or the status can be written
        print(f"{title}: failed: {error}", flush=True)
        raise JobFailed(directory.name) from error
    return True


def resolve(config: DictConfig, hydra: Any) -> dict[str, Any]:
    """The job's plain config: everything resolved, and a `job` block that says what it is called and was asked."""
    resolved = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(resolved, dict)
    name = Path(hydra.runtime.output_dir).name
    sweep_name = Path(hydra.sweep.dir).name if hydra.mode.name == "MULTIRUN" else hydra.job.config_name
    resolved["job"] = {
        "name": name,
        "sweep": sweep_name,
        "identity": identity(config),
        "choices": choices(config, hydra),
        "overrides": list(hydra.overrides.task),
    }
    return {str(key): value for key, value in resolved.items()}


def check_command(config: DictConfig, hydra: Any) -> None:
    """Refuse, before any directory is touched, what is wrong with the command and not with the job."""
    absent = [key for key in NEEDED if key not in config]
    if absent:
        raise CommandError(f"the config has no {', '.join(absent)}; a job needs {', '.join(NEEDED)}")
    if config.rerun not in RERUN:
        raise CommandError(f"rerun={config.rerun} is unknown; choose one of null, failed, all")
    if config.progress not in STYLES:
        raise CommandError(f"progress={config.progress} is unknown; choose one of {', '.join(STYLES)}")
    if config.get("keep_checkpoints", "all") not in KEEP:
        raise CommandError(
            f"keep_checkpoints={config.keep_checkpoints} is unknown; choose one of {', '.join(KEEP)}"
        )
    if (config.get("monitor") or {}).get("mode", "max") not in ("max", "min"):
        raise CommandError(f"monitor.mode={config.monitor.mode} is unknown; choose one of max, min")
    for key in ("time_limit", "stall_limit"):
        try:
            seconds(config.get(key), key)
        except ValueError as error:
            raise CommandError(str(error)) from None
    inside = sweep.current is not None and sweep.current.inside_job
    if already_started() and hydra.mode.name == "MULTIRUN" and not inside:
        raise CommandError(
            "A sweep starts the ranks of each of its jobs itself: run it without torchrun or srun (one process), "
            "with trainer=ddp and trainer.devices=... for several ranks per job"
        )
    with contextlib.suppress(WrongDevices):  # that is the job's failure
        devices = processes_of(config.trainer)
        try:
            check_ranks(config.trainer, devices)
        except WrongRanks as error:
            raise CommandError(str(error)) from None


def _described(error: BaseException) -> tuple[str, str]:
    """What went wrong in words, and the traceback."""
    if isinstance(error, RankFailed):
        return error.what, str(error)
    what = "".join(traceback.format_exception_only(error)).strip()
    return what, "".join(traceback.format_exception(error))


def _lead(config: dict[str, Any], directory: Path, label: str, last_alive: float | None) -> None:
    """Decide whether the job is to run, run it, and record how it ended."""
    title = f"{label} {directory.name}".strip()
    status = _expect_same_job(config, directory)
    state, rerun = status.get("state"), _rerun(config, status)
    if _is_settled(status, title, directory, config):  # another process may have been faster
        return
    if rerun == "all":
        status = _wipe(directory)
    config = config | {"rerun": rerun}
    if (
        state == "interrupted" and status.get("started") and last_alive
    ):  # killed: it could not say for how long
        status["seconds"] = status.get("seconds", 0.0) + max(0.0, last_alive - status["started"])
    write_atomic(directory / "config.yaml", yaml.safe_dump(config, sort_keys=False))
    status |= {
        "state": "running",
        "attempt": status.get("attempt", 0) + 1,
        "wandb_id": run_id() or status.get("wandb_id") or secrets.token_hex(4),
        "seconds": 0.0 if state == "failed" else status.get("seconds", 0.0),
        "started": time.time(),
        "monitor": (config.get("monitor") or {}).get("metric"),
        "error": None,
        "traceback": None,
        **this_process(),
    }
    write_json(directory / "status.json", status)
    note("begun", directory)
    if state not in (None, *FINISHED):
        print(f"{title}: {state} before, continued", flush=True)
    begun, used = time.perf_counter(), status["seconds"]
    try:
        _train(config, directory, label)
        result = read_json(directory / "result.json")
        if not result:
            raise RuntimeError("the training came to an end without a result")
        diverged = result.get("diverged")
        took = time.perf_counter() - begun
        ended = {"ended": time.time(), "seconds": used + took}
        update_status(directory, state="diverged" if diverged else "done", error=diverged, **ended)
        remove(superfluous(directory, config.get("keep_checkpoints", "all")))
    except KeyboardInterrupt as stop:
        how = stop.state if isinstance(stop, Stopped) else "interrupted"
        stopped = stop.where if isinstance(stop, Stopped) else ""
        where = f" at {stopped}" if stopped else ""
        record(directory, state=how, stopped=stopped, seconds=used + time.perf_counter() - begun)
        with contextlib.suppress(OSError):  # a closed terminal; Hydra would go on with the next job
            print(f"{title}: {how}{where}", flush=True)
        if callable(previous := getattr(stop, "previous", None)):
            previous(stop.signum, None)  # type: ignore[attr-defined]  # a scheduler's tool, which asks for another turn
        raise
    except BaseException as error:
        _failed(directory, title, error, used + time.perf_counter() - begun)
        if config.get("fail_fast"):
            raise FailFast(directory.name) from None
        raise JobFailed(directory.name) from None
    finally:
        note("ended", directory)
    if sweep.current is not None:
        sweep.current.seconds.append(took)
    ended_as = f"diverged ({diverged}) after" if diverged else "done in"
    print(f"{title}: {ended_as} {sweep.duration(took)}{_scores(directory, config)}", flush=True)


def _rerun(config: dict[str, Any], status: dict[str, Any]) -> str | None:
    """What `rerun` asks of this job: nothing any more if this command has run it already."""
    asked: str | None = config["rerun"]
    return None if of_this_command(status) else asked


def _is_settled(status: dict[str, Any], title: str, directory: Path, config: dict[str, Any]) -> bool:
    """Whether nothing is left to do for the job; says so once per command. Raises JobFailed if it has failed."""
    state, quiet, rerun = status.get("state"), told(directory), _rerun(config, status)
    if state in FINISHED and rerun != "all":
        if not quiet:
            print(f"{title}: {state} before, skipped", flush=True)
            note("left", directory)
        return True
    if state == "failed" and rerun is None:
        if of_this_command(status) and config.get("fail_fast"):
            raise FailFast(directory.name)
        if not quiet:
            reason = (status.get("error") or "for an unknown reason").splitlines()[0]
            print(f"{title}: failed before ({reason}); --retry-failed runs it again", flush=True)
            note("left", directory)
        raise JobFailed(directory.name)
    return False


def _failed(directory: Path, title: str, error: BaseException, seconds: float) -> None:
    """Write down a failure; on a full disk, say at least that."""
    what, trace = _described(error)
    written = record(
        directory, state="failed", error=what, traceback=trace, seconds=seconds, ended=time.time()
    )
    with contextlib.suppress(OSError):
        _append(directory / "job.log", trace)
    see = f"see {directory / 'job.log'}" if written else "which could not be written down: the disk is full?"
    print(f"{title}: failed: {what}\n    {see}", flush=True)


def record(directory: Path, **fields: Any) -> bool:
    """Update the job's status if the disk takes it; a job that could not be recorded reads as interrupted."""
    try:
        update_status(directory, **fields)
    except OSError:
        return False
    return True


def _follow(config: dict[str, Any], directory: Path) -> None:
    """Train as one of the ranks that somebody else has started; rank 0 keeps the directory and decides."""
    if follow(directory, config["job"]["identity"]):
        _train_here(config, directory, label="")


def _train(config: dict[str, Any], directory: Path, label: str) -> None:
    trainer = config["trainer"]
    if already_started():  # whoever has started the ranks has given each its device
        go(directory, config["job"]["identity"])
        _train_here(config, directory, label)
        return
    processes = processes_of(trainer)
    title = f"{label} {directory.name}".strip()
    with lease(
        devices_of(trainer),
        str(trainer.get("accelerator", "auto")),
        share=config.get("share_devices", 1),
        say=lambda text: print(f"{title}: {text}", flush=True),
        holder=directory.name,
    ) as leased:
        if leased is not None:
            update_status(directory, devices=leased.ids)
        if processes == 1:
            _train_here(config, directory, label, leased.for_this_process() if leased else {})
        else:
            launch(directory, processes, label, leased.for_new_processes() if leased else {})


def _train_here(
    config: dict[str, Any], directory: Path, label: str, environment: Mapping[str, str] | None = None
) -> None:
    from bnlight.run.isolation import isolated, log_to

    def failed(what: str, trace: str) -> None:
        record(directory, state="failed", error=what, traceback=trace, ended=time.time())
        note("ended", directory)
        print(f"{label} {directory.name}: failed: {what}".strip(), flush=True)

    with isolated(), log_to(directory / "job.log", rank=this_rank()), together(directory, failed):
        os.environ.update(environment or {})
        os.environ.update(meeting(directory))
        from bnlight.run.train import train  # here, as Lightning's import writes into the environment

        train(config, directory, label)


def _expect_same_job(config: dict[str, Any], directory: Path) -> dict[str, Any]:
    """The job's status; raises OwnershipError if the directory belongs to another config or cannot be read."""
    path = directory / "config.yaml"
    if path.exists():
        owner = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("job", {}).get("identity")
        if owner != config["job"]["identity"]:
            raise OwnershipError(
                f"{directory} holds a job with another config (identity {str(owner)[:8]}, this one is "
                f"{config['job']['identity'][:8]}): different jobs never share a directory; let "
                "hydra.sweep.subdir and hydra.run.dir end in ${bnlight.job:}, as they do by default"
            )
    try:
        status = read_json(directory / "status.json")
    except ValueError as error:
        raise OwnershipError(str(error)) from error
    if status.get("state") == "running":  # this process holds the lock, so that owner is gone
        status["state"] = "interrupted"
    return status


def _wipe(directory: Path) -> dict[str, Any]:
    for name in ("result.json", "metrics.csv", "status.json", "job.log"):
        (directory / name).unlink(missing_ok=True)
    for name in ("checkpoints", "wandb"):
        shutil.rmtree(directory / name, ignore_errors=True)
    return {}


def _append(path: Path, text: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(text.rstrip() + "\n")


def _scores(directory: Path, config: dict[str, Any]) -> str:
    """The monitored metric, and the same of the test."""
    metrics = read_json(directory / "result.json").get("metrics", {})
    monitored = (config.get("monitor") or {}).get("metric") or ""
    names = dict.fromkeys((monitored, re.sub(r"^val(?=[/_])", "test", monitored)))
    shown = {name: metrics[name] for name in names if metrics.get(name) is not None}
    return "".join(f"  {name} {value:.4f}" for name, value in shown.items())
