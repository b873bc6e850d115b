"""Numbers a run's history implies: best validation values, steps to a target, seconds per step."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

_LOWER = {
    "loss",
    "error",
    "err",
    "mse",
    "mae",
    "rmse",
    "nll",
    "perplexity",
    "ppl",
    "seconds",
    "time",
    "steps",
}


def lower_is_better(metric: str) -> bool:
    """True for losses, errors and times, told by the words of the name (`val/loss`, `seconds_per_step`)."""
    return not _LOWER.isdisjoint(re.split(r"[^a-z0-9]+", metric.lower()))


@dataclass(frozen=True)
class Monitor:
    """The metric that the jobs were told to monitor, and whether its `mode` is max or min."""

    metric: str = "val/accuracy"
    mode: str = "max"

    def lower(self, metric: str) -> bool:
        """Whether less of `metric` is better: as the jobs say for what they monitor, else by its name."""
        if self.own and quantity(metric) == quantity(self.metric):
            return self.mode == "min"
        return lower_is_better(metric)

    @property
    def own(self) -> bool:
        """Whether the jobs monitor something of their own."""
        return self != Monitor()

    @property
    def test(self) -> str:
        """The same metric of the test."""
        return re.sub(r"^val(idation|id)?(?=[/_.])", "test", self.metric)


def monitor_of(configs: pd.DataFrame) -> Monitor:
    """What the jobs monitor, where they agree."""

    def only(key: str) -> Any:
        values = list(configs[key].dropna().unique()) if key in configs else []
        return values[0] if len(values) == 1 else None

    metric, mode = only("monitor.metric"), only("monitor.mode")
    return Monitor(str(metric), str(mode)) if metric and mode else Monitor()


def quantity(metric: str) -> str:
    """What a metric measures, whatever it is measured on: `best_val/mae` and `test_mae` are both `mae`."""
    return re.sub(r"^(best_)?(validation|valid|val|test|train)[/_.]", "", metric)


def derive(
    runs: pd.DataFrame,
    history: pd.DataFrame,
    target: float,
    monitor: Monitor = Monitor(),
) -> pd.DataFrame:
    """Add the derived columns to a copy of `runs`.

    - `best_val/<name>`: the best value of each `val/` metric: the lowest loss, the highest accuracy; likewise of
      what the jobs monitor;
    - `steps_to_target`: the first step with `val/accuracy >= target`, missing if there is none;
    - `seconds_per_step`: the median over epochs of `train/seconds_per_step`. The first epoch carries the
      start (compiling, filling caches), so it is left out where there are others.
    """
    derived = runs.copy()
    finite = history.replace([np.inf, -np.inf], np.nan)
    by_job = finite.groupby("directory")
    names = {name for frame in (runs, history) for name in map(str, frame.columns) if name.startswith("val/")}
    names |= {monitor.metric} & {*runs.columns, *history.columns}
    for name in sorted(names):
        best = runs[name].copy() if name in runs else pd.Series(np.nan, index=runs.index)
        if name in history:
            seen = by_job[name].min() if monitor.lower(name) else by_job[name].max()
            best = seen.reindex(runs.index).fillna(best)
        derived[f"best_{name}"] = best
    derived["steps_to_target"] = np.nan
    if "val/accuracy" in history:
        reached = finite[finite["val/accuracy"] >= target]
        derived["steps_to_target"] = reached.groupby("directory")["step"].min().reindex(runs.index)
    derived["seconds_per_step"] = _seconds_per_step(finite).reindex(runs.index)
    return derived


def _seconds_per_step(history: pd.DataFrame) -> pd.Series:
    name = "train/seconds_per_step"
    if name not in history:
        return pd.Series(dtype=float)
    timed = history.dropna(subset=[name])
    epoch = timed["epoch"].fillna(0) if "epoch" in timed else pd.Series(0, index=timed.index)
    epochs = timed.groupby([timed["directory"], epoch.rename("epoch")])[name].mean().reset_index()
    by_job = epochs.groupby("directory")["epoch"]
    later = (epochs["epoch"] > by_job.transform("min")) | (by_job.transform("size") == 1)
    return epochs[later].groupby("directory")[name].median()
