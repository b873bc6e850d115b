"""What a run needs to go on exactly and Lightning's checkpoint leaves out, of each rank.

That is: the generators of random numbers, the sums of the epoch so far (`self.log(..., on_epoch=True)`, torchmetrics
of the module) and what a module says of itself by `rank_state_dict()` and `load_rank_state_dict(state)`.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric

State = dict[str, Any]


def generators(device: torch.device) -> State:
    """The states of Python's, numpy's, torch's and the device's generators, loadable with `weights_only=True`."""
    version, words, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state()
    state = {
        "python": (version, torch.tensor(words), gauss),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_generators(state: State, device: torch.device) -> None:
    """Put the generators back to where `generators` found them."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def rank_state(trainer: pl.Trainer) -> State:
    """This rank's state between two batches (see the top of the file)."""
    module: Any = trainer.lightning_module
    state: State = {
        "generators": generators(trainer.strategy.root_device),
        "metrics": {name: _sums(metric) for name, metric in _metrics(module) if metric._update_count},
        "results": {
            key: _sums(result)
            for key, result in trainer.fit_loop.epoch_loop._results.items()
            if result.is_tensor and result.meta.on_epoch and result._update_count
        },
    }
    if hasattr(module, "rank_state_dict"):
        state["module"] = module.rank_state_dict()
    wrapped = trainer.strategy.model
    if getattr(wrapped, "broadcast_buffers", True) is False:  # each rank has buffers of its own
        state["buffers"] = {name: _cpu(buffer) for name, buffer in module.named_buffers()}
    return state


def load_rank_state(trainer: pl.Trainer, state: State) -> None:
    """Put back what `rank_state` found, but for the generators and for `results` (see `add_results`)."""
    module: Any = trainer.lightning_module
    for name, metric in _metrics(module):
        if name in state["metrics"]:
            _set_sums(metric, state["metrics"][name])
    if "module" in state:
        module.load_rank_state_dict(state["module"])
    buffers = dict(module.named_buffers())
    with torch.no_grad():
        for name, value in state.get("buffers", {}).items():
            buffers[name].copy_(value)


def add_results(trainer: pl.Trainer, saved: State) -> State:
    """Add the saved sums to the epoch means that have begun anew; returns those nobody has logged again yet.

    A sum begun anew holds one batch exactly, so adding it to the saved sum rounds as in an unbroken epoch.
    """
    results = trainer.fit_loop.epoch_loop._results
    left = {}
    for key, sums in saved.items():
        if key not in results:
            left[key] = sums
            continue
        result: Any = results[key]
        for name, value in sums["states"].items():
            now = getattr(result, name)
            before = value.to(now.device)
            extreme = result.meta.is_max_reduction or result.meta.is_min_reduction
            setattr(result, name, result.meta.reduce_fx(before, now) if extreme else before + now)
        result._update_count += sums["count"]
        result._computed = None
    return left


def gathered(state: State) -> list[State]:
    """The state of every rank, by rank; all ranks call it together."""
    if not (dist.is_available() and dist.is_initialized()):
        return [state]
    states: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(states, state)
    return states


def _metrics(module: pl.LightningModule) -> list[tuple[str, Metric]]:
    return [(name, child) for name, child in module.named_modules() if isinstance(child, Metric)]


def _sums(metric: Metric) -> State:
    return {
        "states": {name: _cpu(getattr(metric, name)) for name in metric._defaults},
        "count": metric._update_count,
    }


def _set_sums(metric: Metric, sums: State) -> None:
    for name, value in sums["states"].items():
        listed = isinstance(value, list)
        setattr(metric, name, [v.to(metric.device) for v in value] if listed else value.to(metric.device))
    metric._update_count = sums["count"]
    metric._computed = None


def _cpu(value: Any) -> Any:
    if isinstance(value, list):
        return [_cpu(item) for item in value]
    return value.detach().cpu().clone() if isinstance(value, Tensor) else value
