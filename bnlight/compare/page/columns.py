"""The columns of the page's table: each says how its entries follow from the runs of a cell.

The script fills the same columns again from the runs that a filter leaves, so a column is data: a `kind` and
the number of a run (`of`) it is about.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from bnlight.compare.axes import shown
from bnlight.compare.page.markup import cell as entry
from bnlight.compare.page.markup import number_class, text
from bnlight.compare.stats import Cell, number
from bnlight.compare.table import describe_states
from bnlight.compare.verdict import is_tuned, metric_words, milliseconds

if TYPE_CHECKING:
    from bnlight.compare.comparison import Comparison


@dataclass(frozen=True)
class Column:
    """One column. `more` columns are shown on request only."""

    head: str
    kind: str
    of: str = ""
    more: bool = False

    @property
    def numeric(self) -> bool:
        return self.kind not in ("setting", "lost")

    @property
    def attributes(self) -> dict[str, Any]:
        """The head and the attributes of the column's `th`."""
        classes = " ".join(filter(None, [number_class(self.numeric), "more" if self.more else ""]))
        return {
            "head": self.head,
            "class": classes or None,
            "data-kind": self.kind,
            "data-of": self.of or None,
        }


def columns(comparison: Comparison) -> list[Column]:
    """What varies, n, the metric with its interval, and what else the runs have."""
    cells, axes, metric = comparison.cells, comparison.axes, comparison.metric
    words, runs = metric_words(metric), comparison.runs
    found = [Column(axes.label(key), "setting", key) for key in axes.keys]
    # Runs without the metric, or several of one seed.
    if any(len(cell.done) != cell.metric.n for cell in cells):
        found.append(Column("runs", "runs"))
    found.append(Column("n", "n", metric))
    if any(cell.states for cell in cells):
        found.append(Column("not done", "lost"))
    found.append(Column(f"{words} mean ± 95 % CI", "interval", metric))
    found += [Column(f"{words} {kind}", kind, metric, more=True) for kind in ("std", "median", "worst")]
    if any(cell.metric.boot for cell in cells):
        found.append(Column(f"{words} 95 % bootstrap", "boot", metric, more=True))
    if metric != "best_val/loss" and _has(runs, "best_val/loss"):
        found.append(Column("best validation loss", "mean", "best_val/loss"))
    if _has(runs, "steps_to_target"):
        found.append(Column(f"steps to {comparison.target:g}", "steps", "steps_to_target"))
    if _has(runs, "seconds_per_step"):
        found.append(Column("time per step", "time", "seconds_per_step"))
    return found


def row(comparison: Comparison, cell: Cell, described: list[Column]) -> str:
    """The entries of one cell's row."""
    starred = is_tuned(comparison.cells)
    entries = []
    for column in described:
        content, exact = _entry(column, cell)
        star = '<span class="star"> *</span>' if column.kind == "interval" and starred and cell.chosen else ""
        classes = (number_class(column.numeric), "more" if column.more else "")
        entries.append(entry(text(content) + star, *classes, **exact))
    return "".join(entries)


def _entry(column: Column, cell: Cell) -> tuple[str, dict[str, Any]]:
    """What is shown, and the exact numbers behind it for an export."""
    if column.kind == "setting":
        return shown(cell.settings[column.of]), {}
    if column.kind in ("runs", "n"):
        return str(len(cell.done) if column.kind == "runs" else cell.metric.n), {}
    if column.kind == "lost":
        return describe_states(cell.states), {}
    if column.kind == "steps":
        steps, n = ("-" if cell.steps is None else f"{cell.steps:g}"), cell.ended
        return (f"{steps} ({cell.reached}/{n})" if n else "-"), _exact(cell.steps)
    if column.kind == "boot":
        ends = cell.metric.boot
        return (f"{number(ends[0])} to {number(ends[1])}" if ends else "-"), {}
    found = {"best_val/loss": cell.best_loss, "seconds_per_step": cell.seconds}.get(column.of, cell.metric)
    if column.kind == "interval":
        return str(found), _exact(found.mean) | _exact(found.half_width, "data-half")
    if column.kind == "time":
        return milliseconds(found.mean), _exact(found.mean)
    value = getattr(found, column.kind)
    return number(value), _exact(value)


def amount(name: str, value: float) -> str:
    """A number of a run in the unit that its name implies."""
    if name == "peak_memory" and math.isfinite(value):
        return f"{value / 2**20:.0f} MiB"
    return milliseconds(value) if name == "seconds_per_step" else number(value)


def heading(name: str) -> str:
    """A run's number in the few words of a column's head."""
    return "time per step" if name == "seconds_per_step" else metric_words(name).replace("validation", "val.")


def exact(content: str, value: float) -> str:
    """An entry that carries the exact number for an export."""
    return entry(text(content), "number", **_exact(value))


def _exact(value: float | None, name: str = "data-value") -> dict[str, Any]:
    return {name: None if value is None or not math.isfinite(value) else repr(float(value))}


def _has(runs: pd.DataFrame, name: str) -> bool:
    return name in runs and bool(runs[name].notna().any())
