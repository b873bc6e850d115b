"""Mean, spread and confidence intervals over seeds, and the cell of a sweep that holds them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from bnlight.compare.axes import sortable
from bnlight.compare.derive import Monitor

_PREFERRED = ("test/accuracy", "best_val/accuracy", "test/loss", "best_val/loss")
_TEST = re.compile(r"(best_)?test([/_.]|$)")
RESAMPLES = 2000
SEED = 0


@dataclass(frozen=True)
class Estimate:
    """Mean and standard deviation (n - 1) of n values, and the half-width of the 95 % interval of the mean.

    `half_width` is `t(0.975, n - 1) * std / sqrt(n)` (Student), None below two values: one seed says nothing
    about the spread. `worst` is the lowest value, or the highest where lower is better. `boot` is the 95 %
    percentile interval of the mean over 2000 bootstrap resamples (`scipy.stats.bootstrap`, seeded), None where
    it was not asked for or n < 2; with few seeds it is narrower than the t interval, which assumes normality.
    """

    n: int
    mean: float
    std: float
    half_width: float | None
    median: float = math.nan
    worst: float = math.nan
    boot: tuple[float, float] | None = None

    @property
    def low(self) -> float:
        return self.mean - (self.half_width or 0.0)

    @property
    def high(self) -> float:
        return self.mean + (self.half_width or 0.0)

    def __str__(self) -> str:
        if self.half_width is None:
            return number(self.mean)
        digits = decimals(max(abs(self.mean), self.half_width))
        return f"{self.mean:.{digits}f} ± {self.half_width:.{digits}f}"


def estimate(values: Iterable[float], lower: bool = False) -> Estimate:
    """The estimate over the finite ones among `values`, without a bootstrap; `lower`: less is better."""
    finite = _finite(values)
    n = len(finite)
    if n == 0:
        return Estimate(0, math.nan, math.nan, None)
    median, worst = float(np.median(finite)), float(finite.max() if lower else finite.min())
    if n == 1:
        return Estimate(1, float(finite[0]), math.nan, None, median, worst)
    from scipy.special import stdtrit

    std = float(finite.std(ddof=1))
    half_width = float(stdtrit(n - 1, 0.975)) * std / math.sqrt(n)
    return Estimate(n, float(finite.mean()), std, half_width, median, worst)


def estimates(samples: Sequence[Iterable[float]], lower: bool = False) -> list[Estimate]:
    """The estimate of each sample with its bootstrap: samples of the same size are resampled together.

    Each sample size starts from the same seed, so an interval does not depend on what else is estimated.
    """
    finite = [_finite(values) for values in samples]
    result = [estimate(values, lower) for values in finite]
    by_size: dict[int, list[int]] = {}
    for index, values in enumerate(finite):
        by_size.setdefault(len(values), []).append(index)
    for size, members in by_size.items():
        if size < 2:
            continue
        for low in range(0, len(members), 100):  # bounds the memory: 100 x 2000 x size numbers
            part = members[low : low + 100]
            lows, highs = _bootstrap(np.stack([finite[index] for index in part]))
            for index, bounds in zip(part, zip(lows, highs, strict=True), strict=True):
                result[index] = replace(result[index], boot=(float(bounds[0]), float(bounds[1])))
    return result


def _bootstrap(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    from scipy.stats import bootstrap

    interval = bootstrap(
        (rows,),
        np.mean,
        axis=-1,
        vectorized=True,
        n_resamples=RESAMPLES,
        method="percentile",
        random_state=np.random.default_rng(SEED),
    ).confidence_interval
    return np.asarray(interval.low), np.asarray(interval.high)


def _finite(values: Iterable[float]) -> np.ndarray:
    array = np.asarray(values if isinstance(values, np.ndarray) else list(values), dtype=float)
    finite: np.ndarray = array[np.isfinite(array)]
    return finite


def number(value: float) -> str:
    """A number with about four digits; `-` for a missing one."""
    return f"{value:.{decimals(value)}f}" if math.isfinite(value) else "-"


def decimals(value: float) -> int:
    """After the point, so that about four digits are shown."""
    size = abs(value)
    if not math.isfinite(size) or size == 0 or size >= 1:
        return max(0, 4 - len(str(int(size)))) if math.isfinite(size) and size else 4
    return max(4, 2 - math.floor(math.log10(size)))


@dataclass(frozen=True)
class Cell:
    """The runs that differ in nothing but the seed (and in what was averaged over, if `by` left it out).

    `states` counts the runs that are not done. `metric` and the other estimates are over the seeds of the done
    runs, each seed's runs averaged first.
    `steps` is the median, over the `ended` runs that are done or diverged, of the steps to the target: one that never
    got there counts as later than all others, and if that is the median, it is None. `reached` of them got there.
    `chosen` marks the cell that stands for its contender under its condition; `chosen_on` are the seeds that the
    choice between settings rests on, None if it is all of them.
    """

    settings: dict[str, Any]
    contender: str
    condition: str
    runs: pd.DataFrame
    states: dict[str, int]
    metric: Estimate
    validation: Estimate
    best_loss: Estimate
    steps: float | None
    reached: int
    seconds: Estimate
    chosen: bool = False
    chosen_on: tuple[str, ...] | None = None

    @property
    def done(self) -> pd.DataFrame:
        return self.runs[self.runs["state"] == "done"]

    @property
    def ended(self) -> int:
        return len(self.done) + self.states.get("diverged", 0)

    @property
    def seeds(self) -> list[Any]:
        """The seeds of the done runs, in order."""
        return sorted(self.done["seed"].dropna().unique(), key=sortable)


def pick_metric(runs: pd.DataFrame, monitor: Monitor) -> str:
    """What the jobs monitor, of the test or else of validation; else test accuracy or the best that there is."""
    done = runs[runs["state"] == "done"]
    own = [monitor.test, f"best_{monitor.metric}", monitor.metric] if monitor.own else []
    named = [str(name) for name in done if "/" in str(name) or name in own]
    numeric = [name for name in named if done[name].notna().any()]
    tests = [name for name in numeric if name.startswith("test/")]
    higher = (name for name in tests if not monitor.lower(name))
    order = [*own, _PREFERRED[0], *higher, *_PREFERRED[1:], *tests, *numeric]
    return next((name for name in order if name in numeric), "test/accuracy")


def validation_metric(metric: str, runs: pd.DataFrame, monitor: Monitor) -> str | None:
    """What a tuned setting is chosen by: the validation side of `metric`, never a test result."""
    own = [f"best_{monitor.metric}"] if monitor.own else []
    names = (f"best_val/{metric.rpartition('/')[2]}", *own, "best_val/accuracy", "best_val/loss")
    fit = (name for name in names if name in runs and not _TEST.match(name))
    return next((name for name in fit if runs[name].notna().any()), None)
