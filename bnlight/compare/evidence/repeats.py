"""The results of a cell repeat by repeat, so that contenders meet under the same randomness."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from bnlight.compare.axes import Axes, shown
from bnlight.compare.stats import Cell


def seeds_of(configs: pd.DataFrame) -> pd.Series:
    """What each job draws its randomness from: `seed`, with every other key that ends so and that all jobs have.

    Two jobs with one `seed` but different `data.split_seed` are different repeats. A job without a seed is left out:
    nothing can be paired with it.
    """
    if "seed" not in configs:
        return pd.Series(dtype=object)
    known = configs[configs["seed"].notna()]
    others = [
        key for key in known if str(key).endswith("seed") and key != "seed" and known[key].notna().all()
    ]
    return _words(known[["seed", *others]])


def repeats_of(configs: pd.DataFrame, axes: Axes) -> pd.DataFrame:
    """Of each job with a seed: its `seed`, and in words its `setting` of the keys that are averaged over."""
    seeds = seeds_of(configs)
    return pd.DataFrame({"seed": seeds, "setting": _words(configs.loc[seeds.index, axes.averaged])})


def by_repeat(cell: Cell, metric: str, repeats: pd.DataFrame) -> pd.Series:
    """The finite results of the cell's done runs by seed and setting; the mean where one ran more than once."""
    done = cell.runs["state"] == "done"
    values = cell.runs.reindex(columns=[metric])[metric][done].astype(float)
    values = values[np.isfinite(values)]
    both = repeats.reindex(values.index)
    return values.groupby([both["seed"], both["setting"]]).mean()


def _words(table: pd.DataFrame) -> pd.Series:
    rows = table.itertuples(index=False, name=None)
    return pd.Series([", ".join(map(shown, row)) for row in rows], table.index, dtype=object)


@dataclass(frozen=True)
class Meeting:
    """The chosen cells of one condition, in the order of the table, and their results where they meet.

    `gains` has a row per seed and setting and a column per cell; more is better.
    """

    condition: str
    cells: list[Cell]
    gains: pd.DataFrame


def meetings(cells: Sequence[Cell], metric: str, lower: bool, repeats: pd.DataFrame) -> list[Meeting]:
    """One meeting per condition; `lower`: less of `metric` is better."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        if cell.chosen:
            groups.setdefault(cell.condition, []).append(cell)
    sign = -1 if lower else 1
    return [
        Meeting(
            condition,
            group,
            pd.DataFrame({i: sign * by_repeat(c, metric, repeats) for i, c in enumerate(group)}),
        )
        for condition, group in groups.items()
    ]
