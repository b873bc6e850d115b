"""Compare two sweeps: the same contender under the same condition in both, paired over common seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import pandas as pd

from bnlight.compare.axes import assign, describes, shown
from bnlight.compare.cells import make_cells
from bnlight.compare.evidence.pairs import Pair, corrected, numbers, paired
from bnlight.compare.evidence.repeats import by_repeat, repeats_of
from bnlight.compare.stats import Cell, Estimate
from bnlight.compare.verdict import metric_words

if TYPE_CHECKING:
    from bnlight.compare.comparison import Comparison

_LISTED = 5  # settings that the two hold at different values, in the text


@dataclass(frozen=True)
class Difference:
    """One contender under one condition, in both sweeps, each at its chosen setting.

    `difference` is the mean over the `n` common seeds of here minus there, `low` and `high` its 95 % interval
    (Student's t on the paired differences); `p_holm` is the paired t test's p, corrected over all differences (Holm).
    `told_apart` means `p_holm <= 0.05`, and `better` that more (of a loss, less) is here. Numbers that n does not allow
    are NaN.
    """

    condition: str
    contender: str
    here: Estimate
    there: Estimate
    n: int
    difference: float
    low: float
    high: float
    p: float
    p_holm: float
    told_apart: bool
    better: bool
    text: str


@dataclass(frozen=True)
class Against:
    """This comparison (`here`) against another (`name`).

    `verdict` is one sentence; `only_here` and `only_there` name contenders with their condition; `settings` are what
    the two hold fixed at different values, any of which may be the cause of a difference.
    """

    name: str
    metric: str
    verdict: str
    differences: list[Difference]
    only_here: list[str]
    only_there: list[str]
    settings: list[str]

    @property
    def lines(self) -> list[str]:
        """What stands below the verdict: each difference, what only one has, and what else differs."""
        lines = [one.text for one in self.differences]
        lines += [f"only here: {', '.join(self.only_here)}"] if self.only_here else []
        lines += [f"only in {self.name}: {', '.join(self.only_there)}"] if self.only_there else []
        more = f" and {len(self.settings) - _LISTED} more" if len(self.settings) > _LISTED else ""
        differ = f"the two also differ in {'; '.join(self.settings[:_LISTED])}{more}"
        return [*lines, differ] if self.settings else lines


def find_against(here: Comparison, there: Comparison) -> Against:
    """Pair the chosen cells of both. Each is grouped by what varies in either of them."""
    keys = [*here.axes.keys, *here.axes.averaged, *there.axes.keys, *there.axes.averaged]
    keys = list(dict.fromkeys(keys))
    lower = here.monitor.lower(here.metric)
    mine, theirs = _sides(here, keys, here), _sides(there, keys, here)
    common = [key for key in mine if key in theirs]
    pairs = []
    for key in common:
        both = (mine[key].results - theirs[key].results).dropna()
        pairs.append(paired(*key, "", both.groupby(level="seed").mean().to_numpy(dtype=float)))
    tested = zip(common, corrected(pairs), strict=True)
    differences = [_difference(pair, mine[key].cell, theirs[key].cell, lower) for key, pair in tested]
    name = ", ".join(there.sources)
    return Against(
        name=name,
        metric=here.metric,
        verdict=_verdict(differences, name, here.metric),
        differences=differences,
        only_here=[_named(*key) for key in mine if key not in theirs],
        only_there=[_named(*key) for key in theirs if key not in mine],
        settings=_settings(here.configs, there.configs, keys),
    )


class _Side(NamedTuple):
    cell: Cell
    results: pd.Series


def _sides(side: Comparison, keys: Sequence[str], here: Comparison) -> dict[tuple[str, str], _Side]:
    """The chosen cells of one side, by condition and contender, with their results by repeat."""
    axes = assign(keys, side.configs, here.axes.searched, *here.axes.asked)
    repeats = repeats_of(side.configs, axes)
    cells = make_cells(side.runs, axes, here.metric, here.monitor, repeats)
    return {
        (cell.condition, cell.contender): _Side(cell, by_repeat(cell, here.metric, repeats))
        for cell in cells
        if cell.chosen
    }


def _difference(pair: Pair, here: Cell, there: Cell, lower: bool) -> Difference:
    shared = {name: getattr(pair, name) for name in ("condition", "n", "difference", "low", "high", "p")}
    found = Difference(
        **shared,
        contender=pair.better,
        here=here.metric,
        there=there.metric,
        p_holm=pair.p_holm,
        told_apart=pair.told_apart,
        better=pair.difference < 0 if lower else pair.difference > 0,
        text="",
    )
    return replace(found, text=_text(found, pair))


def _text(one: Difference, pair: Pair) -> str:
    what = _named(one.condition, one.contender)
    missing = [side for side, value in (("here", one.here), ("there", one.there)) if not value.n]
    if missing:
        return f"{what}: no result {' nor '.join(missing)}."
    values = f"{one.here} here, {one.there} there"
    if one.n < 2:
        seeds = "one seed" if one.n else "no seed"
        return f"{what}: {values}; {seeds} in common, which proves nothing."
    says = ("better here" if one.better else "worse here") if one.told_apart else "cannot be told apart"
    return f"{what}: {says}, {values} ({one.n} common seeds: {numbers(pair, one.here.mean)})."


def _verdict(differences: Sequence[Difference], name: str, metric: str) -> str:
    if not differences:
        return f"Nothing is in both: no contender of {name} is here under the same condition."
    paired_up = [one for one in differences if one.n > 1]
    apart = [one for one in paired_up if one.told_apart]
    better = sum(one.better for one in apart)
    counts = {
        "better here": better,
        "worse here": len(apart) - better,
        "not told apart": len(paired_up) - len(apart),
        "without two common seeds": len(differences) - len(paired_up),
    }
    said = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    many = f"{len(differences)} contender{'s are' if len(differences) > 1 else ' is'} in both"
    return f"Against {name} by {metric_words(metric)}, {many}: {said}."


def _named(condition: str, contender: str) -> str:
    return f"{contender} at {condition}" if condition else contender


def _settings(here: pd.DataFrame, there: pd.DataFrame, keys: Sequence[str]) -> list[str]:
    """What each side holds at one value of its own: `optimizer.momentum: 0.9 here, 0.8 there`."""
    different = []
    for key in map(str, here.columns.intersection(there.columns)):
        values = [{shown(value) for value in side[key].unique()} for side in (here, there)]
        fixed = len(values[0]) == len(values[1]) == 1
        if fixed and values[0] != values[1] and describes(key) and key not in keys:
            different.append(f"{key}: {values[0].pop()} here, {values[1].pop()} there")
    return different
