"""Numbers a run's history implies: best validation values, time to a target, speed, train-eval gap, roughness."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from bnlight.compare.axes import NULL

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
_ACCUMULATE = "trainer.accumulate_grad_batches"
_NEEDED = ("step", "epoch", "time", "train/loss", "val/loss")
_ACCURACIES = ("val/accuracy", "val_accuracy", "val/acc", "val_acc")
TARGET = 0.9
_SECONDS, _NORM_GAP = "train/seconds_per_step", "norm/max_train_eval_gap"


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
        values = (
            [value for value in configs[key].dropna().unique() if value != NULL] if key in configs else []
        )
        return values[0] if len(values) == 1 else None

    metric, mode = only("monitor.metric"), only("monitor.mode")
    return Monitor(str(metric), str(mode)) if metric and mode else Monitor()


def quantity(metric: str) -> str:
    """What a metric measures, whatever it is measured on: `best_val/mae` and `test_mae` are both `mae`."""
    return re.sub(r"^(best_)?(validation|valid|val|test|train)[/_.]", "", metric)


def derive(
    runs: pd.DataFrame,
    history: pd.DataFrame,
    configs: pd.DataFrame,
    target: float | None = None,
    monitor: Monitor = Monitor(),
) -> pd.DataFrame:
    """Add the derived columns to a copy of `runs`; what a run's history does not give is missing.

    - `best_val/<name>`: the best value of each `val/` metric: the lowest loss, the highest accuracy; likewise of
      what the jobs monitor;
    - `steps_to_target`: the first step at which `target_metric` is as good as `target` (None: 0.9) or better;
    - `seconds_to_target`: the seconds of training until then, see `training_seconds`;
    - `seconds_per_step`: the median over epochs of `train/seconds_per_step`, the time of one batch. The first epoch
      carries the start (compiling, filling caches), so it is left out where there are others;
    - `samples_per_second`: `batch_size * world_size / seconds_per_step`;
    - `train_eval_gap`: the last `val/loss` minus the mean `train/loss` since the validation before it. A training
      loss is taken in training mode (batch statistics, dropout) while the weights move, so this is more than
      overfitting, and may be negative;
    - `norm_gap`: the last `norm/max_train_eval_gap`, how far some layer's output is from that in training mode;
    - `roughness`: see `roughness`;
    - `peak_memory`: bytes, as the job has measured them.

    `configs` tells how many batches a step has (`trainer.accumulate_grad_batches`), by default one.
    """
    derived = runs.copy()
    names = {name for frame in (runs, history) for name in map(str, frame.columns) if name.startswith("val/")}
    names |= {monitor.metric} & {*runs.columns, *history.columns}
    aim = target_metric(history, monitor, asked=target is not None)
    seen = _finite(history, runs.index, names | ({aim} if aim else set()))
    by_job = _by_job(seen)
    for name in sorted(names):
        best = runs[name].copy() if name in runs else pd.Series(np.nan, index=runs.index)
        if name in history:
            found = by_job[name].min() if monitor.lower(name) else by_job[name].max()
            best = found.reindex(runs.index).fillna(best)
        derived[f"best_{name}"] = best
    seen["seconds"] = training_seconds(seen, _batches_per_step(runs, configs))
    there = seen[aim] if aim else pd.Series(np.nan, index=seen.index)
    goal = TARGET if target is None else target
    hit = there <= goal if aim and monitor.lower(aim) else there >= goal
    first = seen[hit].drop_duplicates("directory").set_index("directory")
    measured = {
        "steps_to_target": first["step"],
        "seconds_to_target": first["seconds"],
        "seconds_per_step": _seconds_per_step(seen),
        "train_eval_gap": _train_eval_gap(seen),
        "norm_gap": by_job[_NORM_GAP].last(),
        "roughness": roughness(seen),
    }
    for name, values in measured.items():
        derived[name] = values.reindex(runs.index)
    rate = runs["batch_size"] * runs["world_size"] / derived["seconds_per_step"]
    derived["samples_per_second"] = rate.replace(np.inf, np.nan)
    memory = runs["peak_memory"] if "peak_memory" in runs else pd.Series(np.nan, index=runs.index)
    derived["peak_memory"] = pd.to_numeric(memory, errors="coerce")
    return derived


def target_metric(history: pd.DataFrame, monitor: Monitor, asked: bool) -> str | None:
    """What a target is held against: what the jobs monitor, else a validation accuracy; None where neither was logged.

    A target that nobody `asked` for is a share, and so is held against an accuracy alone.
    """
    names = _ACCURACIES if not asked and monitor.metric not in _ACCURACIES else (monitor.metric, *_ACCURACIES)
    return next((name for name in names if name in history and history[name].notna().any()), None)


def training_seconds(history: pd.DataFrame, batches: pd.Series | None = None) -> pd.Series:
    """Of each row of the history, the seconds of training until then: validation and pauses are left out.

    The sum over the steps so far of `train/seconds_per_step` (of the epoch that they are in) times `batches` per
    step; a step that an interrupted attempt has done as well counts once. Where a run has no such metric, a step
    takes the median of elapsed `time` over steps between rows, which a pause does not move.
    """
    by_job = _by_job(history)
    steps = by_job["step"].diff()
    measured = _by_job(history, by_job[_SECONDS].bfill()).ffill()
    if batches is not None:
        measured = measured * history["directory"].map(batches).astype(float)
    elapsed = (by_job["time"].diff() / steps).where(steps > 0)
    per_step = measured.fillna(_by_job(history, elapsed).transform("median"))
    seconds: pd.Series = _by_job(history, steps.fillna(history["step"]) * per_step).cumsum()
    return seconds


def roughness(history: pd.DataFrame) -> pd.Series:
    """Of each run, how jagged its training loss is: the standard deviation of the increments of `log(train/loss)`.

    The increments are those between logged values; losses that are not positive are left out. A loss that falls
    exponentially is not rough (0), whatever its scale and rate; 0.1 is a jump of about 10 % from one logged value
    to the next. Runs compare if they log equally often at one batch size. Differencing takes the trend out, as in
    the dispersion across time of Chan et al. (Measuring the Reliability of Reinforcement Learning Algorithms, ICLR
    2020); the standard deviation, unlike their interquartile range, also sees the rare spike.
    """
    positive = history[history["train/loss"] > 0]
    increments = _by_job(positive, np.log(positive["train/loss"])).diff()
    deviation: pd.Series = _by_job(positive, increments).std()
    return deviation


def _finite(history: pd.DataFrame, jobs: pd.Index, names: Collection[str]) -> pd.DataFrame:
    """The columns needed, in the order of the steps; what is not a finite number is missing."""
    columns = dict.fromkeys([*_NEEDED, _SECONDS, _NORM_GAP, *sorted(names)])
    numbers = history.reindex(columns=list(columns)).astype(float)
    numbers = numbers.where(np.isfinite(numbers))
    numbers["directory"] = pd.Categorical(history["directory"], categories=jobs)
    return numbers.sort_values(["directory", "step"], kind="stable", ignore_index=True)


def _by_job(history: pd.DataFrame, values: pd.Series | None = None) -> Any:
    """The history's rows, or values that belong to them, run by run."""
    return (history if values is None else values).groupby(history["directory"], observed=True, sort=False)


def _batches_per_step(runs: pd.DataFrame, configs: pd.DataFrame) -> pd.Series:
    if _ACCUMULATE not in configs:
        return pd.Series(1.0, index=runs.index)
    return pd.to_numeric(configs[_ACCUMULATE], errors="coerce").reindex(runs.index).fillna(1.0)


def _train_eval_gap(history: pd.DataFrame) -> pd.Series:
    validated = history["val/loss"].notna().astype(int)
    before = _by_job(history, validated).cumsum() - validated
    last = _by_job(history[before == _by_job(history, validated).transform("sum") - 1])
    gap: pd.Series = last["val/loss"].last() - last["train/loss"].mean()
    return gap


def _seconds_per_step(history: pd.DataFrame) -> pd.Series:
    timed = history.dropna(subset=[_SECONDS])
    by_epoch = timed.fillna({"epoch": 0}).groupby(["directory", "epoch"], observed=True)
    epochs = by_epoch[_SECONDS].mean().reset_index()
    by_job = _by_job(epochs)["epoch"]
    later = (epochs["epoch"] > by_job.transform("min")) | (by_job.transform("size") == 1)
    seconds: pd.Series = _by_job(epochs[later])[_SECONDS].median()
    return seconds
