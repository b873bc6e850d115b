"""Whether what a job was told to be has reached what was built: else equal jobs would be compared."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pytorch_lightning as pl

from bnlight.lightning.build import Config, arguments
from bnlight.lightning.factory import Record
from bnlight.norm.batch import BatchStatistics
from bnlight.run.unused import typed_keys
from bnlight.surgery.synchronized import Synchronized


def typed(config: Config) -> dict[str, str]:
    """The keys that the command or the sweep has set for this job, and the words for each."""
    return typed_keys(config.get("job", {}).get("overrides", []))


def refuse_idle_keys(config: Config) -> None:
    """Raise ValueError for a key that was set, and that nothing would read, as far as the config alone can tell."""
    for key, text in typed(config).items():
        group, _, name = key.partition(".")
        section: Any = config.get(group) or {}
        if group in ("weight", "sync", "scheduler") and name and not section.get("_target_"):
            raise ValueError(
                f"{text} would have no effect: there is no {group} in this job. Choose one ({group}=...), or leave the "
                "key out"
            )
        if key == "monitor.mode" and section.get("metric") is None:
            raise ValueError(f"{text} would have no effect: monitor.metric is null, so nothing is monitored")


class Effect(pl.Callback):
    """Raises ValueError before the first step if a choice of the job has not reached what is trained.

    By then the network, the optimizers and the schedulers are there, also those that are built late (`setup`,
    `configure_model`). The norm must have been used; the rest only where somebody has set it.
    """

    def __init__(self, config: Config, record: Record) -> None:
        self.config, self.record = config, record
        self.typed = typed(config)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._network(pl_module)
        self._norm(pl_module)
        self._training("optimizer", trainer.optimizers)
        self._training("scheduler", [each.scheduler for each in trainer.lr_scheduler_configs])
        self._sync(trainer, pl_module)

    def _network(self, module: pl.LightningModule) -> None:
        """A module that is given a network trains it, or a copy."""
        network = self.record.network
        if network is None:
            return
        inside = set(module.modules())
        if not inside & set(network.modules()) and not any(type(each) is type(network) for each in inside):
            raise ValueError(
                f"{self.config['module']['_target_']} takes `model`, but nothing of the network that it is given "
                f"({self.config['model']['_target_']}) is in it, nor any norm of that: assign it (self.model = model), "
                "or take `model` out of its arguments"
            )

    def _norm(self, module: pl.LightningModule) -> None:
        config = self.config["norm"]
        if self.config.get("replace_norm") or not config.get("_partial_"):
            return  # what is replaced has been reported, or was an error
        taker = self.config["model" if "model" in arguments(self.config["module"]) else "module"]["_target_"]
        called, reached = self._of(config)
        if called is None:  # somebody else has built it
            called, reached = any(_is_a(each, config) for each in module.modules()), {*config}
        if not called:
            raise ValueError(
                f"{taker} takes `norm` and has not used it, so the chosen norm ({config['_target_']}) has no effect: "
                "jobs with different norms would be equal. Call norm(channels) wherever it normalizes; or, if it "
                "chooses its norms itself, take `norm` out of its arguments and say replace_norm=true"
            )
        self._refuse_keys("norm", reached, f"{taker} always calls norm(...) with its own value")

    def _training(self, group: str, built: Iterable[Any]) -> None:
        """The optimizer, or the scheduler."""
        config = self.config[group]
        words = [text for key, text in self.typed.items() if key.split(".")[0] == group]
        if not words or not config.get("_target_"):
            return
        called, reached = self._of(config)
        if called is None:  # somebody else has built it, or nobody
            kept = [_settings(each) for each in built if _is_a(each, config)]
            reached = {key for key in config if any(each.get(key) == config[key] for each in kept)}
            called = bool(kept)
        owner = self.config["module"]["_target_"]
        if not called:
            others = ", ".join(type(each).__name__ for each in built) or f"no {group}"
            raise ValueError(
                f"{' '.join(words)} would have no effect: {owner} takes `{group}`, but trains with {others} of its own "
                f"(configure_optimizers). Use what it is given there; or leave the {group} out of the command and set "
                "arguments of the module (module.name=value)"
            )
        self._refuse_keys(group, reached, f"{owner} always gives its {group} a value of its own")

    def _sync(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if not self.config["sync"].get("_target_") or "sync" not in {key.split(".")[0] for key in self.typed}:
            return
        for layer in module.modules():
            if isinstance(layer, BatchStatistics | Synchronized) and layer.process_group is not None:
                return
        why = (
            "there is one process: trainer=ddp trainer.devices=2 has two"
            if trainer.world_size == 1
            else f"no layer takes statistics over a batch (norm={self.config['job']['choices'].get('norm')})"
        )
        words = " ".join(text for key, text in self.typed.items() if key.split(".")[0] == "sync")
        raise ValueError(f"{words} would have no effect: {why}. Leave it out of this job")

    def _of(self, config: Config) -> tuple[bool | None, set[str]]:
        """Whether the factory of that config was called (None: there is none), and which of its keys count."""
        made = [each for target, each in self.record.factories if target == config["_target_"]]
        called = any(each.called for each in made) if made else None
        return called, {key for each in made for key in each.reached}

    def _refuse_keys(self, group: str, reached: set[str], why: str) -> None:
        for key, text in self.typed.items():
            top, _, name = key.partition(".")
            name = name.split(".")[0]
            known = name in self.config[group] and not name.startswith("_")
            if top == group and known and name not in reached:
                raise ValueError(f"{text} would have no effect: {why}. Leave the key out, or the value there")


def _is_a(made: Any, config: Config) -> bool:
    from hydra.utils import get_object

    kind = get_object(config["_target_"])
    return isinstance(kind, type) and isinstance(made, kind)


def _settings(made: Any) -> Mapping[str, Any]:
    """What an optimizer was made with, or what a scheduler has for attributes."""
    defaults: Mapping[str, Any] = getattr(made, "defaults", None) or vars(made)
    return defaults
