"""Say in plain words what the evidence supports, and what it does not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from bnlight.compare.axes import Axes, shown, sortable
from bnlight.compare.derive import Monitor
from bnlight.compare.stats import NO_MONITOR, Cell, validation_metric

INTERVALS = (
    "Intervals are 95 % Student-t intervals of the mean over seeds: they cover the randomness of the seed, "
    "not the choice of data or of hyperparameters."
)


@dataclass(frozen=True)
class Finding:
    """What one condition shows: the best contender, if any, and whether it stands alone."""

    condition: str
    best: str | None
    clear: bool
    text: str


def metric_words(metric: str) -> str:
    """`test/accuracy` is "test accuracy", `best_val/loss` is "best validation loss"."""
    return metric.replace("best_val/", "best validation ").replace("val/", "validation ").translate(_SPACES)


_SPACES = str.maketrans("/_", "  ")


def findings(cells: Sequence[Cell], metric: str, monitor: Monitor = NO_MONITOR) -> list[Finding]:
    """One finding per condition, in the order of the table."""
    conditions = dict.fromkeys(cell.condition for cell in cells)
    lower = monitor.lower(metric)
    return [
        _finding(c, [x for x in cells if x.condition == c and x.chosen], metric, lower) for c in conditions
    ]


def headline(found: Sequence[Finding], axes: Axes, metric: str, monitor: Monitor = NO_MONITOR) -> str:
    """The one sentence a comparison opens with."""
    decided = [finding for finding in found if finding.best]
    if not decided:
        return found[0].text if len(found) == 1 else f"No run has finished with a {metric_words(metric)} yet."
    if len(decided) == 1:
        return decided[0].text
    named = " and ".join(axes.label(key) for key in axes.conditions)
    wins: dict[str, list[Finding]] = {}
    for finding in decided:
        wins.setdefault(str(finding.best), []).append(finding)
    has = f"the {_superlative(monitor.lower(metric))} mean {metric_words(metric)}"
    if len(wins) == 1:
        text = f"{decided[0].best} has {has} at all {len(decided)} settings of {named}"
    else:
        first, *rest = sorted(wins, key=lambda name: -len(wins[name]))
        others = ", ".join(f"{name} {_places(wins[name])}" for name in rest)
        text = f"No single winner over {named}: {first} has {has} {_places(wins[first])}, {others}"
    clear = sum(finding.clear for finding in decided)
    where = f"at {clear} of the {len(decided)} settings" if clear < len(decided) else "everywhere"
    if clear == 0:
        return f"{text}; nowhere do the 95 % intervals separate the best from the rest."
    return f"{text}; the 95 % intervals separate the best from the rest {where}."


def caveats(
    runs: pd.DataFrame,
    cells: Sequence[Cell],
    axes: Axes,
    metric: str,
    configs: pd.DataFrame,
    monitor: Monitor = NO_MONITOR,
) -> list[str]:
    """What a careful reader would ask about, where it applies to these runs."""
    notes = [INTERVALS] if any(cell.metric.half_width is not None for cell in cells) else []
    lost = {state: int((runs["state"] == state).sum()) for state in ("failed", "diverged")}
    if any(lost.values()):
        counts = " and ".join(f"{count} {state}" for state, count in lost.items() if count)
        notes.append(
            f"{counts} of {len(runs)} runs are in no mean. Means over the survivors flatter a norm that "
            "sometimes breaks, so read them together with the runs that are not done."
        )
    if is_tuned(cells):
        by = validation_metric(metric, runs, monitor)
        names = ", ".join(axes.label(key) for key in axes.tuned)
        how = metric_words(by) if by else f"{metric_words(metric)} itself, which is optimistic"
        notes.append(f"Each contender is judged at its own best {names} (marked *), chosen by {how}.")
        notes.extend([] if axes.searched else _edges(cells, axes))  # of values drawn, one is always outermost
    if "norm" in axes.contenders and "optimizer.lr" in configs and configs["optimizer.lr"].nunique() == 1:
        rate = shown(configs["optimizer.lr"].dropna().iloc[0])
        notes.append(
            f"All norms share one learning rate ({rate}), and another norm may win at its own. Sweep "
            "optimizer.lr as well, and each norm is judged at its best."
        )
    return notes + _unequal(runs, cells)


def is_tuned(cells: Sequence[Cell]) -> bool:
    """Whether some contender had several settings to choose from."""
    return any(not cell.chosen for cell in cells)


def _edges(cells: Sequence[Cell], axes: Axes) -> list[str]:
    """A best value at the edge of what was tried may lie beyond it."""
    notes = []
    for key in axes.tuned:
        at_edge: list[str] = []
        for cell in cells:
            tried = (
                {sortable(x.settings[key]) for x in cells if x.contender == cell.contender}
                if cell.chosen
                else ()
            )
            numeric = sorted(value for value in tried if value[0] == 0)
            if len(numeric) > 1 and sortable(cell.settings[key]) in (numeric[0], numeric[-1]):
                at_edge.append(cell.contender)
        if at_edge:
            names = ", ".join(dict.fromkeys(at_edge))
            notes.append(
                f"The best {axes.label(key)} lies at the edge of those tried for {names}: try beyond it."
            )
    return notes


def _unequal(runs: pd.DataFrame, cells: Sequence[Cell]) -> list[str]:
    notes = []
    seeds = {frozenset(cell.done["seed"].dropna()) for cell in cells if cell.chosen and len(cell.done)}
    if len(seeds) > 1:
        notes.append("Not every contender has finished on the same seeds.")
    kinds = runs[runs["state"] == "done"][["hardware", "versions"]].nunique()
    if kinds["hardware"] > 1:
        notes.append(f"The runs come from {kinds['hardware']} kinds of hardware: times do not compare.")
    if kinds["versions"] > 1:
        notes.append(f"The runs come from {kinds['versions']} sets of software versions.")
    return notes


def _finding(condition: str, cells: Sequence[Cell], metric: str, lower: bool) -> Finding:
    where = f"At {condition}: " if condition else ""
    words = metric_words(metric)
    ranked = [cell for cell in cells if cell.metric.n]
    if not ranked:
        start = f"At {condition}, no" if condition else "No"
        return Finding(condition, None, False, f"{start} run has finished with a {words} yet.")
    best, others = ranked[0], ranked[1:]
    value = f"{best.metric} (n = {best.metric.n} seed{'s' if best.metric.n > 1 else ''})"
    lead = f"{where}{_name(best)} has the {_superlative(lower)} mean {words}, {value}"
    close = [cell for cell in others if not _apart(best, cell)]
    clear = False
    if not others:
        text = f"{where}{_name(best)} has a mean {words} of {value}; there is nothing to compare it with."
    elif best.metric.half_width is None:
        text = f"{lead}, but one seed gives no interval, so the lead may be chance: run more seeds."
    elif close:
        alone = any(cell.metric.half_width is None for cell in close)
        why = "overlap or, with one seed, are missing" if alone else "overlap"
        text = f"{lead}, but these seeds cannot tell it apart from {_list(close)}: the 95 % intervals {why}."
        rest = len(others) - len(close)
        worse = "higher" if lower else "lower"
        if rest:
            text += (
                f" The other {rest if rest > 1 else 'one'} {'lie' if rest > 1 else 'lies'} clearly {worse}."
            )
    else:
        clear = True
        text = f"{lead}; its 95 % interval overlaps with no other, the nearest being {_list(others[:1])}."
    return Finding(condition, best.contender, clear, text)


def _superlative(lower: bool) -> str:
    return "lowest" if lower else "highest"


def _places(found: Sequence[Finding]) -> str:
    """Where a contender leads: `at 8 and 16`, or a count where there are many."""
    if len(found) > 3 or any("," in finding.condition for finding in found):
        return f"at {len(found)} settings" if len(found) > 1 else "at 1 setting"
    values = [finding.condition.partition(" = ")[2] for finding in found]
    return "at " + " and ".join([", ".join(values[:-1]), values[-1]] if len(values) > 1 else values)


def _apart(best: Cell, other: Cell) -> bool:
    if other.metric.half_width is None:
        return False
    return best.metric.low > other.metric.high or best.metric.high < other.metric.low


def _name(cell: Cell) -> str:
    lost = [f"{cell.states[state]} {state}" for state in ("failed", "diverged") if state in cell.states]
    return f"{cell.contender} ({', '.join(lost)})" if lost else cell.contender


def _list(cells: Sequence[Cell], limit: int = 2) -> str:
    named = [f"{cell.contender} ({cell.metric})" for cell in cells[:limit]]
    rest = len(cells) - limit
    if rest > 0:
        return f"{', '.join(named)} and {rest} more"
    return " and ".join(named)


def milliseconds(seconds: float) -> str:
    """A duration per step with three digits, in a unit that reads well."""
    if not math.isfinite(seconds):
        return "-"
    value, unit = (seconds, "s") if seconds >= 1 else (seconds * 1e3, "ms")
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:.{digits}f} {unit}"
