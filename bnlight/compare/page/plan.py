"""Which figures fit a sweep: decided by the axes that vary, by what was measured and by what went wrong."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from bnlight.compare.axes import shown
from bnlight.compare.page.data import axis
from bnlight.compare.stats import Cell
from bnlight.compare.verdict import is_tuned, metric_words

if TYPE_CHECKING:
    from bnlight.compare.comparison import Comparison

_LINES, _MAPS = 6, 3  # at most so many numeric axes, and pairs of them, are drawn
_MANY = 4  # axes from which on parallel coordinates help
_OPEN = 4  # settings whose figures are open when there are more of them
_PAIRS = 15  # comparisons in one forest plot; of more, those with the leader


@dataclass(frozen=True)
class Figure:
    """One figure: how it is drawn, its title, and what that drawing needs to know."""

    kind: str
    title: str
    options: dict[str, Any] = field(default_factory=dict)
    wide: bool = False

    @property
    def label(self) -> str:
        """The title with its condition, which the heading above may have said already."""
        condition = self.options.get("condition", "")
        return self.title if self.title.endswith(condition) else f"{self.title}, {condition}"

    @property
    def spec(self) -> dict[str, Any]:
        return {"kind": self.kind, **self.options}


@dataclass(frozen=True)
class Section:
    """Figures under one heading. `groups` are (name, figures); those after the first `opened` start folded."""

    title: str
    note: str
    groups: list[tuple[str, list[Figure]]]
    opened: int = 10_000


def histories(comparison: Comparison) -> list[str]:
    """The metrics whose curves are drawn: what the jobs monitored, validation accuracy and loss, or the training's."""
    known = [str(name) for name in comparison.history if comparison.history[name].notna().any()]
    wanted = dict.fromkeys((comparison.monitor.metric, "val/accuracy", "val/loss"))
    drawn = [name for name in wanted if name in known]
    return drawn or [name for name in known if "/" in name][:2]


def sections(comparison: Comparison) -> list[Section]:
    """The sections of figures, in the order of the page; those without any figure are left out."""
    if not any(cell.metric.n for cell in comparison.cells):
        return []
    found = [
        _against(comparison), _maps(comparison), _parallel(comparison), _curves(comparison), _results(comparison),
    ]  # fmt: skip
    return [section for section in found if any(figures for _, figures in section.groups)]


def _against(comparison: Comparison) -> Section:
    axes, words = comparison.axes, metric_words(comparison.metric).capitalize()
    figures = []
    for key in _numeric(comparison)[:_LINES]:
        label = axes.label(key)
        others = [other for other in axes.conditions if other != key]
        seen = [cell for cell in comparison.cells if cell.metric.n and (cell.chosen or key in axes.tuned)]
        facets: dict[tuple[str, ...], list[Cell]] = {}
        for cell in seen:
            facets.setdefault(tuple(_setting(cell, other) for other in others), []).append(cell)
        for facet, cells in facets.items():
            if len({_setting(cell, key) for cell in cells}) < 2:
                continue
            where = dict(zip(others, facet, strict=True))
            place = ", ".join(f"{axes.label(other)} = {value}" for other, value in where.items())
            title = f"{words} against {label}{f', {place}' if place else ''}"
            figures.append(Figure("line", title, {"x": key, "where": where}))
    tuned = [figure for figure in figures if figure.options["x"] in axes.tuned]
    figures = [*(figure for figure in figures if figure not in tuned), *_divergence(comparison), *tuned]
    figures = [replace(figure, wide=len(figures) == 1) for figure in figures]
    note = "Means over seeds with their 95 % intervals. A point leads to its runs."
    if len(axes.tuned) > 1:
        note += " Where several tuned settings share a point, it is the best of them by validation."
    return Section(f"{words} against what was swept", note, [("", figures)])


def _maps(comparison: Comparison) -> Section:
    axes, words = comparison.axes, metric_words(comparison.metric)
    figures = []
    for x, y in itertools.combinations(_numeric(comparison), 2):
        if {x, y} & set(axes.contenders) or len(_levels(comparison, x)) * len(_levels(comparison, y)) < 6:
            continue
        title = f"Mean {words} over {axes.label(x)} and {axes.label(y)}"
        figures.append(Figure("heat", title, {"x": x, "y": y}, wide=True))
    note = "One map per contender, all on one scale; each field is the mean over its done seeds, an empty one has none."
    if len(axes.keys) - len(axes.contenders) > 2:
        note += " Fields average over the settings that are not drawn: the filters pin those."
    return Section("Two settings at once", note, [("", figures[:_MAPS])])


def _parallel(comparison: Comparison) -> Section:
    axes = comparison.axes
    many = len(axes.keys) >= (_MANY - 1 if axes.searched else _MANY)
    figures = [Figure("parallel", "Every run through all settings", wide=True)] if many else []
    note = "One line per done run, from its settings to its result."
    return Section("All settings at once", note, [("", figures)])


def _curves(comparison: Comparison) -> Section:
    figures = [(metric_words(name).capitalize(), name) for name in histories(comparison)]
    groups = [
        (name, [Figure("curves", title, {"metric": metric, "condition": name}) for title, metric in figures])
        for name in _conditions(comparison)
    ]
    note = "Mean over the done seeds, as far as all of them got."
    if is_tuned(comparison.cells):
        note += " Of each contender the chosen setting (*) is drawn."
    return Section("Learning curves", note, groups, _opened(groups))


def _results(comparison: Comparison) -> Section:
    metrics = dict.fromkeys([comparison.metric, "seconds_per_step"])
    timed = any(cell.seconds.n for cell in comparison.cells)
    names = [name for name in metrics if name != "seconds_per_step" or timed]
    groups = [
        (c, [Figure("dots", _dots_title(name), {"metric": name, "condition": c}) for name in names])
        for c in _conditions(comparison)
    ]
    note = "Large points are means, bars their 95 % intervals, the faint points below them the single runs."
    return Section("Every seed", note, groups, _opened(groups))


def _dots_title(metric: str) -> str:
    return "Time per step" if metric == "seconds_per_step" else metric_words(metric).capitalize()


def evidence(comparison: Comparison) -> dict[str, list[Figure]]:
    """The figures of the evidence, by the part they belong to: `ranking`, `pairs`, `fronts`."""
    found = comparison.evidence
    words = metric_words(comparison.metric)
    ranking = [Figure("ranks", f"Mean ranks by {words}", wide=True)] if found.ranking else []
    pairs = [
        Figure("forest", f"Differences of {words}{f', {c}' if c else ''}", {"pairs": numbers})
        for c, numbers in _forests(comparison).items()
    ]
    fronts = [
        Figure("front", _front_title(front, condition), {"front": number, "condition": condition})
        for number, front in enumerate(found.fronts)
        for condition in dict.fromkeys(front.points["condition"])
    ]
    return {"ranking": ranking, "pairs": pairs, "fronts": fronts}


def _front_title(front: Any, condition: str) -> str:
    place = f", {condition}" if condition else ""
    return f"{metric_words(front.quality).capitalize()} against {metric_words(front.cost)}{place}"


def _forests(comparison: Comparison) -> dict[str, list[int]]:
    """The pairs of each condition, by number; where there are many, those with the leader."""
    pairs = comparison.evidence.pairs
    forests: dict[str, list[int]] = {}
    for number, pair in enumerate(pairs):
        forests.setdefault(pair.condition, []).append(number)
    for condition, numbers in forests.items():
        led = [number for number in numbers if pairs[number].leading]
        forests[condition] = numbers if len(numbers) <= _PAIRS else led
    return forests


def _divergence(comparison: Comparison) -> list[Figure]:
    if not (comparison.runs["state"] == "diverged").any():
        return []
    rates = [key for key in _numeric(comparison) if key.rpartition(".")[2] in ("lr", "learning_rate")]
    return [Figure("divergence", "Diverged runs by learning rate", {"x": key}) for key in rates[:1]]


def _numeric(comparison: Comparison) -> list[str]:
    return [key for key in comparison.axes.keys if axis(comparison, key)["numeric"]]


def _levels(comparison: Comparison, key: str) -> list[str]:
    levels: list[str] = axis(comparison, key)["levels"]
    return levels


def _setting(cell: Cell, key: str) -> str:
    return shown(cell.settings[key])


def _conditions(comparison: Comparison) -> list[str]:
    return list(dict.fromkeys(cell.condition for cell in comparison.cells if cell.chosen and cell.metric.n))


def _opened(groups: list[Any]) -> int:
    return len(groups) if len(groups) <= _OPEN else _OPEN // 2
