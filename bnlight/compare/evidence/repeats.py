"""The results of a cell repeat by repeat, so that contenders meet under the same randomness."""

from __future__ import annotations

from collections.abc import Sequence

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


def by_seed(cell: Cell, metric: str, seeds: pd.Series) -> pd.Series:
    """The finite results of the cell's done runs, one per seed; the mean where a seed ran more than once."""
    values = _results(cell, metric)
    return values.groupby(seeds.reindex(values.index)).mean()


def repeats_of(configs: pd.DataFrame, axes: Axes) -> pd.DataFrame:
    """Of each job with a seed: its `seed`, and in words its `setting` of the keys that are averaged over."""
    seeds = seeds_of(configs)
    return pd.DataFrame({"seed": seeds, "setting": _words(configs.loc[seeds.index, axes.averaged])})


def by_repeat(cell: Cell, metric: str, repeats: pd.DataFrame) -> pd.Series:
    """As `by_seed`, but what is averaged over is kept apart: indexed by seed and setting."""
    values = _results(cell, metric)
    both = repeats.reindex(values.index)
    return values.groupby([both["seed"], both["setting"]]).mean()


def _results(cell: Cell, metric: str) -> pd.Series:
    values = cell.done.reindex(columns=[metric])[metric].astype(float)
    return values[np.isfinite(values)]


def _words(table: pd.DataFrame) -> pd.Series:
    rows = table.itertuples(index=False, name=None)
    return pd.Series([", ".join(map(shown, row)) for row in rows], table.index, dtype=object)


def conditions(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """The chosen cells under each condition, both in the order of the table."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        if cell.chosen:
            groups.setdefault(cell.condition, []).append(cell)
    return groups
