"""Quality against cost: which contenders no other one beats in both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from bnlight.compare.stats import Cell, estimate

COSTS = ("seconds_per_step", "seconds", "peak_memory")


@dataclass(frozen=True)
class Front:
    """The chosen cells as points of quality and cost, both means over done runs.

    `quality` and `cost` name the columns of the runs: the metric, and `seconds_per_step`, `seconds` (of the whole
    run) or `peak_memory` (bytes). `points` has the columns contender, condition, quality, cost, on_front. A point is
    on the front if none under the same condition is at least as good in both and better in one.
    """

    quality: str
    cost: str
    points: pd.DataFrame


def find_fronts(cells: Sequence[Cell], metric: str, lower: bool) -> list[Front]:
    """One front for every cost that was measured."""
    fronts = []
    for cost in COSTS:
        rows = [
            (cell.contender, cell.condition, cell.metric.mean, estimate(cell.done.get(cost, [])).mean)
            for cell in cells
            if cell.chosen
        ]
        points = pd.DataFrame(rows, columns=["contender", "condition", "quality", "cost"])
        points = points.dropna(subset=["quality", "cost"]).reset_index(drop=True)
        if len(points):
            loss = points["quality"] if lower else -points["quality"]
            on_front = pd.Series(False, index=points.index)
            for index in points.groupby("condition").groups.values():
                on_front[index] = undominated(loss[index].to_numpy(), points["cost"][index].to_numpy())
            fronts.append(Front(metric, cost, points.assign(on_front=on_front)))
    return fronts


def undominated(loss: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """Of points with two numbers each, less being better, those that no other one dominates."""
    no_worse = (loss[None, :] <= loss[:, None]) & (cost[None, :] <= cost[:, None])
    better = (loss[None, :] < loss[:, None]) | (cost[None, :] < cost[:, None])
    return np.asarray(~np.any(no_worse & better, axis=1))
