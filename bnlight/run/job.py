"""Runs one job: a resolved config in a directory of its own, trained here or by ranks started for it."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from bnlight.lightning.stop import Stopped
from bnlight.run import sweep
from bnlight.run.check import CommandError as CommandError
from bnlight.run.check import check_command as check_command
from bnlight.run.claim import FINISHED as FINISHED
from bnlight.run.claim import FailFast as FailFast
from bnlight.run.claim import JobFailed as JobFailed
from bnlight.run.claim import OwnershipError, begin, expect_same_job, is_settled
from bnlight.run.groups import without_null
from bnlight.run.identity import choices, identity, typed
from bnlight.run.outcome import record, record_failure, scores
from bnlight.run.prune import remove, superfluous
from bnlight.run.ranks.agree import agree
from bnlight.run.ranks.devices import devices_of, lease
from bnlight.run.ranks.processes import already_started, launch, processes_of, this_rank
from bnlight.run.ranks.started import WrongRanks
from bnlight.run.ranks.talk import follow, go, leading, meet, together
from bnlight.run.reached import reach
from bnlight.run.status import JobBusy, own, read_json, update_status
from bnlight.run.survive.command import note
from bnlight.run.unused import filed, likely


def run_job(config: DictConfig) -> float | None:
    """The Hydra task: run the job of `config` unless that was done before, and return its validation score.

    NaN if it has diverged or the score is not finite, None if it has no score or runs elsewhere. Raises JobFailed
    after the failure was recorded in the job's directory.
    """
    hydra: Any = HydraConfig.get()
    directory = Path(hydra.runtime.output_dir)
    label = sweep.current.label(hydra.job.num) if sweep.current else ""
    try:
        check_command(config, hydra)
        resolved = resolve(config, hydra)
        agree(resolved, directory.parent)
    except (CommandError, WrongRanks) as error:
        with contextlib.suppress(OSError):
            directory.rmdir()  # Hydra has made it
        raise CommandError(str(error)) from None
    if sweep.current is not None and this_rank() == 0:
        reach(sweep.current.directory, sweep.current.key, directory.name)
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
    metrics, metric = result.get("metrics", {}), (resolved.get("monitor") or {}).get("metric")
    if metric not in metrics:
        return None
    return math.nan if metrics[metric] is None else float(metrics[metric])  # null: it was not finite


def _led(config: dict[str, Any], directory: Path, label: str) -> bool:
    """Lead the job; False if another process runs it now."""
    title = f"{label} {directory.name}".strip()
    try:
        with leading(directory):
            if not is_settled(expect_same_job(config, directory), title, directory, config):
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
    without_null(resolved)
    name = Path(hydra.runtime.output_dir).name
    sweep_name = Path(hydra.sweep.dir).name if hydra.mode.name == "MULTIRUN" else hydra.job.config_name
    resolved["job"] = {
        "name": name,
        "sweep": sweep_name,
        "identity": identity(config),
        "choices": choices(config, hydra),
        "overrides": typed(hydra),
    }
    module = resolved["module"].get("_target_")
    resolved["job"] = filed(resolved["job"], likely(module, typed(hydra)))
    return {str(key): value for key, value in resolved.items()}


def _lead(config: dict[str, Any], directory: Path, label: str, last_alive: float | None) -> None:
    """Run the job unless another process was faster, and record how it ended."""
    title = f"{label} {directory.name}".strip()
    status = expect_same_job(config, directory)
    if is_settled(status, title, directory, config):
        return
    before = status.get("state")
    config, status = begin(config, directory, status, last_alive)
    if before not in (None, *FINISHED):
        print(f"{title}: {before} before, continued", flush=True)
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
        record_failure(directory, title, error, used + time.perf_counter() - begun)
        if config.get("fail_fast"):
            raise FailFast(directory.name) from None
        raise JobFailed(directory.name) from None
    finally:
        note("ended", directory)
    if sweep.current is not None:
        sweep.current.seconds.append(took)
    ended_as = f"diverged ({diverged}) after" if diverged else "done in"
    print(f"{title}: {ended_as} {sweep.duration(took)}{scores(directory, config)}", flush=True)


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
    from bnlight.run.isolation import import_targets, isolated, log_to

    def failed(what: str, trace: str) -> None:
        record(directory, state="failed", error=what, traceback=trace, ended=time.time())
        note("ended", directory)
        print(f"{label} {directory.name}: failed: {what}".strip(), flush=True)

    with log_to(directory / "job.log", rank=this_rank()), isolated(), together(directory, failed):
        os.environ.update(environment or {})
        meet(directory)
        # Here, as Lightning's import writes into the environment.
        import_targets([{"_target_": "bnlight.run.train.train"}, config])
        from bnlight.run.train import train

        train(config, directory, label)
