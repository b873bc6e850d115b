"""Mean, spread and confidence interval over seeds, for every cell of a sweep."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from bnlight.compare.axes import Axes, sortable
from bnlight.compare.derive import Monitor, quantity

_PREFERRED = ("test/accuracy", "best_val/accuracy", "test/loss", "best_val/loss")


@dataclass(frozen=True)
class Estimate:
    """Mean and standard deviation (n - 1) of n values, and the half-width of the 95 % interval of the mean.

    `half_width` is `t(0.975, n - 1) * std / sqrt(n)` (Student), None below two values: one seed says nothing
    about the spread.
    """

    n: int
    mean: float
    std: float
    half_width: float | None

    @property
    def low(self) -> float:
        return self.mean - (self.half_width or 0.0)

    @property
    def high(self) -> float:
        return self.mean + (self.half_width or 0.0)

    def __str__(self) -> str:
        if self.half_width is None:
            return number(self.mean)
        digits = _decimals(self.mean)
        return f"{self.mean:.{digits}f} ± {self.half_width:.{digits}f}"


def estimate(values: Iterable[float]) -> Estimate:
    """The estimate over the finite ones among `values`."""
    finite = np.asarray([value for value in values if math.isfinite(value)], dtype=float)
    n = len(finite)
    if n == 0:
        return Estimate(0, math.nan, math.nan, None)
    if n == 1:
        return Estimate(1, float(finite[0]), math.nan, None)
    from scipy.special import stdtrit

    std = float(finite.std(ddof=1))
    return Estimate(n, float(finite.mean()), std, float(stdtrit(n - 1, 0.975)) * std / math.sqrt(n))


def number(value: float) -> str:
    """A number with about four digits; `-` for a missing one."""
    return f"{value:.{_decimals(value)}f}" if math.isfinite(value) else "-"


def _decimals(value: float) -> int:
    size = abs(value)
    if not math.isfinite(size) or size == 0 or size >= 1:
        return max(0, 4 - len(str(int(size)))) if math.isfinite(size) and size else 4
    return max(4, 2 - math.floor(math.log10(size)))


@dataclass(frozen=True)
class Cell:
    """The runs that differ in nothing but the seed.

    `states` counts the runs that are not done. `metric` and the other estimates are over the done runs.
    `steps` is the median over them of the steps to the target, a run that never got there counting as later
    than all others; None if that is the median. `reached` of them got there. `chosen` marks the cell that
    stands for its contender under its condition.
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

    @property
    def done(self) -> pd.DataFrame:
        return self.runs[self.runs["state"] == "done"]


NO_MONITOR = Monitor()


def pick_metric(runs: pd.DataFrame, monitor: Monitor = NO_MONITOR) -> str:
    """What the jobs monitor, of the test or else of validation; else test accuracy or the best that there is."""
    done = runs[runs["state"] == "done"]
    own = [monitor.test, f"best_{monitor.metric}", monitor.metric] if monitor.own else []
    named = [str(name) for name in done if "/" in str(name) or name in own]
    numeric = [name for name in named if done[name].notna().any()]
    tests = [name for name in numeric if name.startswith("test/")]
    higher = (name for name in tests if not monitor.lower(name))
    order = [*own, _PREFERRED[0], *higher, *_PREFERRED[1:], *tests, *numeric]
    return next((name for name in order if name in numeric), "test/accuracy")


def validation_metric(metric: str, runs: pd.DataFrame, monitor: Monitor = NO_MONITOR) -> str | None:
    """What a tuned setting is chosen by: the validation side of `metric`, never a test result."""
    sides = [f"best_val/{metric.rpartition('/')[2]}"]
    if monitor.own:
        same = quantity(metric) == quantity(monitor.metric)
        sides.insert(0 if same else 1, f"best_{monitor.metric}")
    names = (*sides, "best_val/accuracy", "best_val/loss")
    return next((name for name in names if name in runs and runs[name].notna().any()), None)


def make_cells(runs: pd.DataFrame, axes: Axes, metric: str, monitor: Monitor = NO_MONITOR) -> list[Cell]:
    """One cell per combination of settings, in the order of the table.

    Conditions come in their natural order, and within one the best mean of `metric` first. Of a contender's
    tuned settings, the one with the fewest diverged runs and then the best mean validation result is chosen.
    """
    validation = validation_metric(metric, runs, monitor)
    known = runs[runs.index.isin(axes.values.index)]
    settings = axes.values.loc[known.index].map(_plain)
    # Missing settings group like any other value, and 32 like 32.0.
    keys = [tuple(sortable(value) for value in row) for row in settings.itertuples(index=False)]
    members: dict[tuple[Any, ...], list[int]] = {}
    for position, key in enumerate(keys):
        members.setdefault(key, []).append(position)
    cells = []
    for positions in members.values():
        chosen = {str(key): settings[key].iloc[positions[0]] for key in settings}
        cells.append(_cell(known.iloc[positions], chosen, axes, metric, validation))
    best = {_best(group, metric, validation, monitor) for group in _contests(cells)}
    cells = [Cell(**{**vars(cell), "chosen": index in best}) for index, cell in enumerate(cells)]
    return sorted(cells, key=lambda cell: _order(cell, axes, metric, monitor))


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


def _cell(
    runs: pd.DataFrame, settings: dict[str, Any], axes: Axes, metric: str, validation: str | None
) -> Cell:
    done = runs[runs["state"] == "done"]

    def over_seeds(name: str | None) -> Estimate:
        return estimate(done.get(name, []))

    steps = done["steps_to_target"]
    median = float(steps.fillna(math.inf).median()) if len(steps) else math.inf
    return Cell(
        settings=settings,
        contender=axes.contender(settings),
        condition=axes.condition(settings),
        runs=runs,
        states={
            str(s): int(n) for s, n in runs["state"].value_counts().items() if s not in ("done", "duplicate")
        },
        metric=over_seeds(metric),
        validation=over_seeds(validation),
        best_loss=over_seeds("best_val/loss"),
        steps=median if math.isfinite(median) else None,
        reached=int(steps.notna().sum()),
        seconds=over_seeds("seconds_per_step"),
    )


def _contests(cells: list[Cell]) -> list[list[tuple[int, Cell]]]:
    """The cells of one contender under one condition: they differ in tuned settings only."""
    groups: dict[tuple[str, str], list[tuple[int, Cell]]] = {}
    for index, cell in enumerate(cells):
        groups.setdefault((cell.condition, cell.contender), []).append((index, cell))
    return list(groups.values())


def _best(group: list[tuple[int, Cell]], metric: str, validation: str | None, monitor: Monitor) -> int:
    def rank(item: tuple[int, Cell]) -> tuple[int, float]:
        cell = item[1]
        value, name = (cell.validation, validation) if validation else (cell.metric, metric)
        return cell.states.get("diverged", 0), _signed(value, monitor.lower(name))

    return min(group, key=rank)[0]


def _signed(value: Estimate, lower: bool) -> float:
    """Smaller is better; a cell without a value comes last."""
    if value.n == 0:
        return math.inf
    return value.mean if lower else -value.mean


def _order(cell: Cell, axes: Axes, metric: str, monitor: Monitor) -> tuple[Any, ...]:
    condition = [sortable(cell.settings[key]) for key in axes.conditions]
    return condition, _signed(cell.metric, monitor.lower(metric)), cell.contender, cell.seconds.mean
