"""What the seeds support: paired tests, ranks, stability, and quality against cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from bnlight.compare.evidence.pairs import FAMILY, FEW, FEW_SEEDS, Pair, find_pairs
from bnlight.compare.evidence.pareto import Front, find_fronts
from bnlight.compare.evidence.ranking import Ranking, find_ranking
from bnlight.compare.evidence.repeats import meetings
from bnlight.compare.evidence.stability import Stability, find_stability
from bnlight.compare.stats import Cell

__all__ = ["Evidence", "Front", "Pair", "Ranking", "Stability", "gather"]


@dataclass(frozen=True)
class Evidence:
    """What the chosen cells show beyond their means; each part's class says what it is.

    `ranking` is None with too few contenders or blocks: `notes` then says so. `notes` are the sentences a reader of the
    numbers needs: how the tests were made, and what limits them.
    """

    pairs: list[Pair]
    ranking: Ranking | None
    stability: list[Stability]
    fronts: list[Front]
    notes: list[str]


def gather(cells: Sequence[Cell], metric: str, lower: bool, repeats: pd.DataFrame) -> Evidence:
    """The evidence on `metric` in the cells of `make_cells`, whose runs have the columns that `derive` adds.

    `lower`: less of it is better. `repeats` is what `repeats_of` says of the runs.
    """
    met = meetings(cells, metric, lower, repeats)
    pairs = [pair for meeting in met for pair in find_pairs(meeting)]
    ranking, remark = find_ranking(met, repeats)
    notes = [FAMILY] if any(pair.n > 1 for pair in pairs) else []
    notes += [FEW_SEEDS] if any(1 < pair.n < FEW for pair in pairs) else []
    notes += [remark] if remark else []
    return Evidence(pairs, ranking, find_stability(cells, lower), find_fronts(cells, metric, lower), notes)
