"""The evidence behind the verdict on the page: ranks, paired differences, stability and cost."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from bnlight.compare.evidence import Front, Pair, Stability
from bnlight.compare.evidence.pairs import ALPHA, p_number, p_value
from bnlight.compare.page import plan
from bnlight.compare.page.columns import amount, exact, heading
from bnlight.compare.page.markup import cell, grid, items, text
from bnlight.compare.page.pictures import Pictures
from bnlight.compare.stats import number

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
            {"quality": front.quality, "cost": front.cost, "points": _points(front)} for front in found.fronts
        ],
    }


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
    bar = f"differ by less than the critical difference, {ranking.critical_difference:.2f}"
    if ranking.p > ALPHA:
        bar = "are not told apart: that test finds no difference among them all"
    note = (
        f"Ranks averaged over {ranking.blocks} blocks (one setting and seed each); Friedman test: "
        f"{p_value(ranking.p)}. Contenders under one bar {bar}."
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
        entries = [_plain(pair.n), exact(number(pair.difference), pair.difference), _plain(_ends(pair))]
        entries += [exact(number(pair.effect), pair.effect), exact(p_number(pair.p), pair.p)]
        entries += [exact(p_number(pair.p_holm), pair.p_holm), _plain("yes" if pair.told_apart else "no")]
        entries += [_plain("-" if pair.more_seeds is None else pair.more_seeds)]
        rows.append(_row([pair.condition or "-", pair.better, pair.worse], entries))
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
        numbers = [entry.runs, f"{entry.diverged}{rate}", entry.failed, entry.roughness]
        numbers += [values[index] for values in gaps.values()]
        numbers += [_largest(entry), _median(entry.steps), _median(entry.seconds)]
        rows.append(_row([entry.condition or "-", entry.contender], [*map(_plain, numbers)]))
    norms = "the norm gap, how far the norms' outputs in evaluation are from those in training; "
    note = (
        "Over all runs of a contender, at every setting tried; roughness is how much a training curve jumps. Over "
        "those at the chosen setting: the train-eval gap, how much better a run is on its training data than on the "
        f"data it is judged by; {norms if 'norm gap' in gaps else ''}when the median run reaches the target, a "
        f"{comparison.aim}."
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
        entries = [exact(amount(name, mean), mean) for name, mean in means.items()]
        rows.append(_row([chosen.condition or "-", chosen.contender], entries))
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
        entries = [_plain(found.here), _plain(found.there), _plain(found.n)]
        entries += [exact(number(found.difference), found.difference), _plain(_ends(found))]
        entries += [exact(p_number(found.p_holm), found.p_holm), _plain("yes" if found.told_apart else "no")]
        rows.append(_row([found.condition or "-", found.contender], entries))
    remarks = [f"Only here: {', '.join(other.only_here)}."] if other.only_here else []
    remarks += [f"Only in {other.name}: {', '.join(other.only_there)}."] if other.only_there else []
    remarks += [f"The two also differ in {', '.join(other.settings)}."] if other.settings else []
    table = grid("against", f"Against {other.name}", heads, rows)
    return f"<h2>Against {text(other.name)}</h2>\n<p>{text(other.verdict)}</p>\n{items(remarks)}{table}\n"


def _row(names: list[str], entries: list[str]) -> str:
    return f"<tr>{''.join(cell(text(name)) for name in names)}{''.join(entries)}</tr>"


def _plain(value: Any) -> str:
    return cell(text(value), "number")


def _heads(*names: str, numeric: range) -> list[dict[str, Any]]:
    return [
        {"head": name, "class": "number" if index in numeric else None} for index, name in enumerate(names)
    ]


def _points(front: Front) -> list[dict[str, Any]]:
    return [{str(key): value for key, value in point.items()} for point in front.points.to_dict("records")]


def _interval(pair: Pair) -> dict[str, float | None]:
    names = ("difference", "low", "high", "effect", "p", "p_holm")
    return {name: value if math.isfinite(value := getattr(pair, name)) else None for name in names}


def _ends(found: Pair | Difference) -> str:
    return f"{number(found.low)} to {number(found.high)}" if math.isfinite(found.low) else "-"


def _largest(entry: Stability) -> str:
    if entry.largest_stable_lr is None:
        return "-"
    beyond = "≥ " if entry.largest_stable_lr == entry.largest_lr else ""  # the limit may lie higher
    return f"{beyond}{entry.largest_stable_lr:g}"


def _median(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
