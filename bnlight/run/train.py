"""Trains one job in this process, which is one rank of it: data, model, trainer, fit, test, result."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.utils import get_object
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from pytorch_lightning.callbacks import ModelCheckpoint, WeightAveraging
from pytorch_lightning.loggers.logger import DummyLogger
from pytorch_lightning.utilities.model_helpers import is_overridden

from bnlight.lightning.atomic import AtomicCheckpointIO
from bnlight.lightning.build import complete, instantiate
from bnlight.lightning.divergence import StopOnDivergence
from bnlight.lightning.factory import Record, recorded
from bnlight.lightning.initial import initialize
from bnlight.lightning.last import LastCheckpoint
from bnlight.lightning.stop import Stopped, seconds
from bnlight.lightning.timing import SECONDS_PER_STEP, StepTimer
from bnlight.run.claim import write_config
from bnlight.run.doctor import doctor_of_job
from bnlight.run.effect import Effect
from bnlight.run.memory import peak_memory, reset_peak_memory
from bnlight.run.metrics import MetricsFile, column
from bnlight.run.module import build_data, build_logger, build_module, monitored, unused
from bnlight.run.progress import Heartbeat, progress_display
from bnlight.run.provenance import cpu_name, git_commit, versions
from bnlight.run.ranks.devices import devices_of, leased_devices
from bnlight.run.ranks.processes import this_rank
from bnlight.run.ranks.started import cluster_environment
from bnlight.run.status import read_json, update_status, write_json
from bnlight.run.survive.watchdog import Steps, Watchdog
from bnlight.run.tracking.logger import finish_run, run_url
from bnlight.run.tracking.pieces import REASON
from bnlight.run.unused import filed
from bnlight.run.weights import weights_file

log = logging.getLogger(__name__)


def train(config: Mapping[str, Any], directory: Path, label: str = "") -> None:
    """Train and test the job of the resolved `config`, and write `result.json` on rank 0.

    The job's owner has written `status.json`; it continues from `checkpoints/last.ckpt` if there is one.
    """
    used = float(read_json(directory / "status.json").get("seconds") or 0.0)
    limits = {key: seconds(config.get(key), key) for key in ("time_limit", "stall_limit")}
    with Watchdog(directory, this_rank(), used, **limits) as watchdog, recorded() as record:
        _train(config, directory, label, watchdog, record)


def _train(
    config: Mapping[str, Any], directory: Path, label: str, watchdog: Watchdog, record: Record
) -> None:
    begun, measured = time.time(), reset_peak_memory()
    status = read_json(directory / "status.json")
    if config["threads"] is not None:
        torch.set_num_threads(config["threads"])
    pl.seed_everything(config["seed"], workers=True, verbose=False)
    data = build_data(config)
    config = _filed(config, directory)
    module = build_module(config, data)
    last = directory / "checkpoints" / "last.ckpt"
    resume = last.exists() and config["rerun"] != "all"  # with "all", rank 0 may not have removed it yet
    if config.get("init_from") and not resume:
        log.info("%s", initialize(module, weights_file(config["init_from"])))
    file = MetricsFile(directory, attempt=status.get("attempt", 1))
    loggers: list[Any] = [file]
    tracker = None
    if config["logger"].get("_target_") and this_rank() > 0:
        loggers.insert(0, DummyLogger())  # `self.logger` takes the same calls on every rank
    elif config["logger"].get("_target_"):
        used = {name: value for name, value in config.items() if name not in config["job"]["unused"]}
        tracker = build_logger(config["logger"], used, directory, status["wandb_id"])
        loggers.insert(0, tracker)  # `self.logger` of anybody's module
        if url := run_url(tracker.experiment):
            update_status(directory, wandb_url=url)
    ended, measures = "failed", dict[str, Any]()
    try:
        trainer = build_trainer(config, directory, loggers, label)
        file.listen(trainer, *loggers[:-1])
        trainer.callbacks[:0] = [Steps(watchdog), Effect(config, record)]  # type: ignore[attr-defined]
        _fit(trainer, module, data, str(last) if resume else None)
        metrics = _metrics(trainer)
        diverged = next((c.reason for c in trainer.callbacks if isinstance(c, StopOnDivergence)), None)  # type: ignore[attr-defined]
        if diverged is None:
            metrics |= _metrics_of_the_best(trainer, monitored(config)[0])
            metrics |= _test(trainer, module, data)
        if trainer.is_global_zero:
            # What was logged to the loggers alone comes after: the first is what is compared if nothing is chosen.
            metrics |= {
                name: value for name, value in file.last().items() if name not in {*metrics, SECONDS_PER_STEP}
            }
            memory = peak_memory(trainer.strategy.root_device, measured)
            took = time.time() - begun
            measures = {"world_size": trainer.world_size, "seconds": took, "peak_memory": memory}
            _write_result(directory, config, trainer, metrics, diverged, measures)
            measures[REASON] = diverged
        ended = "diverged" if diverged else "done"
    except KeyboardInterrupt as stop:
        ended = stop.state if isinstance(stop, Stopped) else "interrupted"
        raise
    finally:
        if tracker is not None:
            finish_run(tracker.experiment, ended, measures)


def _filed(config: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """The config, in which the job is known by what its module takes: now that the class can be looked at."""
    known = {**config, "job": filed(config["job"], unused(config))}
    if this_rank() == 0 and known != config:
        write_config(directory, known)
    return known


def build_trainer(
    config: Mapping[str, Any], directory: Path, loggers: list[Any], label: str = ""
) -> pl.Trainer:
    """The Trainer of the config, with the job's callbacks; what is shown and measured is bnlight's own."""
    folder = str(directory / "checkpoints")
    callbacks = [
        _callback(callback, folder, config["checkpoint_every"])
        for callback in config["callbacks"].values()
        if callback
    ]
    callbacks += [
        StepTimer(),
        Heartbeat(directory),
        *progress_display(config["progress"], label, config["job"]["name"], monitored(config)[0]),
        doctor_of_job(config, directory, label),
    ]
    given = config["trainer"].get("plugins") or []
    plugins = [
        instantiate(plugin) if isinstance(plugin, Mapping) else plugin
        for plugin in (given if isinstance(given, list) else [given])
    ]
    plugins += cluster_environment(plugins)
    if config["sync"].get("_target_"):
        plugins.append(instantiate(config["sync"]))
    trainer: pl.Trainer = instantiate(
        {"enable_model_summary": False, "num_sanity_val_steps": 0, **config["trainer"]},
        devices=leased_devices(devices_of(config["trainer"])),
        **({"plugins": plugins} if plugins else {}),
        callbacks=callbacks,
        logger=loggers,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        default_root_dir=str(directory),
        enable_progress_bar=False,
    )
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()
    return trainer


def _callback(config: Mapping[str, Any], dirpath: str, every: Any) -> pl.Callback:
    """The callback; those that write checkpoints are told where, and only bnlight's own how often."""
    kind = get_object(config["_target_"])
    available: dict[str, Any] = {}
    if isinstance(kind, type) and issubclass(kind, ModelCheckpoint):
        available = {"dirpath": dirpath}
    elif isinstance(kind, type) and issubclass(kind, LastCheckpoint):
        available = {"dirpath": dirpath, "every": every}
    callback: pl.Callback = instantiate(complete(config, **available))
    return callback


def _fit(trainer: pl.Trainer, module: pl.LightningModule, data: Any, checkpoint: str | None) -> None:
    with _stoppable(trainer):
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
    if stopped := _stopped(trainer):  # in the last step
        raise stopped


@contextlib.contextmanager
def _stoppable(trainer: pl.Trainer) -> Iterator[None]:
    """Lightning turns Ctrl-C, and so a signal that asks to stop, into an exit with 1: back again."""
    try:
        yield
    except SystemExit as left:
        if not isinstance(left.__context__, KeyboardInterrupt):
            raise
        raise _stopped(trainer) or left.__context__ from None


def _stopped(trainer: pl.Trainer) -> Stopped | None:
    last = (callback for callback in trainer.callbacks if isinstance(callback, LastCheckpoint))  # type: ignore[attr-defined]
    return next((callback.stopped for callback in last), None)


def _best(trainer: pl.Trainer) -> str:
    kept = trainer.checkpoint_callback
    return kept.best_model_path if isinstance(kept, ModelCheckpoint) else ""


def _test(trainer: pl.Trainer, module: pl.LightningModule, data: Any) -> dict[str, float]:
    """The test metrics of the best checkpoint, those of one process on any number of them.

    None where the module has no test step, or there are no test data.
    """
    if not is_overridden("test_step", module):
        return {}
    if not (is_overridden("test_dataloader", data) or is_overridden("test_dataloader", module)):
        return {}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WeightAveraging):
            # Or Lightning would load the current weights beside the averaged ones.
            callback._average_model = None
    # Lightning's sampler would repeat samples until all ranks have as many; so each rank tests by all of them.
    trainer._accelerator_connector.use_distributed_sampler = False
    with _stoppable(trainer), _in_the_last_epoch(trainer):
        trainer.test(module, datamodule=data, ckpt_path=_best(trainer) or None, verbose=False)
    return _metrics(trainer)


@contextlib.contextmanager
def _in_the_last_epoch(trainer: pl.Trainer) -> Iterator[None]:
    """Within it `current_epoch` is the epoch trained last; after the training Lightning counts one more."""
    progress: Any = trainer.fit_loop.epoch_progress.current
    trained = progress.completed
    progress.completed = max(0, trained - 1)
    try:
        yield
    finally:
        progress.completed = trained


def _metrics_of_the_best(trainer: pl.Trainer, metric: str | None) -> dict[str, float]:
    """The validation metrics of the checkpoint that is tested."""
    best = _best(trainer)
    if not best:
        return {}
    # Mapped, as the weights are not looked at.
    then = torch.load(best, map_location="cpu", weights_only=True, mmap=True).get("metrics", {})
    return {name: value for name, value in then.items() if name.startswith("val") or name == metric}


def _metrics(trainer: pl.Trainer) -> dict[str, float]:
    return {column(name): float(value) for name, value in trainer.callback_metrics.items()}


def _write_result(
    directory: Path,
    config: Mapping[str, Any],
    trainer: pl.Trainer,
    metrics: dict[str, float],
    diverged: str | None,
    measures: Mapping[str, Any],
) -> None:
    device = trainer.strategy.root_device
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    result = {
        "metrics": metrics,
        "diverged": diverged,
        **measures,
        "steps": trainer.global_step,
        "epochs": trainer.current_epoch,
        "wandb_url": read_json(directory / "status.json").get("wandb_url"),
        "identity": config["job"]["identity"],
        "config": dict(config),
        "unused": list(config["job"]["unused"]),
        "git": git_commit(),
        "versions": versions(),
        "hardware": {
            "device": device.type,
            "gpu": gpu,
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
        },
    }
    write_json(directory / "result.json", result)
