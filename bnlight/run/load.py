"""A trained module again: from a checkpoint and its class, or from a job's directory alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, overload

import pytorch_lightning as pl
import torch
import yaml

from bnlight.lightning.replace import load_module
from bnlight.norm.paths import fitting
from bnlight.run.module import build_data, build_module
from bnlight.run.weights import weights_file

M = TypeVar("M", bound=pl.LightningModule)


@overload
def load(path: str | Path, kind: type[M], **arguments: Any) -> M: ...
@overload
def load(path: str | Path, kind: None = None) -> pl.LightningModule: ...


def load(path: str | Path, kind: type[M] | None = None, **arguments: Any) -> pl.LightningModule:
    """The trained LightningModule in `path`, as `load_from_checkpoint` returns it (in training mode).

    - `load("some.ckpt", Module, **arguments)` is `Module.load_from_checkpoint`, which takes the same arguments,
      for any checkpoint; where `ReplaceNorm` or a job has replaced norms, they are replaced before the weights
      are loaded.
    - `load("outputs/train/<job>")` builds the module by the job's `config.yaml` and loads `best.ckpt` (failing
      that `last.ckpt`); `load("outputs/train/<job>/checkpoints/last.ckpt")` likewise.

    Raises FileNotFoundError if there is no checkpoint, or no config beside it and no class given.
    """
    if kind is not None:
        return load_module(weights_file(path), kind, **arguments)
    if arguments:
        raise TypeError(
            f"load: {', '.join(arguments)} go with a class; a job's directory has them in its config"
        )
    file = weights_file(path)
    config = job_config(file)
    return restored(build_module(config, build_data(config)), read_checkpoint(file))


def job_config(checkpoint: Path) -> dict[str, Any]:
    """The config of the job that a checkpoint belongs to; FileNotFoundError if it belongs to none."""
    path = checkpoint.parent.parent / "config.yaml"
    config = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    if not isinstance(config, dict) or "job" not in config:
        raise FileNotFoundError(
            f"{checkpoint} is not in a job's directory (there is no job in {path}), so how its module is built is "
            "unknown: give its class, bnlight.load(path, Module)"
        )
    return config


def read_checkpoint(file: Path) -> dict[str, Any]:
    """The checkpoint, on the CPU, read as plain data and tensors only."""
    content: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    return content


def restored(module: pl.LightningModule, checkpoint: Mapping[str, Any]) -> pl.LightningModule:
    """The module with the checkpoint's weights; what was compiled then need not be so here, nor the reverse."""
    state = fitting(checkpoint["state_dict"], module.state_dict())
    module.on_load_checkpoint({**checkpoint, "state_dict": state})
    module.load_state_dict(state)
    return module
