"""The results of a cell repeat by repeat, so that contenders meet under the same randomness."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from bnlight.compare.axes import Axes, shown
from bnlight.compare.stats import Cell


def repeats_of(configs: pd.DataFrame, axes: Axes) -> pd.DataFrame:
    """What each job repeats: a row per job with a seed, of the columns `seed` and `setting`, both in words.

    `seed` joins the config's `seed` and every other key that ends so and that all jobs have: jobs with one `seed` but
    two `data.split_seed` are two repeats. `setting` joins the keys that are averaged over (`Axes.averaged`).
    """
    if "seed" not in configs:
        return pd.DataFrame(columns=["seed", "setting"], dtype=object)
    known = configs[configs["seed"].notna()]
    others = [
        key for key in known if str(key).endswith("seed") and key != "seed" and known[key].notna().all()
    ]
    return pd.DataFrame({"seed": _words(known[["seed", *others]]), "setting": _words(known[axes.averaged])})


def _words(table: pd.DataFrame) -> pd.Series:
    rows = table.itertuples(index=False, name=None)
    return pd.Series([", ".join(map(shown, row)) for row in rows], table.index, dtype=object)


def by_repeat(cell: Cell, metric: str, repeats: pd.DataFrame) -> pd.Series:
    """The finite results of the cell's done runs by seed and setting; the mean where one ran more than once."""
    values = cell.done.reindex(columns=[metric])[metric].astype(float)
    table = repeats.reindex(values.index).assign(value=values.where(np.isfinite(values)))
    return table.dropna().groupby(["seed", "setting"])["value"].mean()


def conditions(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """The chosen cells under each condition, both in the order of the table."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        if cell.chosen:
            groups.setdefault(cell.condition, []).append(cell)
    return groups
