"""Builds the LightningModule of a job's config, bnlight's or the user's own, with what it takes and only that."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities.model_helpers import is_overridden

from bnlight.lightning import factory
from bnlight.lightning.build import (
    Config,
    arguments,
    call,
    complete,
    explicit,
    instantiate,
    model_config,
    refuse_needed_norm,
    takes_no_norm,
)
from bnlight.lightning.classifier import Classifier, scheduler_filled
from bnlight.lightning.replace import replace_norms
from bnlight.norm import NORMS
from bnlight.run.effect import refuse_idle_keys, typed
from bnlight.run.unused import CHOICES

log = logging.getLogger(__name__)
WANDB = "bnlight.run.tracking.logger.wandb_logger"


def build_module(config: Config, data: Any) -> pl.LightningModule:
    """The LightningModule of `config` for the data module `data`, with the chosen norm in it.

    The module's class is given those of `model`, `norm`, `optimizer`, `scheduler`, `input_shape` and
    `num_classes` that are among its arguments: as configs if it is a Classifier, which keeps them in its
    checkpoint; else as a network, a norm(channels), an optimizer(parameters) and a scheduler(optimizer).

    Raises ValueError for a choice that would have no effect, and for shapes that are needed but unknown;
    TypeError if the class is not a LightningModule of pytorch_lightning.
    """
    module = config["module"]
    taken, kind = arguments(module), _lightning_module(module)
    replacing = replacement(config)
    _refuse_without_effect(config, unused(config))
    available = {name: config[name] for name in ("optimizer", "scheduler")}
    shapes = {name: getattr(data, name) for name in ("input_shape", "num_classes") if hasattr(data, name)}
    if "input_shape" in shapes:
        shapes["input_shape"] = list(shapes["input_shape"])
    _demand_shapes(config["model"] if "model" in taken else None, module, shapes, data)
    inside = "model" in taken  # where the norm is: in the network that the module takes, or in itself
    if inside:
        available["model"] = model_config(
            config["model"], config["norm"], config["weight"], shapes, replacing
        )
    elif replacing is not None:
        refuse_needed_norm(module)
    elif "norm" not in taken:
        raise ValueError(takes_no_norm(module, config["norm"]))
    if replacing is None:
        available["norm"] = config["norm"]
    built = _built(complete(module, named_only=True, **available, **shapes), kind)
    if is_overridden("configure_model", built):
        built.configure_model()  # its layers are needed now; the Trainer will call it again, as it always may
    if not inside:
        if replacing is not None:
            replace_norms(built, **replacing)
        if config["weight"].get("_target_"):
            instantiate(config["weight"], model=built)
    return built


def build_data(config: Config) -> pl.LightningDataModule:
    """The data module of `config`; TypeError if it is none of pytorch_lightning's."""
    data = instantiate(config["data"])
    if not isinstance(data, pl.LightningDataModule):
        raise TypeError(_wrong_kind("data", config["data"]["_target_"], type(data), "LightningDataModule"))
    return data


def build_logger(config: Config, *job: Any) -> Any:
    """The logger of `config`: bnlight's own is told of the `job`, any other is what its arguments make of it."""
    given = {key: value for key, value in config.items() if key != "_partial_"}
    built = instantiate(config)(*job) if config["_target_"] == WANDB else instantiate(given)
    if not isinstance(built, Logger):
        raise TypeError(_wrong_kind("logger", config["_target_"], type(built), "loggers.Logger"))
    return built


def monitored(config: Config) -> tuple[str | None, str]:
    """The metric by which the best checkpoint is chosen (None: the last is the best), and whether max or min."""
    chosen = config.get("monitor") or {"metric": "val/accuracy", "mode": "max"}
    return chosen["metric"], chosen["mode"]


def replacement(config: Config) -> dict[str, Any] | None:
    """What `replace_norm` asks for, as the arguments of `bnlight.replace_norm`; None where it is off.

    Of the norm's config only what was typed or differs from its class's defaults counts, as conf/norm lists them
    all: what a replaced layer has itself (eps, say) is carried over everything else.
    """
    wanted = config.get("replace_norm") or False
    if wanted is False:
        return None
    given = {} if wanted is True else wanted
    options = dict(given) if isinstance(given, Mapping) else {str(given): None}
    unknown = options.keys() - {"include", "exclude", "subclasses"}
    if unknown:
        raise ValueError(
            f"replace_norm has no {', '.join(sorted(unknown))}: it is false, true, or some of include, exclude "
            "(path patterns) and subclasses (refuse, replace or skip)"
        )
    norm: Any = explicit(config["norm"], [key[5:] for key in typed(config) if key.startswith("norm.")])
    name = next((name for name, kind in NORMS.items() if norm == _plain(kind)), None)
    return {"norm": name or norm, **{key: value for key, value in options.items() if value is not None}}


def unused(config: Config) -> list[str]:
    """The groups among model, optimizer and scheduler that the module of `config` does not take."""
    taken = arguments(config["module"])
    return [name for name in CHOICES if name not in taken]


class Schedule:
    """A scheduler(optimizer) for a module of one's own: what means every step of the run is filled in when called."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.module: Any = None

    def __call__(self, optimizer: torch.optim.Optimizer) -> Any:
        return instantiate(scheduler_filled(self.config, self.module.trainer, optimizer))(optimizer)


def _plain(kind: type) -> dict[str, Any]:
    return {"_target_": f"bnlight.norm.{kind.__name__}", "_partial_": True}


def _built(module: dict[str, Any], kind: type[pl.LightningModule]) -> pl.LightningModule:
    if issubclass(kind, Classifier):
        built: pl.LightningModule = call(module)
        return built
    given: dict[str, Any] = {}
    if "model" in module:
        given["model"] = instantiate(module.pop("model"))
        if factory.current:
            factory.current.network = given["model"]
    schedule = None
    if "scheduler" in module:
        config = module.pop("scheduler")
        given["scheduler"] = schedule = Schedule(config) if config.get("_target_") else None
    built = instantiate(module, **given)
    if schedule is not None:
        schedule.module = built
    return built


def _lightning_module(module: Config) -> type[pl.LightningModule]:
    from hydra.utils import get_object

    kind = get_object(module["_target_"])
    if isinstance(kind, type) and issubclass(kind, pl.LightningModule):
        return kind
    raise TypeError(_wrong_kind("module", module["_target_"], kind, "LightningModule"))


def _wrong_kind(group: str, target: str, kind: Any, wanted: str) -> str:
    if any(base.__module__.startswith("lightning.") for base in getattr(kind, "__mro__", ())):
        return (
            f"{target} is a {wanted} of the package `lightning`; bnlight's command trains those of "
            "`pytorch_lightning`, which has the same classes under another name: write `import pytorch_lightning as "
            "pl` in place of `import lightning as L` or `lightning.pytorch`"
        )
    network = "; a network goes to model=custom model._target_=..." if group == "module" else ""
    return f"{group}._target_={target} is {kind!r}, expected a class derived from pytorch_lightning.{wanted}{network}"


def _demand_shapes(model: Config | None, module: Config, shapes: Mapping[str, Any], data: Any) -> None:
    for config in (model, module):
        taken = arguments(config) if config is not None else {}
        for name in ("input_shape", "num_classes"):
            needed = name in taken and taken[name].default is taken[name].empty
            if config is not None and needed and name not in shapes and config.get(name) is None:
                raise ValueError(
                    f"{type(data).__name__} has no {name}, but {config['_target_']} is built for it. Give the data "
                    "module the attributes input_shape (of one sample, such as (1, 28, 28)) and num_classes (an int)."
                )


def _refuse_without_effect(config: Config, groups: list[str]) -> None:
    """A choice that was typed must not be without effect: a sweep over it would compare equal jobs."""
    refuse_idle_keys(config)
    if not groups:
        return
    words = [text for key, text in typed(config).items() if key.split(".")[0] in groups]
    target = config["module"]["_target_"]
    if words:
        raise ValueError(
            f"{' '.join(words)} would have no effect: {target} takes no {' and no '.join(groups)}. Its arguments are "
            f"{', '.join(arguments(config['module'])) or 'none'}; module.name=value sets one"
        )
    log.info("%s takes no %s: those parts of the config are not used", target, ", no ".join(groups))
