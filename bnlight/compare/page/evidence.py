"""The evidence behind the verdict on the page: ranks, paired differences, stability and cost."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from bnlight.compare.page import plan
from bnlight.compare.page.markup import cell, grid, items, text
from bnlight.compare.page.pictures import Pictures
from bnlight.compare.stats import number
from bnlight.compare.verdict import metric_words

if TYPE_CHECKING:
    from bnlight.compare.comparison import Comparison

_TOLD = 6  # sentences on pairs; the table has all of them


def payload(comparison: Comparison) -> dict[str, Any]:
    """The numbers behind the figures of the evidence."""
    found = comparison.evidence
    return {
        "pairs": [
            {name: value for name, value in asdict(pair).items() if name != "text"} | _interval(pair)
            for pair in found.pairs
        ],
        "ranking": asdict(found.ranking) if found.ranking else None,
        "fronts": [
            {"quality": f.quality, "cost": f.cost, "words": [metric_words(f.quality), metric_words(f.cost)],
             "points": _points(f)}
            for f in found.fronts
        ],
    }  # fmt: skip


def render(comparison: Comparison, pictures: Pictures) -> str:
    """The sections that have something to say."""
    figures = plan.evidence(comparison)
    parts = [
        _ranking(comparison, pictures.frames(figures["ranking"])),
        _pairs(comparison, pictures.frames(figures["pairs"])),
        _stability(comparison, pictures.frames(figures["stability"])),
        _fronts(pictures.frames(figures["fronts"])),
    ]
    return f'<section class="evidence">\n{"".join(parts)}</section>' if any(parts) else ""


def _ranking(comparison: Comparison, frames: str) -> str:
    ranking = comparison.evidence.ranking
    if ranking is None:
        return ""
    note = (
        f"Ranks averaged over {ranking.blocks} blocks (one setting and seed each); Friedman test p = {_p(ranking.p)}. "
        f"Contenders under one bar differ by less than the critical difference, {ranking.critical_difference:.2f}."
    )
    return f'<h2>Ranks</h2>\n<p class="soft">{text(note)}</p>\n{frames}'


def _pairs(comparison: Comparison, frames: str) -> str:
    pairs = comparison.evidence.pairs
    if not pairs:
        return ""
    heads = _heads("condition", "better", "worse", "n", "difference", "95 % interval", "effect", "p", "p (Holm)",
                   "told apart", "more seeds", numeric=range(3, 11))  # fmt: skip
    rows = []
    for pair in pairs:
        interval = f"{number(pair.low)} to {number(pair.high)}" if math.isfinite(pair.low) else "-"
        numbers = [
            str(pair.n),
            number(pair.difference),
            interval,
            number(pair.effect),
            _p(pair.p),
            _p(pair.p_holm),
        ]
        numbers += [
            "yes" if pair.told_apart else "no",
            "-" if pair.more_seeds is None else str(pair.more_seeds),
        ]
        words = [cell(text(word)) for word in (pair.condition or "-", pair.better, pair.worse)]
        rows.append(f"<tr>{''.join(words)}{''.join(cell(text(value), 'number') for value in numbers)}</tr>")
    note = (
        "Each pair of contenders on the seeds both have: the difference seed by seed with its 95 % interval, and a "
        "paired test with Holm's correction within a setting. A bar that crosses zero is no difference told apart."
    )
    leaders = {finding.condition: finding.best for finding in comparison.findings}
    told = [pair.text for pair in pairs if pair.better == leaders.get(pair.condition)]
    table = grid("pairs", "Paired differences", heads, rows)
    fold = f"<details><summary>{len(pairs)} pairs in numbers</summary>\n{table}</details>"
    return f'<h2>Pair by pair</h2>\n<p class="soft">{text(note)}</p>\n{items(told[:_TOLD])}{frames}{fold}\n'


def _stability(comparison: Comparison, frames: str) -> str:
    found = comparison.evidence.stability
    if not found:
        return ""
    rates = any(entry.largest_stable_lr is not None for entry in found)
    heads = _heads("condition", "contender", "runs", "diverged", "failed", "roughness", "train-eval gap",
                   *(["largest stable lr"] if rates else []), numeric=range(2, 8))  # fmt: skip
    rows = []
    for entry in found:
        numbers = [str(entry.runs), str(entry.diverged), str(entry.failed)]
        numbers += [str(value) if value.n else "-" for value in (entry.roughness, entry.gap)]
        numbers += [_rate(entry.largest_stable_lr)] if rates else []
        words = cell(text(entry.condition or "-")) + cell(text(entry.contender))
        rows.append(f"<tr>{words}{''.join(cell(text(value), 'number') for value in numbers)}</tr>")
    note = (
        "Roughness is how much a training curve jumps from one validation to the next, the gap how much better a "
        "run is on its training data than on the data it is judged by."
    )
    table = grid("stability", "Stability", heads, rows)
    return f'<h2>Stability</h2>\n<p class="soft">{text(note)}</p>\n{frames}{table}\n'


def _fronts(frames: str) -> str:
    if not frames:
        return ""
    note = "Filled points are on the Pareto front: nothing else is better and cheaper at once. Hollow ones are not."
    return f'<h2>Quality against cost</h2>\n<p class="soft">{note}</p>\n{frames}'


def _heads(*names: str, numeric: range) -> list[dict[str, Any]]:
    return [
        {"head": name, "class": "number" if index in numeric else None} for index, name in enumerate(names)
    ]


def _points(front: Any) -> list[dict[str, Any]]:
    named = front.points.rename(columns={front.quality: "quality", front.cost: "cost"})
    points = named[["contender", "condition", "quality", "cost", "on_front"]].to_dict("records")
    return [p | {"on_front": bool(p["on_front"])} for p in points if math.isfinite(p["quality"] + p["cost"])]


def _interval(pair: Any) -> dict[str, float | None]:
    names = ("difference", "low", "high", "effect", "p", "p_holm")
    return {name: value if math.isfinite(value := getattr(pair, name)) else None for name in names}


def _p(value: float) -> str:
    if not math.isfinite(value):
        return "-"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"
