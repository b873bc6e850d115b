"""How W&B spells what a comparison speaks of: settings, metrics, runs and their filters."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from bnlight.compare.palette import hexadecimal, slots
from bnlight.compare.stats import Cell
from bnlight.run.tracking.pieces import KNOWN

if TYPE_CHECKING:
    from bnlight.compare.comparison import Comparison


def config_key(key: str) -> str:
    """Where a run's config has what an axis names: `norm` and `model` are choices, `optimizer.lr` a value."""
    if key == "norm":
        return "norm.name"
    return key if "." in key else f"job.choices.{key}"


def server_key(key: str) -> str:
    """The same as W&B's server spells it: each block of the config is the `value` of its name."""
    block, *rest = config_key(key).split(".")
    return ".".join([block, "value", *rest])


def summary_key(comparison: Comparison, metric: str) -> str:
    """The name in a run's summary of a column of the comparison; it is by `define_metric` what the name says."""
    if metric == "seconds_per_step":
        return "train/seconds_per_step"
    monitor = comparison.monitor
    kept = KNOWN | {monitor.metric: monitor.mode}
    logged = metric.removeprefix("best_")
    if metric != logged and logged != monitor.metric and logged in kept:
        return f"{logged}.{kept[logged]}"
    return f"{metric}.last" if metric in kept else metric


def filters(runs: pd.DataFrame, settings: dict[str, Any]) -> str:
    """What tells the runs of these sweeps and settings from the others of a project, in W&B's filter language."""
    sweeps = sorted({str(name) for name in runs["sweep"].dropna()})
    parts = [f"Metric('Group') in {sweeps!r}"] if sweeps else []
    for key, value in settings.items():
        if value is not None:
            plain = value.item() if hasattr(value, "item") else value  # numpy's
            parts.append(f"Config({server_key(key)!r}) == {plain!r}")
    return " and ".join(parts)


def only(cell: Cell, keys: Sequence[str]) -> dict[str, Any]:
    """The settings of a cell under some keys."""
    return {key: cell.settings[key] for key in keys}


def colours(comparison: Comparison) -> dict[str, str]:
    """The colour of each contender, as on the page."""
    found = slots(cell.contender for cell in comparison.cells)
    return {name: hexadecimal(slot) for name, slot in found.items()}


def owners(comparison: Comparison) -> dict[str, str]:
    """The contender of each run whose id is known: from its folder offline, from its address online."""
    found: dict[str, str] = {}
    for cell in comparison.cells:
        for run in cell.runs.to_dict("records"):
            ids = re.findall(r"run-\d{8}_\d{6}-(\S+)", str(run.get("wandb") or ""))
            ids += re.findall(r"/runs/([^/?#\s]+)", str(run.get("url") or ""))
            found |= dict.fromkeys(ids, cell.contender)
    return found
