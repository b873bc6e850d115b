"""Say in plain words what the evidence supports."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from bnlight.compare.axes import Axes
from bnlight.compare.derive import Monitor
from bnlight.compare.evidence.pairs import Pair, numbers
from bnlight.compare.stats import Cell


@dataclass(frozen=True)
class Finding:
    """What one condition shows: the best contender, if any, and whether the tests tell it from all its `rivals`."""

    condition: str
    best: str | None
    clear: bool
    text: str
    rivals: int = 0


def metric_words(metric: str) -> str:
    """`test/accuracy` is "test accuracy", `best_val/loss` is "best validation loss"."""
    return metric.replace("best_val/", "best validation ").replace("val/", "validation ").translate(_SPACES)


_SPACES = str.maketrans("/_", "  ")


def is_tuned(cells: Sequence[Cell]) -> bool:
    """Whether some contender had several settings to choose from."""
    return any(not cell.chosen for cell in cells)


def terms(cells: Sequence[Cell], axes: Axes) -> str:
    """On which terms the contenders meet: `Each at its own best lr.` or `All at shared settings.`

    Empty where nothing is compared.
    """
    if not any(cell.metric.n for cell in cells):
        return ""
    if is_tuned(cells):
        return f"Each at its own best {' and '.join(axes.label(key) for key in axes.tuned)}."
    return "All at shared settings." if len({cell.contender for cell in cells}) > 1 else ""


def findings(cells: Sequence[Cell], metric: str, monitor: Monitor, pairs: Sequence[Pair]) -> list[Finding]:
    """One finding per condition, in the order of the table."""
    chosen: dict[str, list[Cell]] = {cell.condition: [] for cell in cells}
    for cell in cells:
        chosen[cell.condition] += [cell] if cell.chosen else []
    tested: dict[str, list[Pair]] = {}
    for pair in pairs:
        tested.setdefault(pair.condition, []).append(pair)
    lower = monitor.lower(metric)
    return [_finding(name, group, tested.get(name, []), metric, lower) for name, group in chosen.items()]


def headline(found: Sequence[Finding], axes: Axes, metric: str, monitor: Monitor) -> str:
    """The one sentence a comparison opens with."""
    decided = [finding for finding in found if finding.best]
    if not decided:
        return found[0].text if len(found) == 1 else f"No run has finished with a {metric_words(metric)} yet."
    missing = len(found) - len(decided)
    rest = f" {missing} {'others have' if missing > 1 else 'other has'} no result yet." if missing else ""
    if len(decided) == 1:
        return decided[0].text + rest
    named = " and ".join(axes.label(key) for key in axes.conditions)
    every = f"at {'both' if len(decided) == 2 else f'all {len(decided)}'} settings of {named}"
    wins: dict[str, list[Finding]] = {}
    for finding in decided:
        wins.setdefault(str(finding.best), []).append(finding)
    if not any(finding.rivals for finding in decided):
        return f"{' and '.join(wins)} stands alone {every}: there is nothing to compare it with.{rest}"
    has = f"the {_superlative(monitor.lower(metric))} mean {metric_words(metric)}"
    if len(wins) == 1:
        text = f"{decided[0].best} has {has} {every}"
    else:
        first, *others = sorted(wins, key=lambda name: -len(wins[name]))
        places = ", ".join(f"{name} {_places(wins[name])}" for name in others)
        text = f"No single winner over {named}: {first} has {has} {_places(wins[first])}, {places}"
    clear = sum(finding.clear for finding in decided)
    if clear == 0:
        return f"{text}; nowhere can these seeds tell the best from all others.{rest}"
    where = f"at {clear} of the {len(decided)} settings" if clear < len(decided) else "everywhere"
    return f"{text}; these seeds tell the best from all others {where}.{rest}"


def _finding(
    condition: str, cells: Sequence[Cell], pairs: Sequence[Pair], metric: str, lower: bool
) -> Finding:
    at, words = f" at {condition}" if condition else "", metric_words(metric)
    ranked = [cell for cell in cells if cell.metric.n]
    without = "".join(f" {_name(cell)} has no result." for cell in cells if not cell.metric.n)
    if not ranked:
        return Finding(condition, None, False, f"No run has finished with a {words}{at} yet.")
    best, others = ranked[0], ranked[1:]
    n = f"n = {best.metric.n} seed{'s' if best.metric.n > 1 else ''}"
    if not others:
        text = f"{_name(best)} has a mean {words} of {best.metric} ({n}){at}; there is nothing to compare it with."
        return Finding(condition, best.contender, False, text + without)
    pair_of = {frozenset((pair.better, pair.worse)): pair for pair in pairs}
    met = {cell.contender: pair_of[frozenset((best.contender, cell.contender))] for cell in others}
    beaten = [cell for cell in others if _beats(best, met[cell.contender])]
    ahead = [cell for cell in others if _beats(cell, met[cell.contender])]
    close = [cell for cell in others if not met[cell.contender].told_apart]

    def told(cells: Sequence[Cell]) -> str:
        first = f"{_name(cells[0])} ({_evidence(met[cells[0].contender], best)})"
        return _list([first, *map(_name, cells[1:])])

    alike = {pair.n for pair in met.values()} == {best.metric.n}
    with_these = f"With these {best.metric.n} seeds" if alike else "With these seeds"
    if best.metric.n == 1:
        lead = f"{_name(best)} has the {_superlative(lower)} {words}{at}, {best.metric} ({n})"
        text = f"{lead}, but one seed gives no interval, so the lead may be chance: run more seeds."
    elif len(beaten) < len(others):
        lead = f"{with_these}, {_name(best)} has the {_superlative(lower)} mean {words}{at}, {best.metric}"
        says = [f"is worse than {told(ahead)}"] if ahead else []
        says += [f"cannot be told apart from {told(close)}"] if close else []
        text = f"{lead}, but {' and '.join(says)}."
        text += f" It is better than {_list([_name(cell) for cell in beaten])}." if beaten else ""
    else:
        whom = {1: _name(others[0]), 2: "both others"}.get(len(others), f"all {len(others)} others")
        nearest = min(met.values(), key=lambda pair: pair.difference)
        which = f"the nearest, {nearest.worse}: " if len(others) > 1 else ""
        lead = f"{with_these}, {_name(best)} is better than {whom}{at}: {words} {best.metric}"
        text = f"{lead} ({which}{_evidence(nearest, best)})."
    return Finding(condition, best.contender, len(beaten) == len(others), text + without, len(others))


def _beats(cell: Cell, pair: Pair) -> bool:
    return pair.told_apart and pair.better == cell.contender


def _evidence(pair: Pair, best: Cell) -> str:
    """The numbers behind a comparison with the best, over the seeds that both have finished."""
    if pair.n < 2:
        return f"only {pair.n} seed in common" if pair.n else "no seed in common"
    ahead = f"{pair.better} ahead on the common seeds: " if pair.better != best.contender else ""
    shown = f"{ahead}{numbers(pair, best.metric.mean)}"
    if pair.more_seeds:
        plural = "s" if pair.more_seeds > 1 else ""
        return f"{shown}; about {pair.more_seeds} more seed{plural} would be needed"
    return shown


def _superlative(lower: bool) -> str:
    return "lowest" if lower else "highest"


def _places(found: Sequence[Finding]) -> str:
    """Where a contender leads: `at 8 and 16`, or a count where there are many."""
    if len(found) > 3 or any("," in finding.condition for finding in found):
        return f"at {len(found)} settings" if len(found) > 1 else "at 1 setting"
    values = [finding.condition.partition(" = ")[2] for finding in found]
    return "at " + " and ".join([", ".join(values[:-1]), values[-1]] if len(values) > 1 else values)


def _name(cell: Cell) -> str:
    lost = [f"{cell.states[state]} {state}" for state in ("failed", "diverged") if state in cell.states]
    return f"{cell.contender} ({', '.join(lost)})" if lost else cell.contender


def _list(names: Sequence[str], limit: int = 3) -> str:
    if len(names) > limit:
        return f"{', '.join(names[: limit - 1])} and {len(names) - limit + 1} more"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def milliseconds(seconds: float) -> str:
    """A duration per step with three digits, in a unit that reads well."""
    if not math.isfinite(seconds):
        return "-"
    value, unit = (seconds, "s") if seconds >= 1 else (seconds * 1e3, "ms")
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:.{digits}f} {unit}"
