"""Rank the contenders over conditions and seeds: Friedman's test and Nemenyi's critical difference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from bnlight.compare.evidence.pairs import ALPHA
from bnlight.compare.evidence.repeats import Meeting


@dataclass(frozen=True)
class Ranking:
    """Mean ranks over blocks, best first; 1 is the best, ties share their mean (Demšar, JMLR 7, 2006).

    A block is one seed under one condition (and one setting of what is averaged over) on which every contender
    finished or diverged, and some finished; who diverged ranks last. `p` is Friedman's. `critical_difference` is
    Nemenyi's for k contenders and N blocks, `q(0.05, k, inf) / sqrt(2) * sqrt(k * (k + 1) / (6 * N))`: mean ranks that
    lie closer are not separated. `groups` are the largest sets of neighbours within it; all are one group if `p` is
    above 0.05.

    Seeds under one condition share the data, so ranks speak of these conditions, not of data sets in general.
    """

    contenders: list[str]
    mean_ranks: list[float]
    blocks: int
    p: float
    critical_difference: float
    groups: list[tuple[str, ...]]


def find_ranking(meetings: Sequence[Meeting], repeats: pd.DataFrame) -> tuple[Ranking | None, str]:
    """The ranking, and what has to be said of it: why there is none, or whom it leaves out."""
    table = losses(meetings, repeats)
    never = [str(name) for name in table if table[name].isna().all()]
    blocks = table.drop(columns=never).dropna()
    blocks = blocks[np.isfinite(blocks.to_numpy()).any(axis=1)]
    left_out = f"The ranking leaves out {', '.join(never)}: no run finished or diverged." if never else ""
    if blocks.shape[1] < 3:
        return None, f"A ranking needs at least 3 contenders that ran; there are {blocks.shape[1]}."
    if len(blocks) < 2:
        few = "is none" if blocks.empty else "is 1"
        return None, f"A ranking needs at least 2 seeds or conditions that all contenders share; there {few}."
    return rank(blocks), left_out


def losses(meetings: Sequence[Meeting], repeats: pd.DataFrame) -> pd.DataFrame:
    """One row per block, one column per contender, less is better; infinite where a run diverged."""
    columns: dict[str, dict[tuple[str, ...], float]] = {}
    for meeting in meetings:
        for index, cell in enumerate(meeting.cells):
            diverged = repeats[repeats.index.isin(cell.runs.index[cell.runs["state"] == "diverged"])]
            gains = meeting.gains[index].dropna()
            column = columns.setdefault(cell.contender, {})
            column |= {
                (meeting.condition, *key): math.inf for key in diverged.itertuples(index=False, name=None)
            }
            column |= {
                (meeting.condition, *key): -gain for key, gain in zip(list(gains.index), gains, strict=True)
            }
    return pd.DataFrame({name: pd.Series(column, dtype=float) for name, column in columns.items()})


def rank(blocks: pd.DataFrame) -> Ranking:
    """The ranking of a complete table with one row per block and one column per contender; less is better."""
    from scipy.stats import friedmanchisquare, studentized_range

    ranks = blocks.rank(axis="columns")
    mean = ranks.mean().sort_values(kind="stable")
    n, k = blocks.shape
    tied = bool((ranks.nunique(axis="columns") == 1).all())
    p = 1.0 if tied else float(friedmanchisquare(*ranks.to_numpy().T).pvalue)
    q = float(studentized_range.ppf(1 - ALPHA, k, math.inf)) / math.sqrt(2)
    critical = q * math.sqrt(k * (k + 1) / (6 * n))
    names = [str(name) for name in mean.index]
    return Ranking(names, [float(value) for value in mean], n, p, critical, _groups(mean, critical, p))


def _groups(mean: pd.Series, critical: float, p: float) -> list[tuple[str, ...]]:
    """Maximal runs of two or more neighbours whose mean ranks differ by less than the critical difference."""
    names, values = [str(name) for name in mean.index], mean.to_numpy()
    if p > ALPHA:
        return [tuple(names)]
    groups, reached = [], 0
    for start in range(len(names)):
        stop = int(np.searchsorted(values, values[start] + critical, side="left"))
        if stop > reached and stop - start > 1:
            groups.append(tuple(names[start:stop]))
        reached = max(reached, stop)
    return groups
