"""What the evidence says beyond the means, in a sentence each: ranks, the largest stable learning rate, cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bnlight.compare.evidence import Front, Ranking, Stability
from bnlight.compare.evidence.pairs import ALPHA, p_value
from bnlight.compare.verdict import metric_words

if TYPE_CHECKING:
    from bnlight.compare.comparison import Comparison

_RATE = "optimizer.lr"
_TOLD = 6  # conditions; the page has all of them


def beyond(comparison: Comparison) -> list[str]:
    """The ranking, and for each condition what is stable and what is cheap; less where less was measured."""
    found, axes = comparison.evidence, comparison.axes
    rate = axes.label(_RATE) if _RATE in axes.tuned else None
    lines = []
    conditions = list(dict.fromkeys(entry.condition for entry in found.stability))
    for condition in conditions[:_TOLD]:
        entries = [entry for entry in found.stability if entry.condition == condition]
        tried = {cell.settings[_RATE] for cell in comparison.cells if rate and cell.condition == condition}
        said = [_stable(entries, rate)] if rate and len(tried) > 1 else []
        said += _unbeaten(found.fronts, condition)
        if said:
            text = "; ".join(said)
            lines.append(f"At {condition}, {text}." if condition else f"{text[0].upper()}{text[1:]}.")
    more = len(conditions) - _TOLD
    lines += [f"{more} more settings likewise in comparison.html."] if lines and more > 0 else []
    return [*([_ranks(found.ranking)] if found.ranking else []), *lines]


def _ranks(ranking: Ranking) -> str:
    ranks = zip(ranking.contenders, ranking.mean_ranks, strict=True)
    listed = ", ".join(f"{name} {rank:.2f}" for name, rank in ranks)
    p = f"Friedman's {p_value(ranking.p)}"
    test = (
        f"they are not told apart ({p})"
        if ranking.p > ALPHA
        else f"those closer than {ranking.critical_difference:.2f} are not told apart (Nemenyi; {p})"
    )
    return f"Mean ranks over {ranking.blocks} blocks, each a seed at one setting: {listed}; {test}."


def _stable(entries: Sequence[Stability], rate: str) -> str:
    """The largest rate at which nothing diverges and learning still works, see `Stability`."""
    stable = []
    for entry in entries:
        if entry.largest_stable_lr is not None:
            most = " (largest tried)" if entry.largest_stable_lr == entry.largest_lr else ""
            stable.append(f"{entry.contender} {entry.largest_stable_lr:g}{most}")
    never = [entry.contender for entry in entries if entry.largest_stable_lr is None]
    said = [f"largest stable {rate}: {', '.join(stable)}"] if stable else []
    said += [f"no {rate} was stable for {', '.join(never)}"] if never else []
    return "; ".join(said)


def _unbeaten(fronts: Sequence[Front], condition: str) -> list[str]:
    """Who is on the front of the metric and the time per step, where that leaves somebody out."""
    for front in fronts:
        points = front.points[front.points["condition"] == condition]
        if front.cost == "seconds_per_step" and not points["on_front"].all():
            *others, last = points["contender"][points["on_front"]]
            names = f"{', '.join(others)} or {last}" if others else last
            words = metric_words(front.quality)
            return [f"nobody is both better in {words} and faster per step than {names}"]
    return []
