"""Another norm in anybody's LightningModule, and checkpoints that say so."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_info
from torch import nn

from bnlight.lightning.build import instantiate
from bnlight.norm.paths import fitting
from bnlight.surgery import replace_norm
from bnlight.surgery.dress import Dress, dress, undress
from bnlight.surgery.replace import Subclasses
from bnlight.surgery.replace_report import Report

log = logging.getLogger(__name__)
RECORD = "bnlight_replaced_norm"  # in a checkpoint
LATER = "_bnlight_replaces_later"
M = TypeVar("M", bound=pl.LightningModule)
Norm = str | Mapping[str, Any] | Callable[..., nn.Module]


class ReplaceNorm(pl.Callback):
    """Puts another norm into the module before anything else looks at it; arguments as in `bnlight.replace_norm`.

    For modules that choose their norms themselves, with anybody's Trainer: the optimizer, the copies of an
    average of weights and the checkpoints are made of the new layers. The first in `Trainer(callbacks=[...])`.

    Each checkpoint holds what was replaced and by what, as plain data: `fit(ckpt_path=...)` and
    `test(ckpt_path=...)` with the same callback go on with it, `bnlight.load(path, Module)` builds the module
    without a Trainer. Once replaced is replaced: the next `fit` or `test` of the same module changes nothing.

    Args:
        norm: a name such as `"renorm"`, a class, a `functools.partial` of one, or a config dict (`_target_`).
        include, exclude, subclasses: as in `bnlight.replace_norm`.

    Raises ValueError if the norm cannot be written into a checkpoint (a lambda, a class inside a function), if
    there is nothing to replace, if another callback has seen the module before this one, or if a checkpoint to
    go on with was made with another replacement.
    """

    def __init__(
        self, norm: Norm, *, include: Any = None, exclude: Any = None, subclasses: Subclasses = "refuse"
    ) -> None:
        plain(norm)
        self.arguments: Any = {"norm": norm, "include": include, "exclude": exclude, "subclasses": subclasses}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if hasattr(pl_module, RECORD) or isinstance(pl_module, _Later):
            return
        earlier = trainer.callbacks[: trainer.callbacks.index(self)]  # type: ignore[attr-defined]
        seen = [type(callback).__name__ for callback in earlier if _looks_at_setup(callback)]
        if seen:
            raise ValueError(
                f"ReplaceNorm comes after {', '.join(seen)} in Trainer(callbacks=[...]), which may have copied the "
                "module with its old norms: put ReplaceNorm first"
            )
        if "configure_model" in _methods(type(pl_module)):  # its layers may not exist yet
            setattr(pl_module, LATER, self.arguments)
            dress(pl_module, _Later)
        else:
            rank_zero_info(str(replace_norms(pl_module, **self.arguments)))


def replace_norms(
    module: pl.LightningModule,
    norm: Norm,
    *,
    include: Any = None,
    exclude: Any = None,
    subclasses: Subclasses = "refuse",
) -> Report:
    """`bnlight.replace_norm` on a LightningModule whose checkpoints will say what was replaced; returns the report.

    Raises ValueError if there is nothing to replace.
    """
    report, paths = _replaced(module, factory(norm), include, exclude, subclasses)
    setattr(module, RECORD, {"norm": plain(norm), "include": paths, "subclasses": subclasses})
    dress(module, _Records)
    log.info("%s", report)
    return report


def with_norm(
    model: nn.Module, norm: Norm, include: Any = None, exclude: Any = None, subclasses: Subclasses = "refuse"
) -> nn.Module:
    """The network with its own norms replaced: what a config names in place of a class that takes no norm."""
    report, _ = _replaced(model, factory(norm), include, exclude, subclasses)
    log.info("%s", report)
    return model


def load_module(path: str | Path, kind: type[M], **arguments: Any) -> M:
    """`kind.load_from_checkpoint(path, **arguments)`, with the norms replaced that were replaced when it was saved.

    Raises TypeError if `kind` is no LightningModule's class, ValueError if the file is no Lightning checkpoint.
    """
    if not hasattr(kind, "load_from_checkpoint"):
        raise TypeError(f"load: expected the class of a LightningModule, got {kind!r}")
    saved: Any = torch.load(path, map_location="cpu", weights_only=arguments.get("weights_only"), mmap=True)
    if not (isinstance(saved, Mapping) and {"state_dict", "pytorch-lightning_version"} <= saved.keys()):
        raise ValueError(
            f"load: {path} is no checkpoint of Lightning's: it holds {type(saved).__name__}{_some_keys(saved)}; a "
            "state dict goes into a module that you have made, by module.load_state_dict(torch.load(path)), or into "
            "a training, by init_from=FILE"
        )
    record: Any = saved.get(RECORD)

    class Loading(kind):  # type: ignore[valid-type,misc]
        """Replaces the norms between the module's own constructor and the loading of its weights."""

        def configure_model(self) -> None:
            super().configure_model()
            self.__class__ = kind  # type: ignore[assignment]
            if record is not None:
                replace_norms(self, **record)
            dress(self, _Loads)

    loaded: M = Loading.load_from_checkpoint(path, **arguments)
    return loaded


def _some_keys(saved: Any) -> str:
    keys = [str(key) for key in saved][:3] if isinstance(saved, Mapping) else []
    return f" with {', '.join(keys)}, ..." if keys else ""


def plain(norm: Norm) -> str | dict[str, Any]:
    """The norm as plain data; ValueError if it has no name to be found by."""
    if isinstance(norm, str):
        return norm
    if isinstance(norm, Mapping):
        return {**norm, "_partial_": True}
    kind, options = norm, {}
    if isinstance(norm, functools.partial) and not norm.args:
        kind, options = norm.func, norm.keywords
    name = getattr(kind, "__qualname__", "<")
    simple = all(v is None or isinstance(v, bool | int | float | str) for v in options.values())
    if "<" in name or not simple:
        raise ValueError(
            f"ReplaceNorm writes its norm into checkpoints, and {norm!r} cannot be found again by name: give a name "
            "such as 'renorm', a class of a module, or functools.partial(Class, eps=...) with plain values"
        )
    return {"_target_": f"{kind.__module__}.{name}", "_partial_": True, **options}


def factory(norm: Norm) -> Any:
    """What `bnlight.replace_norm` takes: a name, or a callable."""
    made = instantiate({**norm, "_partial_": True}) if isinstance(norm, Mapping) else norm
    if not isinstance(made, functools.partial):
        return made
    return functools.partial(made.func, *made.args, **made.keywords)  # all that is in it was chosen


class _Records(Dress):
    """Writes into checkpoints which norms were replaced, and refuses those of another replacement."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[RECORD] = getattr(self, RECORD)
        super().on_save_checkpoint(checkpoint)  # type: ignore[misc]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        then, now = checkpoint.get(RECORD), getattr(self, RECORD)
        if then is not None and then != now:
            raise ValueError(
                f"the checkpoint was made with {_told(then)}, but this module has {_told(now)}: use the same "
                "ReplaceNorm(...) as then, or bnlight.load(path, Module), which reads it from the checkpoint"
            )
        super().on_load_checkpoint(checkpoint)  # type: ignore[misc]


class _Loads(Dress):
    """Takes the next state dict, whatever of the module was compiled when it was saved or is now."""

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        module: Any = self
        undress(module, _Loads)
        return module.load_state_dict(fitting(state_dict, module.state_dict()), *args, **kwargs)


class _Later(Dress):
    """Replaces the norms when the module has built its layers in `configure_model`."""

    def configure_model(self) -> None:
        super().configure_model()  # type: ignore[misc]
        if not hasattr(self, RECORD):
            rank_zero_info(str(replace_norms(self, **getattr(self, LATER))))  # type: ignore[arg-type]


def _replaced(
    model: nn.Module, norm: Any, include: Any, exclude: Any, subclasses: Subclasses
) -> tuple[Report, list[str]]:
    """The report, and the paths of what was replaced."""
    report = replace_norm(model, norm, include=include, exclude=exclude, subclasses=subclasses)
    paths = [row.path for row in report if row.new is not None or row.reason == "it is so already"]
    if not paths:
        raise ValueError(
            f"there was no norm to replace in {type(model).__name__}: the chosen norm would have no effect.\n{report}"
        )
    return report, paths


def _told(record: Mapping[str, Any]) -> str:
    norm = record["norm"]
    options = "" if isinstance(norm, str) else ", ".join(f"{k}={v}" for k, v in norm.items() if k[0] != "_")
    name = norm if isinstance(norm, str) else f"{norm['_target_']}({options})"
    paths = record["include"]
    return f"{name} in {', '.join(paths[:3])}{f' and {len(paths) - 3} more' if len(paths) > 3 else ''}"


def _methods(kind: type) -> set[str]:
    """The names of the methods that are the user's own, not those of the frameworks' base classes."""
    bases = [base for base in inspect.getmro(kind) if base.__module__.split(".")[0] not in _FRAMEWORKS]
    return {name for base in bases for name in vars(base)}


_FRAMEWORKS = ("builtins", "torch", "pytorch_lightning", "lightning", "lightning_fabric")


def _looks_at_setup(callback: Any) -> bool:
    """Whether the callback does something in `setup`; Lightning puts its tuners first, which do not copy."""
    owner = next(base for base in type(callback).__mro__ if "setup" in vars(base))
    return owner.__name__ not in ("Callback", "BatchSizeFinder", "LearningRateFinder")
