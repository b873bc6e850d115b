"""How dependable a contender is: divergence, rough training, the train-eval gap, learning rates, time to a target."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from bnlight.compare.stats import Cell, Estimate, estimate

_NEEDED = ["state", "seconds_to_target", "train_eval_gap", "norm_gap", "roughness"]


@dataclass(frozen=True)
class Stability:
    """One contender under one condition, over its runs at every tuned setting, whatever became of them.

    - `runs`, `diverged`, `failed`: how many; a failure is a crash and says nothing of the numbers;
    - `divergence_rate`: diverged runs over those that trained to an end, done or diverged; NaN if there are none;
    - `roughness`: of the training loss of all runs, see `derive`;
    - `gap`, `norm_gap`: `train_eval_gap` and `norm_gap` of the runs at the chosen setting, see `derive`;
    - `largest_stable_lr`: the largest learning rate among the settings at which some run is done, none diverged, and
      the mean result keeps half of the contender's best: within `|best| / 2` of it where more is better, within
      `|best|` where less is (a loss at most twice the lowest). None if there is none;
    - `largest_lr`: the largest that was tried. Where the two are equal, the limit may lie higher;
    - `steps`, `reached`, `ended`: to the target, those of the chosen cell, see `Cell`; `seconds`: the same median in
      seconds of training.
    """

    condition: str
    contender: str
    runs: int
    diverged: int
    failed: int
    roughness: Estimate
    gap: Estimate
    largest_stable_lr: float | None
    norm_gap: Estimate
    largest_lr: float | None
    steps: float | None
    seconds: float | None
    reached: int
    ended: int
    divergence_rate: float


def find_stability(cells: Sequence[Cell], lower: bool) -> list[Stability]:
    """One entry per condition and contender, in the order of the table."""
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.condition, cell.contender), []).append(cell)
    return [_stability(group, lower) for group in groups.values()]


def _stability(cells: Sequence[Cell], lower: bool) -> Stability:
    (best,) = (cell for cell in cells if cell.chosen)
    runs, chosen = _counted(cells), _counted([best])
    states = runs["state"].value_counts()
    done, diverged = int(states.get("done", 0)), int(states.get("diverged", 0))
    ended = chosen[chosen["state"].isin(["done", "diverged"])]
    return Stability(
        condition=cells[0].condition,
        contender=cells[0].contender,
        runs=len(runs),
        diverged=diverged,
        failed=int(states.get("failed", 0)),
        roughness=estimate(runs["roughness"], lower=True),
        gap=estimate(chosen["train_eval_gap"], lower=True),
        largest_stable_lr=_largest_stable(cells, lower),
        norm_gap=estimate(chosen["norm_gap"], lower=True),
        largest_lr=_largest(cells),
        steps=best.steps,
        seconds=_median(ended["seconds_to_target"]),
        reached=best.reached,
        ended=best.ended,
        divergence_rate=diverged / (done + diverged) if done + diverged else math.nan,
    )


def _counted(cells: Sequence[Cell]) -> pd.DataFrame:
    """What is needed of the cells' runs; a copy of a run is none."""
    runs = pd.concat([cell.runs.reindex(columns=_NEEDED) for cell in cells])
    return runs[runs["state"] != "duplicate"]


def _largest(cells: Sequence[Cell]) -> float | None:
    rates = [float(rate) for cell in cells for rate in cell.runs["lr"].dropna()]
    return max(rates, default=None)


def _largest_stable(cells: Sequence[Cell], lower: bool) -> float | None:
    finished = [cell for cell in cells if cell.metric.n]
    if not finished:
        return None
    signed = {id(cell): cell.metric.mean * (-1 if lower else 1) for cell in finished}
    best = max(signed.values())
    worst = best - abs(best) * (1 if lower else 0.5)
    return _largest([c for c in finished if "diverged" not in c.states and signed[id(c)] >= worst])


def _median(values: pd.Series) -> float | None:
    median = float(values.fillna(np.inf).median())
    return median if math.isfinite(median) else None
