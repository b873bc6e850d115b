"""The figures of a comparison, as plain plotly dictionaries: curves, dot plots, a trend over conditions."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from bnlight.compare.axes import shown, sortable
from bnlight.compare.stats import Cell, Estimate
from bnlight.compare.verdict import metric_words

if TYPE_CHECKING:
    from bnlight.compare.comparison import Comparison

# Okabe and Ito's order of hues, darkened where they are too faint for a line on white: (light, dark page).
# They stay apart under the common colour blindnesses; from the ninth contender on the dash changes as well.
PALETTE = (
    ("0,114,178", "86,172,240"),
    ("213,94,0", "255,140,80"),
    ("0,148,108", "52,199,152"),
    ("170,68,153", "224,134,212"),
    ("176,130,0", "240,192,76"),
    ("96,100,108", "186,190,198"),
    ("136,34,85", "240,110,158"),
    ("46,150,200", "150,220,250"),
)
INK, RULE = ("32,36,43", "226,229,234"), ("225,228,233", "50,56,66")
THEME = dict([*PALETTE, INK, RULE])  # a colour on the light page -> the same on the dark page
DASHES, SYMBOLS = ("solid", "dash", "dot"), ("circle", "diamond", "square")
_POINTS = 300  # of one curve: more are not seen


@dataclass(frozen=True)
class Figure:
    """One figure: what it shows in words, and what plotly needs."""

    title: str
    data: list[dict[str, Any]]
    layout: dict[str, Any] = field(default_factory=dict)

    @property
    def spec(self) -> dict[str, Any]:
        return {"data": self.data, "layout": self.layout}


@dataclass(frozen=True)
class Look:
    """The colour, dash and marker of each contender, the same in every figure."""

    names: list[str]

    def index(self, name: str) -> int:
        return self.names.index(name)

    def colour(self, name: str, alpha: float = 1.0) -> str:
        triple = PALETTE[self.index(name) % len(PALETTE)][0]
        return f"rgb({triple})" if alpha == 1.0 else f"rgba({triple},{alpha})"

    def dash(self, name: str) -> str:
        return DASHES[self.index(name) // len(PALETTE) % len(DASHES)]

    def symbol(self, name: str) -> str:
        return SYMBOLS[self.index(name) // len(PALETTE) % len(SYMBOLS)]


def look_of(cells: Sequence[Cell]) -> Look:
    """Colours go by name, not by rank: a norm keeps its colour when another one takes the lead."""
    return Look(sorted({cell.contender for cell in cells}))


def curves(comparison: Comparison, cells: Sequence[Cell], metric: str, look: Look) -> Figure | None:
    """`metric` against the optimizer step: the mean over seeds, and a band from the lowest to the highest."""
    alpha = 0.14 if len(cells) <= 6 else 0.07
    bands: list[dict[str, Any]] = []
    lines: list[dict[str, Any]] = []
    for cell in cells:
        curve = mean_curve(comparison.history, list(cell.done.index), metric)
        if curve is None:
            continue
        x, name = curve.index.tolist(), _safe(cell.contender)
        common = {"meta": look.index(cell.contender), "name": name, "type": "scatter", "showlegend": False}
        if cell.metric.n > 1:
            y = [*_values(curve["high"]), *_values(curve["low"])[::-1]]
            fill = {"fill": "toself", "fillcolor": look.colour(cell.contender, alpha), "hoverinfo": "skip"}
            bands.append(common | fill | {"x": [*x, *x[::-1]], "y": y, "mode": "lines", "line": {"width": 0}})
        line = {"color": look.colour(cell.contender), "width": 2, "dash": look.dash(cell.contender)}
        mode = "lines" if len(x) > 1 else "markers"
        hover = f"{name}<br>step %{{x}}: %{{y:.4g}}<extra></extra>"
        marker = {"color": line["color"], "symbol": look.symbol(cell.contender)}
        lines.append(
            common
            | {"x": x, "y": _values(curve["mean"]), "mode": mode, "line": line, "marker": marker}
            | {"hovertemplate": hover}
        )
    if not lines:
        return None
    words = metric_words(metric)
    values = [v for trace in [*lines, *bands] for v in trace["y"] if v is not None]
    log = "loss" in metric and min(values) > 0
    layout = _layout("optimizer steps", f"{words}{' (log scale)' if log else ''}", 340)
    layout["xaxis"] |= {"rangemode": "tozero"}
    layout["yaxis"] |= _log_axis(min(values), max(values)) if log else {}
    return Figure(words.capitalize(), [*bands, *lines], layout)


def mean_curve(history: pd.DataFrame, directories: Sequence[str], metric: str) -> pd.DataFrame | None:
    """Mean, lowest and highest of `metric` over the runs, by step, as far as every run got.

    Where the runs were measured at different steps, each is interpolated linearly between its own.
    """
    if metric not in history:
        return None
    part = history[history["directory"].isin(directories)][["step", "directory", metric]]
    part = part.replace([np.inf, -np.inf], np.nan).dropna()
    if part.empty:
        return None
    runs = part.pivot_table(index="step", columns="directory", values=metric)
    runs = runs.interpolate(method="index", limit_area="inside").dropna()
    if runs.empty:
        return None
    if len(runs) > _POINTS:
        runs = runs.iloc[np.unique(np.linspace(0, len(runs) - 1, _POINTS).round().astype(int))]
    return pd.DataFrame({"mean": runs.mean(axis=1), "low": runs.min(axis=1), "high": runs.max(axis=1)})


def dots(cells: Sequence[Cell], metric: str, look: Look) -> Figure | None:
    """The mean of `metric` with its interval, one row per contender, and each seed as a faint point below."""
    timed = metric == "seconds_per_step"
    scale, words = (1000.0, "milliseconds per step") if timed else (1.0, metric_words(metric))
    drawn = [(cell, value) for cell in cells if (value := cell.seconds if timed else cell.metric).n]
    if not drawn:
        return None
    data: list[dict[str, Any]] = []
    for row, (cell, value) in enumerate(drawn):
        name, colour, symbol = _safe(cell.contender), look.colour(cell.contender), look.symbol(cell.contender)
        base = {"type": "scatter", "mode": "markers", "showlegend": False, "name": name}
        runs = cell.done[cell.done[metric].notna()]
        data.append(base | {
            "x": (runs[metric] * scale).tolist(), "y": [row + 0.3] * len(runs),
            "text": [f"{name}, seed {_safe(shown(seed))}" for seed in runs["seed"]],
            "marker": {"color": colour, "size": 7, "opacity": 0.45, "symbol": symbol},
            "hovertemplate": "%{text}: %{x:.4g}<extra></extra>",
        })  # fmt: skip
        bar = {"type": "data", "array": [(value.half_width or 0.0) * scale], "color": colour, "thickness": 2}
        data.append(base | {
            "x": [value.mean * scale], "y": [row],
            "marker": {"color": colour, "size": 10, "symbol": symbol},
            "hovertemplate": f"{name}: mean %{{x:.4g}} (n = {value.n})<extra></extra>",
        } | ({"error_x": bar | {"width": 5}} if value.half_width is not None else {}))  # fmt: skip
    layout = _layout(words, None, 84 + 36 * len(drawn))
    names = [_safe(cell.contender) for cell, _ in drawn]
    rows = {"tickvals": list(range(len(names))), "ticktext": names, "range": [len(names) - 0.35, -0.6]}
    layout["yaxis"] |= rows | {"gridcolor": "rgba(0,0,0,0)", "ticklabelstandoff": 6}
    return Figure(words.capitalize(), data, layout)


def trend(comparison: Comparison, look: Look) -> Figure | None:
    """The metric of each contender against the one numeric condition (a batch size), if there is just one."""
    if len(comparison.axes.conditions) != 1:
        return None
    key = comparison.axes.conditions[0]
    chosen = [cell for cell in comparison.cells if cell.chosen and cell.metric.n]
    where = {cell.condition: sortable(cell.settings[key]) for cell in chosen}
    if len(where) < 2 or any(kind != 0 for kind, _, _ in where.values()):
        return None
    ticks = sorted({value for _, value, _ in where.values()})
    data = []
    for name in look.names:
        points = sorted((where[c.condition][1], c.metric) for c in chosen if c.contender == name)
        if not points:
            continue
        colour = look.colour(name)
        data.append({
            "type": "scatter", "mode": "lines+markers", "name": _safe(name), "showlegend": False,
            "meta": look.index(name), "x": [x for x, _ in points], "y": [value.mean for _, value in points],
            "error_y": _bars([value for _, value in points], colour),
            "line": {"color": colour, "width": 2, "dash": look.dash(name)},
            "marker": {"color": colour, "size": 7, "symbol": look.symbol(name)},
            "hovertemplate": f"{_safe(name)}<br>%{{x}}: %{{y:.4g}}<extra></extra>",
        })  # fmt: skip
    words, label = metric_words(comparison.metric), comparison.axes.label(key)
    layout = _layout(_safe(label), words, 380)
    log = ticks[0] > 0 and ticks[-1] / ticks[0] >= 4
    layout["xaxis"] |= {"type": "log"} if log else {}
    layout["xaxis"] |= {"tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}
    return Figure(f"{words.capitalize()} against {label}", data, layout)


def _layout(x: str, y: str | None, height: int) -> dict[str, Any]:
    ink, rule = f"rgb({INK[0]})", f"rgb({RULE[0]})"
    axis = {
        "gridcolor": rule,
        "linecolor": rule,
        "zeroline": False,
        "automargin": True,
        "title": {"standoff": 10},
    }
    font = {"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 13, "color": ink}
    clear = "rgba(0,0,0,0)"
    return {
        "font": font,
        "height": height,
        "margin": {"l": 8, "r": 16, "t": 10, "b": 8},
        "paper_bgcolor": clear,
        "plot_bgcolor": clear,
        "hovermode": "closest",
        "xaxis": axis | {"title": {"text": x, "standoff": 10, "font": {"size": 13}}},
        "yaxis": axis | ({"title": {"text": y, "standoff": 10, "font": {"size": 13}}} if y else {}),
    }


def _log_axis(low: float, high: float) -> dict[str, Any]:
    """A log axis with whole numbers: 1, 2, 5 of each decade; only 1 over many decades."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if len(decades) <= 5 else (1,)
    ticks = [step * 10.0**decade for decade in decades for step in steps]
    return {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}


def _bars(values: Sequence[Estimate], colour: str) -> dict[str, Any]:
    halves = [value.half_width or 0.0 for value in values]
    return {"type": "data", "array": halves, "color": colour, "thickness": 1.5, "width": 4}


def _values(column: pd.Series) -> list[float | None]:
    return [float(value) if math.isfinite(value) else None for value in column]


def _safe(text: Any) -> str:
    """Plotly reads a subset of HTML in every text."""
    return html.escape(str(text))
