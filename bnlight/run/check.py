"""What is wrong with a command, and not with a job: refused before any directory is touched."""

from __future__ import annotations

import contextlib
from typing import Any

from omegaconf import DictConfig, OmegaConf

from bnlight.lightning.stop import seconds
from bnlight.run import sweep
from bnlight.run.prune import KEEP
from bnlight.run.ranks.processes import WrongDevices, already_started, processes_of
from bnlight.run.ranks.started import WrongRanks, check_ranks

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
WHOLE = {"seed": range(2**32), "threads": range(1, 10_000), "share_devices": range(1, 10_000)}  # or null
NUMBERS = ("optimizer.lr", "optimizer.weight_decay", "trainer.max_epochs")
STYLES = ("auto", "bar", "plain", "off")  # of progress


class CommandError(ValueError):
    """The command asks for something that does not exist; the text says what does."""


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
    for key, allowed in WHOLE.items():
        value = config.get(key)
        if value is not None and (type(value) is not int or value not in allowed):
            raise CommandError(
                f"{key}={value}: expected a whole number from {allowed[0]} to {allowed[-1]}, or null"
            )
    for key in NUMBERS:
        value = OmegaConf.select(config, key)
        if isinstance(value, str):
            raise CommandError(f"{key}={value}: expected a number")
    if config.get("fail_fast", False) not in (True, False):
        raise CommandError(f"fail_fast={config.fail_fast}: expected true or false")
    for key in ("time_limit", "stall_limit", "checkpoint_every"):
        try:
            seconds(config.get(key), key)
        except ValueError as error:
            raise CommandError(str(error)) from None
    asked = [override for override in hydra.overrides.hydra if override.startswith("hydra/launcher=")]
    if asked and hydra.mode.name != "MULTIRUN":  # a config of one's own may name the launcher of all sweeps
        raise CommandError(f"{asked[-1]} is for the jobs of a sweep, and this is a single job: add -m")
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
