"""Whether a job is to run now: whose directory it is, what was done before, and what this command asks."""

from __future__ import annotations

import secrets
import shutil
import time
from pathlib import Path
from typing import Any

import yaml

from bnlight.run.outcome import record
from bnlight.run.status import read_json, this_process, write_atomic, write_json
from bnlight.run.survive.command import note, of_this_command, this_command, told
from bnlight.run.tracking.agent import run_id

FINISHED = ("done", "diverged")
LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # in C, where PyYAML was built with it
DUMPER: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


class JobFailed(RuntimeError):
    """A job failed; its directory holds the traceback."""


class FailFast(BaseException):
    """A job failed, and `fail_fast=true` ends the sweep with it; Hydra would go on after an Exception."""


class OwnershipError(ValueError):
    """The directory of a job holds something else."""


def expect_same_job(config: dict[str, Any], directory: Path) -> dict[str, Any]:
    """The job's status; raises OwnershipError if the directory belongs to another config or cannot be read."""
    path = directory / "config.yaml"
    if path.exists():
        owner = (yaml.load(path.read_text(encoding="utf-8"), LOADER) or {}).get("job", {}).get("identity")
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


def rerun_of(config: dict[str, Any], status: dict[str, Any]) -> str | None:
    """What `rerun` asks of this job: nothing any more if this command has run it already."""
    asked: str | None = config["rerun"]
    return None if of_this_command(status) else asked


def is_settled(status: dict[str, Any], title: str, directory: Path, config: dict[str, Any]) -> bool:
    """Whether nothing is left to do for the job; says so once per command. Raises JobFailed if it has failed."""
    state, quiet, rerun = status.get("state"), told(directory), rerun_of(config, status)
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


def begin(
    config: dict[str, Any], directory: Path, status: dict[str, Any], last_alive: float | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write down that an attempt of the job begins here; its config, and its status as it is now.

    `last_alive`: when the last owner was (unix time).
    """
    state, rerun = status.get("state"), rerun_of(config, status)
    if rerun == "all":
        status = _wipe(directory)
    config = config | {"rerun": rerun}
    killed = state == "interrupted" and status.get("started")  # so it could not say for how long it ran
    if killed and last_alive:
        status["seconds"] = status.get("seconds", 0.0) + max(0.0, last_alive - status["started"])
    write_config(directory, config)
    status |= {
        "state": "running",
        "attempt": status.get("attempt", 0) + 1,
        "wandb_id": run_id() or status.get("wandb_id") or secrets.token_hex(4),
        "seconds": 0.0 if state == "failed" else status.get("seconds", 0.0),
        "started": time.time(),
        "command": this_command(),
        "monitor": (config.get("monitor") or {}).get("metric"),
        "error": None,
        "traceback": None,
        **this_process(),
    }
    write_json(directory / "status.json", status)
    note("begun", directory)
    return config, status


def write_config(directory: Path, config: dict[str, Any]) -> None:
    """Write the job's `config.yaml`."""
    write_atomic(directory / "config.yaml", yaml.dump(config, Dumper=DUMPER, sort_keys=False))


def _wipe(directory: Path) -> dict[str, Any]:
    """Remove what earlier attempts have left; a job that is killed meanwhile is one to begin anew."""
    record(directory, state="interrupted", wandb_id=None)
    (directory / "checkpoints" / "last.ckpt").unlink(missing_ok=True)
    for name in ("checkpoints", "wandb"):
        shutil.rmtree(directory / name, ignore_errors=True)
    for name in ("result.json", "metrics.csv", "job.log", "status.json"):
        (directory / name).unlink(missing_ok=True)
    return {}
