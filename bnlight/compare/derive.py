"""Numbers a run's history implies: best validation values, steps to a target, seconds per step."""

from __future__ import annotations

import re

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


def derive(runs: pd.DataFrame, history: pd.DataFrame, target: float) -> pd.DataFrame:
    """Add the derived columns to a copy of `runs`.

    - `best_val/<name>`: the best value of each `val/` metric: the lowest loss, the highest accuracy;
    - `steps_to_target`: the first step with `val/accuracy >= target`, missing if there is none;
    - `seconds_per_step`: the median over epochs of `train/seconds_per_step`. The first epoch carries the
      start (compiling, filling caches), so it is left out where there are others.
    """
    derived = runs.copy()
    finite = history.replace([np.inf, -np.inf], np.nan)
    by_job = finite.groupby("directory")
    names = {name for frame in (runs, history) for name in map(str, frame.columns) if name.startswith("val/")}
    for name in sorted(names):
        best = runs[name].copy() if name in runs else pd.Series(np.nan, index=runs.index)
        if name in history:
            seen = by_job[name].min() if lower_is_better(name) else by_job[name].max()
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
