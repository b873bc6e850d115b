"""Group the runs of a sweep into cells, and choose the cell that each contender is judged by."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from bnlight.compare.axes import Axes, sortable
from bnlight.compare.derive import Monitor
from bnlight.compare.evidence.repeats import by_repeat
from bnlight.compare.stats import NO_MONITOR, Cell, Estimate, estimates, validation_metric


def make_cells(
    runs: pd.DataFrame,
    axes: Axes,
    metric: str,
    monitor: Monitor = NO_MONITOR,
    repeats: pd.DataFrame | None = None,
) -> list[Cell]:
    """One cell per combination of settings, in the order of the table.

    Conditions come in their natural order, and within one the best mean of `metric` first. Of a contender's
    tuned settings under one condition, that with a result, the fewest diverged runs and then the best mean
    validation result over the seeds they have in common is chosen. `repeats` is what `repeats_of` says of the runs.
    """
    if repeats is None:
        repeats = pd.DataFrame({"seed": runs["seed"], "setting": ""}, runs.index)
    validation = validation_metric(metric, runs, monitor)
    known = runs[runs.index.isin(axes.values.index)]
    settings = axes.values.loc[known.index].map(_plain)
    # Missing settings group like any other value, and 32 like 32.0.
    members: dict[tuple[Any, ...], list[int]] = {}
    for position, row in enumerate(settings.itertuples(index=False)):
        members.setdefault(tuple(sortable(value) for value in row), []).append(position)
    groups = list(members.values())
    names = (metric, validation, "best_val/loss", "seconds_per_step")
    over_seeds = [
        _over_seeds(known, groups, name, repeats["seed"] if axes.averaged else None, monitor)
        for name in names
    ]
    steps = known["steps_to_target"].to_numpy(dtype=float)
    finished = (known["state"] == "done").to_numpy()
    states = known["state"].to_numpy()
    cells = []
    for index, positions in enumerate(groups):
        chosen = {str(key): settings[key].iloc[positions[0]] for key in settings}
        reached = steps[[position for position in positions if finished[position]]]
        median = float(np.median(np.nan_to_num(reached, nan=math.inf))) if len(reached) else math.inf
        cells.append(
            Cell(
                settings=chosen,
                contender=axes.contender(chosen),
                condition=axes.condition(chosen),
                runs=known.iloc[positions],
                states=_lost(states[positions]),
                metric=over_seeds[0][index],
                validation=over_seeds[1][index],
                best_loss=over_seeds[2][index],
                steps=median if math.isfinite(median) else None,
                reached=int(np.isfinite(reached).sum()),
                seconds=over_seeds[3][index],
            )
        )
    best = {_best(group, validation, monitor, repeats) for group in contests(cells)}
    cells = [replace(cell, chosen=index in best) for index, cell in enumerate(cells)]
    return sorted(cells, key=lambda cell: _order(cell, axes, metric, monitor))


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


def _lost(states: np.ndarray) -> dict[str, int]:
    names, counts = np.unique(states.astype(str), return_counts=True)
    pairs = zip(names, counts, strict=True)
    return {str(name): int(count) for name, count in pairs if name not in ("done", "duplicate")}


def _over_seeds(
    runs: pd.DataFrame,
    groups: Sequence[list[int]],
    name: str | None,
    within: pd.Series | None,
    monitor: Monitor,
) -> list[Estimate]:
    """The estimate of each group's done runs; the runs of one seed are averaged first if seeds are given."""
    if name is None or name not in runs:
        return estimates([[] for _ in groups])
    values = runs[name].where(runs["state"] == "done").to_numpy(dtype=float)
    samples: list[Any] = [values[positions] for positions in groups]
    if within is not None:
        seeds = within.reindex(runs.index).to_numpy()
        samples = [
            pd.Series(sample).groupby(seeds[positions]).mean().to_numpy()
            for sample, positions in zip(samples, groups, strict=True)
        ]
    return estimates(samples, monitor.lower(name))


def contests(cells: Sequence[Cell]) -> list[list[tuple[int, Cell]]]:
    """The cells of one contender under one condition, with their index: they differ in tuned settings only."""
    groups: dict[tuple[str, str], list[tuple[int, Cell]]] = {}
    for index, cell in enumerate(cells):
        groups.setdefault((cell.condition, cell.contender), []).append((index, cell))
    return list(groups.values())


def common_repeats(cells: Sequence[Cell], metric: str, repeats: pd.DataFrame) -> pd.Index:
    """The repeats (see `repeats_of`) in which every one of the cells that have a result has one."""
    finished = [by_repeat(cell, metric, repeats).index for cell in cells if cell.validation.n]
    return functools.reduce(pd.Index.intersection, finished) if finished else pd.Index([])


def _best(
    group: list[tuple[int, Cell]], validation: str | None, monitor: Monitor, repeats: pd.DataFrame
) -> int:
    if len(group) == 1 or validation is None:
        return group[0][0]
    shared = common_repeats([cell for _, cell in group], validation, repeats)

    def rank(item: tuple[int, Cell]) -> tuple[bool, int, float]:
        cell = item[1]
        diverged = cell.states.get("diverged", 0)
        if not cell.validation.n:
            return True, diverged, math.inf
        mean = cell.validation.mean
        if len(shared):
            mean = float(by_repeat(cell, validation, repeats).loc[shared].mean())
        return False, diverged, mean if monitor.lower(validation) else -mean

    return min(group, key=rank)[0]


def _order(cell: Cell, axes: Axes, metric: str, monitor: Monitor) -> tuple[Any, ...]:
    condition = [sortable(cell.settings[key]) for key in axes.conditions]
    mean = cell.metric.mean if monitor.lower(metric) else -cell.metric.mean
    return condition, mean if cell.metric.n else math.inf, cell.contender, cell.seconds.mean
