"""Runs one job: a resolved config in a directory of its own, trained here or by ranks started for it."""

from __future__ import annotations

import contextlib
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

from bnlight.run import sweep
from bnlight.run.devices import devices_of, lease
from bnlight.run.identity import choices, identity
from bnlight.run.processes import RankFailed, WrongDevices, already_started, launch, processes_of, this_rank
from bnlight.run.started import WrongRanks, check_ranks, follow, go, leading, meeting
from bnlight.run.status import (
    JobBusy,
    own,
    read_json,
    this_process,
    update_status,
    write_atomic,
    write_json,
)

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


class OwnershipError(ValueError):
    """The directory of a job holds something else."""


class CommandError(ValueError):
    """The command asks for something that does not exist; the text says what does."""


def run_job(config: DictConfig) -> float | None:
    """The Hydra task: run the job of `config` unless that was done before, and return its validation score.

    Raises JobFailed after the failure was recorded in the job's directory.
    """
    hydra: Any = HydraConfig.get()
    check_command(config, hydra)
    directory = Path(hydra.runtime.output_dir)
    label = sweep.current.label(hydra.job.num) if sweep.current else ""
    resolved = resolve(config, hydra)
    if already_started() and this_rank() > 0:
        _follow(resolved, directory)
    else:
        try:
            with leading(directory), own(directory):
                _lead(resolved, directory, label)
        except JobBusy as busy:
            print(f"{label} {directory.name}: skipped, {busy}".strip(), flush=True)
            return None
        except OwnershipError as error:
            print(f"{label} {directory.name}: failed: {error}".strip(), flush=True)
            raise JobFailed(directory.name) from error
    metrics = read_json(directory / "result.json").get("metrics", {})
    score = metrics.get((resolved.get("monitor") or {}).get("metric"))
    return None if score is None else float(score)


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
    if (config.get("monitor") or {}).get("mode", "max") not in ("max", "min"):
        raise CommandError(f"monitor.mode={config.monitor.mode} is unknown; choose one of max, min")
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


def _lead(config: dict[str, Any], directory: Path, label: str) -> None:
    """Decide whether the job is to run, run it, and record how it ended."""
    title = f"{label} {directory.name}".strip()
    status = _expect_same_job(config, directory)
    state = status.get("state")
    if state in FINISHED and config["rerun"] != "all":
        print(f"{title}: {state} before, skipped", flush=True)
        return
    if state == "failed" and config["rerun"] is None:
        reason = (status.get("error") or "for an unknown reason").splitlines()[0]
        print(f"{title}: failed before ({reason}); --retry-failed runs it again", flush=True)
        raise JobFailed(directory.name)
    if config["rerun"] == "all":
        status = _wipe(directory)
    write_atomic(directory / "config.yaml", yaml.safe_dump(config, sort_keys=False))
    status |= {
        "state": "running",
        "attempt": status.get("attempt", 0) + 1,
        "wandb_id": status.get("wandb_id") or secrets.token_hex(4),
        "error": None,
        "traceback": None,
        **this_process(),
    }
    write_json(directory / "status.json", status)
    if state not in (None, *FINISHED):
        print(f"{title}: {state} before, continued", flush=True)
    begun = time.perf_counter()
    try:
        _train(config, directory, label)
    except KeyboardInterrupt:
        update_status(directory, state="interrupted")
        raise
    except BaseException as error:
        what, trace = _described(error)
        update_status(directory, state="failed", error=what, traceback=trace)
        _append(directory / "job.log", trace)
        print(f"{title}: failed: {what}\n    see {directory / 'job.log'}", flush=True)
        if not isinstance(error, Exception):
            raise
        raise JobFailed(directory.name) from None
    diverged = read_json(directory / "result.json").get("diverged")
    update_status(directory, state="diverged" if diverged else "done", error=diverged)
    seconds = time.perf_counter() - begun
    if sweep.current is not None:
        sweep.current.seconds.append(seconds)
    ended = f"diverged ({diverged}) after" if diverged else "done in"
    print(f"{title}: {ended} {sweep.duration(seconds)}{_scores(directory, config)}", flush=True)


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

    with isolated(), log_to(directory / "job.log", rank=this_rank()):
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
