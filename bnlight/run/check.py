"""What is wrong with a command, and not with a job: refused before any directory is touched."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf

from bnlight.lightning.stop import seconds
from bnlight.run.groups import wrong_group
from bnlight.run.identity import known_keys, typed
from bnlight.run.prune import KEEP
from bnlight.run.ranks.processes import WrongDevices, already_started, processes_of
from bnlight.run.ranks.started import WrongRanks, check_ranks
from bnlight.run.trainer import wrong_trainer

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


def list_choices(wanted: str, known: set[str]) -> str:
    """The keys that there are, the one that was meant first."""
    close = difflib.get_close_matches(wanted, known, n=1)
    hint = f"Did you mean '{close[0]}'? " if close else ""
    return f"{hint}Keys: {', '.join(sorted(known))}."


def check_config(config: DictConfig, given: list[str], hydra: Any = None) -> None:
    """Refuse a part of the config that nothing reads, or that nothing can be built from; `given` are the overrides."""
    absent = [key for key in NEEDED if key not in config]
    if absent:
        raise CommandError(f"the config has no {', '.join(absent)}; a job needs {', '.join(NEEDED)}")
    parts = [OmegaConf.to_container(config, resolve=False)]
    if hydra is not None:  # its help speaks of keys that there are not
        parts += [OmegaConf.to_container(hydra[key], resolve=False) for key in ("run", "sweep", "job")]
    used = " ".join(_interpolations(parts))
    for key in {str(key) for key in config} - known_keys() - {"hydra"}:
        if not re.search(rf"(?<!\w){re.escape(key)}(?!\w)", used):
            adds = next((text for text in given if re.match(rf"\+*{re.escape(key)}(?!\w)", text)), None)
            what = f"'{adds}' adds a key" if adds else f"the config has a key '{key}'"
            raise CommandError(f"{what} that nothing reads.{_meant(key, config, hydra)}")
    if wrong := wrong_group(config):
        raise CommandError(wrong)


def _interpolations(value: Any) -> Iterator[str]:
    """What is inside the `${...}` of a container's texts."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _interpolations(item)
    elif isinstance(value, str):
        yield from re.findall(r"\$\{.*\}", value)


def _meant(key: str, config: DictConfig, hydra: Any) -> str:
    group = key in hydra.runtime.choices if hydra is not None else isinstance(config[key], DictConfig)
    if group:
        return f" An experiment's file begins with '# @package _global_', so that what it holds is not below '{key}'."
    return (
        f"\n{list_choices(key, set(known_keys()))}\nOne of your own has to be used, as by model.width='${{{key}}}'. "
        f"For a folder {key}/ of your config files, name the folder it is in: --config-dir=FOLDER"
    )


def check_command(config: DictConfig, hydra: Any) -> None:
    """Refuse, before any directory is touched, what is wrong with the command and not with the job."""
    check_config(config, typed(hydra), hydra)
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
    if refused := _wrong_nesterov(config.optimizer):
        raise CommandError(refused)
    if config.get("fail_fast", False) not in (True, False):
        raise CommandError(f"fail_fast={config.fail_fast}: expected true or false")
    for key in ("time_limit", "stall_limit", "checkpoint_every"):
        try:
            seconds(config.get(key), key)
        except ValueError as error:
            raise CommandError(str(error)) from None
    launchers = [override for override in hydra.overrides.hydra if override.startswith("hydra/launcher=")]
    asked = [override for override in launchers if override != "hydra/launcher=basic"]
    if asked and hydra.mode.name != "MULTIRUN":  # a config of one's own may name the launcher of all sweeps
        raise CommandError(f"{asked[-1]} is for the jobs of a sweep, and this is a single job: add -m")
    from bnlight.run import sweep  # here, as it lists jobs, which are checked here

    inside = sweep.current is not None and sweep.current.inside_job
    if already_started() and hydra.mode.name == "MULTIRUN" and not inside:
        raise CommandError(
            "A sweep starts the ranks of each of its jobs itself: run it without torchrun or srun (one process), "
            "with trainer=ddp and trainer.devices=... for several ranks per job"
        )
    trainer = OmegaConf.to_container(config.trainer, resolve=True)
    assert isinstance(trainer, dict)
    plain = {str(key): value for key, value in trainer.items()}
    if wrong := wrong_trainer(plain, OmegaConf.select(config, "monitor.metric")):
        raise CommandError(wrong)
    try:
        check_ranks(plain, processes_of(plain))
    except (WrongDevices, WrongRanks) as error:
        raise CommandError(str(error)) from None


def _wrong_nesterov(optimizer: DictConfig) -> str:
    """What torch's SGD says of its arguments, in the words of the command; empty if nothing is wrong."""
    if optimizer.get("_target_") not in ("torch.optim.SGD", "torch.optim.sgd.SGD") or not optimizer.get(
        "nesterov"
    ):
        return ""
    momentum, dampening = optimizer.get("momentum") or 0, optimizer.get("dampening") or 0
    if momentum > 0 and dampening == 0:
        return ""
    return (
        f"optimizer.nesterov=true with momentum={momentum} and dampening={dampening}: Nesterov's step needs a momentum "
        "above 0 and no dampening. Without optimizer.nesterov=true it is true where there is a momentum"
    )
