"""Group the runs of a sweep into cells, and choose the cell that each contender is judged by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from bnlight.compare.axes import Axes, shown, sortable
from bnlight.compare.derive import Monitor
from bnlight.compare.stats import Cell, Estimate, estimates, validation_metric


def make_cells(
    runs: pd.DataFrame,
    axes: Axes,
    metric: str,
    monitor: Monitor,
    repeats: pd.DataFrame,
) -> list[Cell]:
    """One cell per combination of settings, in the order of the table.

    Conditions come in their natural order, and within one the best mean of `metric` first. Of a contender's
    tuned settings under one condition, of those with a result and the fewest diverged runs, that with the best
    mean validation result over the seeds they have in common is chosen. `repeats` is what `repeats_of` says of them.
    """
    validation = validation_metric(metric, runs, monitor)
    known = runs[runs.index.isin(axes.values.index)]
    settings = axes.values.loc[known.index].map(_plain)
    # Missing settings group like any other value, and 32 like 32.0.
    members: dict[tuple[Any, ...], list[int]] = {}
    for position, row in enumerate(settings.itertuples(index=False)):
        members.setdefault(tuple(sortable(value) for value in row), []).append(position)
    groups = list(members.values())
    names = (metric, validation, "best_val/loss", "seconds_per_step")
    drawn = _Repeats(known, repeats, groups)
    over_seeds = [_over_seeds(known, drawn, name, monitor) for name in names]
    steps = known["steps_to_target"].to_numpy(dtype=float)
    ended = known["state"].isin(["done", "diverged"]).to_numpy()
    states = known["state"].to_numpy()
    cells = []
    for index, positions in enumerate(groups):
        chosen = {str(key): settings[key].iloc[positions[0]] for key in settings}
        reached = steps[[position for position in positions if ended[position]]]
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
    cells = _choose(cells, known, drawn, validation, monitor)
    return sorted(cells, key=lambda cell: _order(cell, axes, metric, monitor))


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


def _lost(states: np.ndarray) -> dict[str, int]:
    names, counts = np.unique(states.astype(str), return_counts=True)
    pairs = zip(names, counts, strict=True)
    return {str(name): int(count) for name, count in pairs if name not in ("done", "duplicate")}


class _Repeats:
    """Which cell, seed and repeat (a seed at one setting of what is averaged over) each run belongs to."""

    def __init__(self, runs: pd.DataFrame, repeats: pd.DataFrame, groups: Sequence[list[int]]) -> None:
        known = repeats.reindex(runs.index)
        own = known["seed"].where(known["seed"].notna(), runs.index)  # without a seed, a repeat of its own
        self.seed = pd.factorize(own)[0]
        self.names = dict(zip(self.seed.tolist(), runs["seed"].map(shown), strict=True))
        setting, settings = pd.factorize(known["setting"])
        self.settings = len(settings) + 1
        self.repeat = self.seed * self.settings + setting + 1
        self.cell = np.empty(len(runs), dtype=np.int64)
        for index, positions in enumerate(groups):
            self.cell[positions] = index
        self.done = (runs["state"] == "done").to_numpy()
        self.cells = len(groups)

    def means(self, runs: pd.DataFrame, name: str, columns: np.ndarray) -> np.ndarray:
        """The mean of the finite results of done runs, by cell and by `columns` (`seed` or `repeat`); else NaN."""
        values = runs[name].to_numpy(dtype=float)
        used = self.done & np.isfinite(values)
        shape = (self.cells, int(columns.max(initial=-1)) + 1)
        sums, counts = np.zeros(shape), np.zeros(shape)
        np.add.at(sums, (self.cell[used], columns[used]), values[used])
        np.add.at(counts, (self.cell[used], columns[used]), 1)
        means: np.ndarray = np.divide(sums, counts, out=np.full(shape, np.nan), where=counts > 0)
        return means

    def seeds(self, repeats: np.ndarray) -> tuple[str, ...]:
        """The names of the seeds of some repeats, given as a mask."""
        codes = np.flatnonzero(repeats) // self.settings
        return tuple(dict.fromkeys(self.names[code] for code in codes.tolist()))


def _over_seeds(runs: pd.DataFrame, drawn: _Repeats, name: str | None, monitor: Monitor) -> list[Estimate]:
    """The estimate of each cell over its seeds."""
    if name is None or name not in runs:
        return estimates([[]] * drawn.cells)
    return estimates(list(drawn.means(runs, name, drawn.seed)), monitor.lower(name))


def _choose(
    cells: Sequence[Cell], runs: pd.DataFrame, drawn: _Repeats, validation: str | None, monitor: Monitor
) -> list[Cell]:
    """Mark the best setting of each contender under each condition, and the seeds that the choice rests on."""
    contests: dict[tuple[str, str], list[int]] = {}
    for index, cell in enumerate(cells):
        contests.setdefault((cell.condition, cell.contender), []).append(index)
    results = drawn.means(runs, validation, drawn.repeat) if validation else np.full((len(cells), 1), np.nan)
    lower = validation is not None and monitor.lower(validation)
    found = list(cells)
    for members in contests.values():
        lost = [cells[index].states.get("diverged", 0) for index in members]
        best, shared = _best(results[members], lost, lower)
        seeds = None if shared is None else drawn.seeds(shared)
        found[members[best]] = replace(cells[members[best]], chosen=True, chosen_on=seeds)
    return found


def _best(results: np.ndarray, lost: Sequence[int], lower: bool) -> tuple[int, np.ndarray | None]:
    """The row that wins, and the columns on which it met its rivals; None where those are all that they have.

    Rivals are the rows with a result that have lost the fewest runs: who diverged more neither wins nor takes seeds
    from the comparison of the others.
    """
    finished = np.isfinite(results)
    settled = finished.any(axis=1)
    losses = np.where(settled == settled.any(), lost, np.inf)  # all rows, where none has a result
    rivals = np.flatnonzero(losses == losses.min()).tolist()
    shared = finished[rivals].all(axis=0)

    def score(row: int) -> float:
        used = results[row, shared if shared.any() else finished[row]]
        mean = float(used.mean()) if len(used) else math.inf
        return mean if lower or not len(used) else -mean

    return min(rivals, key=score), shared if (finished[rivals] != shared).any() else None


def _order(cell: Cell, axes: Axes, metric: str, monitor: Monitor) -> tuple[Any, ...]:
    condition = [sortable(cell.settings[key]) for key in axes.conditions]
    mean = cell.metric.mean if monitor.lower(metric) else -cell.metric.mean
    return condition, mean if cell.metric.n else math.inf, cell.contender, cell.seconds.mean
