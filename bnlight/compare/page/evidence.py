"""The evidence behind the verdict on the page: ranks, paired differences, stability and cost."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from bnlight.compare.evidence import Front, Pair, Stability
from bnlight.compare.page import plan
from bnlight.compare.page.columns import amount, exact, heading
from bnlight.compare.page.markup import cell, grid, items, text
from bnlight.compare.page.pictures import Pictures
from bnlight.compare.stats import number
from bnlight.compare.verdict import metric_words

if TYPE_CHECKING:
    from bnlight.compare.against import Difference
    from bnlight.compare.comparison import Comparison

_COSTS = ("seconds_per_step", "samples_per_second", "seconds", "peak_memory")
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
        _against(comparison),
        _ranking(comparison, pictures.frames(figures["ranking"])),
        _pairs(comparison, pictures.frames(figures["pairs"])),
        _stability(comparison),
        _costs(comparison, pictures.frames(figures["fronts"])),
    ]
    return f'<section class="evidence">\n{"".join(parts)}</section>' if any(parts) else ""


def _ranking(comparison: Comparison, frames: str) -> str:
    ranking = comparison.evidence.ranking
    if ranking is None:
        return ""
    test = _p(ranking.p, equal="= ")
    note = (
        f"Ranks averaged over {ranking.blocks} blocks (one setting and seed each); Friedman test: p {test}. "
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
        numbers = [str(pair.n), number(pair.difference), _ends(pair), number(pair.effect), _p(pair.p)]
        numbers += [_p(pair.p_holm), "yes" if pair.told_apart else "no"]
        numbers += ["-" if pair.more_seeds is None else str(pair.more_seeds)]
        rows.append(_row([pair.condition or "-", pair.better, pair.worse], numbers))
    note = (
        "Each pair of contenders on the seeds both have: the difference seed by seed with its 95 % interval, and a "
        "paired test with Holm's correction within a setting. Filled points are told apart, hollow ones are not."
    )
    told = [pair.text for pair in pairs if pair.leading]
    table = grid("pairs", "Paired differences", heads, rows)
    fold = f"<details><summary>{len(pairs)} pairs in numbers</summary>\n{table}</details>"
    return f'<h2>Pair by pair</h2>\n<p class="soft">{text(note)}</p>\n{items(told[:_TOLD])}{frames}{fold}\n'


def _stability(comparison: Comparison) -> str:
    found = comparison.evidence.stability
    if not found:
        return ""
    gaps = {"train-eval gap": [entry.gap for entry in found]}
    if any(entry.norm_gap.n for entry in found):
        gaps["norm gap"] = [entry.norm_gap for entry in found]
    heads = _heads("condition", "contender", "runs", "diverged", "failed", "roughness", *gaps,
                   "largest stable lr", "steps to target", "seconds to target", numeric=range(2, 11))  # fmt: skip
    rows = []
    for index, entry in enumerate(found):
        rate = f" ({entry.divergence_rate:.0%})" if entry.diverged else ""
        numbers = [str(entry.runs), f"{entry.diverged}{rate}", str(entry.failed)]
        measured = [entry.roughness, *(values[index] for values in gaps.values())]
        numbers += [str(value) if value.n else "-" for value in measured]
        numbers += [_largest(entry), _median(entry.steps), _median(entry.seconds)]
        rows.append(_row([entry.condition or "-", entry.contender], numbers))
    note = (
        "Over all runs of a contender, at every setting tried. Roughness is how much a training curve jumps, the gap "
        "how much better a run is on its training data than on the data it is judged by; the target is a validation "
        f"accuracy of {comparison.target:g}, reached by the median run at the chosen setting."
    )
    table = grid("stability", "Stability", heads, rows)
    return f'<h2>Stability</h2>\n<p class="soft">{text(note)}</p>\n{table}\n'


def _costs(comparison: Comparison, frames: str) -> str:
    measured = [name for name in _COSTS if name in comparison.runs and comparison.runs[name].notna().any()]
    if not frames and not measured:
        return ""
    heads = _heads("condition", "contender", *map(heading, measured), numeric=range(2, 2 + len(measured)))
    rows = []
    for chosen in (each for each in comparison.cells if each.chosen and len(each.done)):
        means = {name: float(chosen.done[name].mean()) for name in measured}
        words = cell(text(chosen.condition or "-")) + cell(text(chosen.contender))
        entries = "".join(exact(amount(name, mean), mean) for name, mean in means.items())
        rows.append(f"<tr>{words}{entries}</tr>")
    note = (
        "Filled points are on the Pareto front: nothing else is better and cheaper at once. Hollow ones are not. The "
        "table has the mean costs of the done runs at the chosen setting."
    )
    table = grid("costs", "Costs", heads, rows)
    return f'<h2>Quality against cost</h2>\n<p class="soft">{note}</p>\n{frames}{table}'


def _against(comparison: Comparison) -> str:
    other = comparison.against
    if other is None:
        return ""
    heads = _heads("condition", "contender", "here", "there", "n", "difference", "95 % interval", "p (Holm)",
                   "told apart", numeric=range(2, 9))  # fmt: skip
    rows = []
    for found in other.differences:
        numbers = [str(found.here), str(found.there), str(found.n), number(found.difference)]
        numbers += [_ends(found), _p(found.p_holm), "yes" if found.told_apart else "no"]
        rows.append(_row([found.condition or "-", found.contender], numbers))
    remarks = [f"Only here: {', '.join(other.only_here)}."] if other.only_here else []
    remarks += [f"Only in {other.name}: {', '.join(other.only_there)}."] if other.only_there else []
    remarks += [f"The two also differ in {', '.join(other.settings)}."] if other.settings else []
    table = grid("against", f"Against {other.name}", heads, rows)
    return f"<h2>Against {text(other.name)}</h2>\n<p>{text(other.verdict)}</p>\n{items(remarks)}{table}\n"


def _row(words: list[str], numbers: list[str]) -> str:
    entries = [*(cell(text(word)) for word in words), *(cell(text(value), "number") for value in numbers)]
    return f"<tr>{''.join(entries)}</tr>"


def _heads(*names: str, numeric: range) -> list[dict[str, Any]]:
    return [
        {"head": name, "class": "number" if index in numeric else None} for index, name in enumerate(names)
    ]


def _points(front: Front) -> list[dict[str, Any]]:
    return [{str(key): value for key, value in point.items()} for point in front.points.to_dict("records")]


def _interval(pair: Pair) -> dict[str, float | None]:
    names = ("difference", "low", "high", "effect", "p", "p_holm")
    return {name: value if math.isfinite(value := getattr(pair, name)) else None for name in names}


def _p(value: float, equal: str = "") -> str:
    if not math.isfinite(value):
        return "-"
    return "< 0.001" if value < 0.001 else f"{equal}{value:.3f}"


def _ends(found: Pair | Difference) -> str:
    return f"{number(found.low)} to {number(found.high)}" if math.isfinite(found.low) else "-"


def _largest(entry: Stability) -> str:
    if entry.largest_stable_lr is None:
        return "-"
    beyond = "≥ " if entry.largest_stable_lr == entry.largest_lr else ""  # the limit may lie higher
    return f"{beyond}{entry.largest_stable_lr:g}"


def _median(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
