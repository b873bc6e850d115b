"""Runs one job: a resolved config in a directory of its own, trained here or by ranks started for it."""

from __future__ import annotations

import secrets
import shutil
import time
import traceback
from pathlib import Path
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from bnlight.run import sweep
from bnlight.run.identity import choices, identity
from bnlight.run.processes import RankFailed, already_started, launch, processes_of, this_rank
from bnlight.run.status import (
    JobBusy,
    own,
    read_json,
    read_status,
    this_process,
    update_status,
    write_atomic,
    write_json,
)

FINISHED = ("done", "diverged")


class JobFailed(RuntimeError):
    """A job failed; its directory holds the traceback."""


def run_job(config: DictConfig) -> float | None:
    """The Hydra task: run the job of `config` unless that was done before, and return its validation score.

    Raises JobFailed after the failure was recorded in the job's directory.
    """
    hydra: Any = HydraConfig.get()
    directory = Path(hydra.runtime.output_dir)
    label = sweep.current.label(hydra.job.num) if sweep.current else ""
    resolved = resolve(config, hydra)
    if already_started() and this_rank() > 0:
        _follow(resolved, directory)
    else:
        try:
            with own(directory):
                _lead(resolved, directory, label)
        except JobBusy as busy:
            print(f"{label} {directory.name}: skipped, {busy}".strip(), flush=True)
            return None
    score = read_json(directory / "result.json").get("metrics", {}).get("val/accuracy")
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


def _lead(config: dict[str, Any], directory: Path, label: str) -> None:
    """Decide whether the job is to run, run it, and record how it ended."""
    title = f"{label} {directory.name}".strip()
    status = _expect_same_job(config, directory)
    state = status.get("state")
    if state in FINISHED and config["rerun"] != "all":
        print(f"{title}: {state} before, skipped", flush=True)
        return
    if state == "failed" and config["rerun"] is None:
        reason = str(status.get("traceback") or "").strip().rsplit("\n", 1)[-1]
        print(f"{title}: failed before ({reason}); --retry-failed runs it again", flush=True)
        raise JobFailed(directory.name)
    if config["rerun"] == "all":
        status = _wipe(directory)
    write_atomic(directory / "config.yaml", yaml.safe_dump(config, sort_keys=False))
    status |= {
        "state": "running",
        "attempt": status.get("attempt", 0) + 1,
        "wandb_id": status.get("wandb_id") or secrets.token_hex(4),
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
        trace = str(error) if isinstance(error, RankFailed) else traceback.format_exc()
        update_status(directory, state="failed", traceback=trace)
        _append(directory / "job.log", trace)
        last = trace.strip().rsplit("\n", 1)[-1]
        print(f"{title}: failed: {last}\n    see {directory / 'job.log'}", flush=True)
        if not isinstance(error, Exception):
            raise
        raise JobFailed(directory.name) from None
    update_status(directory, state="done")
    seconds = time.perf_counter() - begun
    if sweep.current is not None:
        sweep.current.seconds.append(seconds)
    print(f"{title}: done in {sweep.duration(seconds)}{_scores(directory)}", flush=True)


def _follow(config: dict[str, Any], directory: Path) -> None:
    """Train as one of the ranks that somebody else has started; rank 0 keeps the directory."""
    state = read_status(directory).get("state")
    if config["rerun"] != "all" and (state in FINISHED or (state == "failed" and config["rerun"] is None)):
        return
    _train_here(config, directory, label="")


def _train(config: dict[str, Any], directory: Path, label: str) -> None:
    trainer = config["trainer"]
    processes = processes_of(trainer)
    nodes = int(trainer.get("num_nodes") or 1)
    if already_started() or (processes == 1 and nodes == 1):
        _train_here(config, directory, label)
    elif nodes > 1:
        raise ValueError(
            f"trainer.num_nodes={nodes}, but the ranks of this job were not started on {nodes} nodes: "
            "start the same command on each with torchrun or srun"
        )
    else:
        launch(directory, processes, label)


def _train_here(config: dict[str, Any], directory: Path, label: str) -> None:
    from bnlight.run.isolation import isolated, log_to
    from bnlight.run.train import train

    with isolated(), log_to(directory / "job.log", rank=this_rank() if already_started() else 0):
        train(config, directory, label)


def _expect_same_job(config: dict[str, Any], directory: Path) -> dict[str, Any]:
    """The job's status; raises if the directory belongs to another config."""
    path = directory / "config.yaml"
    if path.exists():
        owner = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("job", {}).get("identity")
        if owner != config["job"]["identity"]:
            raise ValueError(
                f"{directory} holds a job with another config (identity {str(owner)[:8]}, this one is "
                f"{config['job']['identity'][:8]}): different jobs never share a directory; let "
                "hydra.sweep.subdir and hydra.run.dir end in ${bnlight.job:}, as they do by default"
            )
    status = read_json(directory / "status.json")
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


def _scores(directory: Path) -> str:
    metrics = read_json(directory / "result.json").get("metrics", {})
    shown = {
        name: metrics[name] for name in ("val/accuracy", "test/accuracy") if metrics.get(name) is not None
    }
    return "".join(f"  {name} {value:.4f}" for name, value in shown.items())
