"""The terminal's view of a comparison: verdict, table, what went wrong, and where everything lies."""

from __future__ import annotations

import io
import math
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bnlight.compare.axes import shown
from bnlight.compare.beyond import beyond
from bnlight.compare.stats import Cell, number
from bnlight.compare.verdict import is_tuned, metric_words, milliseconds

if TYPE_CHECKING:
    from bnlight.compare.comparison import Comparison

_LISTED = 10  # failed jobs and notes printed in full; the rest are in results.csv


@dataclass(frozen=True)
class Column:
    """One column of the table, the same in the terminal and on the page."""

    head: str
    values: list[str]
    numeric: bool = True


def columns(comparison: Comparison, spread: bool = False) -> list[Column]:
    """The columns: what varies, n, the metric with its interval, and what else the runs have.

    With `spread`, the metric's standard deviation, bootstrap interval, median and worst value as well.
    """
    cells, axes = comparison.cells, comparison.axes
    result = [
        Column(axes.label(key), [shown(cell.settings[key]) for cell in cells], numeric=False)
        for key in axes.keys
    ]
    runs = [len(cell.done) for cell in cells]
    if runs != [cell.metric.n for cell in cells]:  # some without the metric, or several of one seed
        result.append(Column("runs", [str(count) for count in runs]))
    result.append(Column("n", [str(cell.metric.n) for cell in cells]))
    lost = [describe_states(cell.states) for cell in cells]
    if any(lost):
        result.append(Column("not done", lost, numeric=False))
    starred = is_tuned(cells)
    values = [
        f"{cell.metric}{(' *' if cell.chosen and cell.metric.n else '  ') if starred else ''}"
        for cell in cells
    ]
    result.append(Column(f"{metric_words(comparison.metric)}\nmean ± 95 % CI", values))
    if spread:
        metric = [cell.metric for cell in cells]
        boots = [f"{number(m.boot[0])} to {number(m.boot[1])}" if m.boot else "-" for m in metric]
        result.append(Column("std", [number(m.std) for m in metric]))
        result.append(Column("95 % bootstrap", boots))
        result.append(Column("median", [number(m.median) for m in metric]))
        result.append(Column("worst", [number(m.worst) for m in metric]))
    if any(cell.best_loss.n for cell in cells) and comparison.metric != "best_val/loss":
        result.append(Column("best validation\nloss", [number(cell.best_loss.mean) for cell in cells]))
    if any(cell.reached for cell in cells):
        share = "acc" in (comparison.aimed_at or "") and 0 <= comparison.target <= 1
        target = f"{comparison.target * 100:g} %" if share else f"{comparison.aimed_at} {comparison.target:g}"
        result.append(Column(f"steps to\n{target}", [_steps(c) for c in cells]))
    if any(cell.seconds.n for cell in cells):
        result.append(Column("time per\nstep", [milliseconds(cell.seconds.mean) for cell in cells]))
    return result


def describe_states(states: dict[str, int]) -> str:
    """`1 diverged, 2 running`."""
    return ", ".join(f"{count} {state}" for state, count in sorted(states.items()))


def numbers(cell: Cell, metric: str) -> dict[str, Any]:
    """A cell as one flat row of numbers."""
    row: dict[str, Any] = dict(cell.settings)
    row |= {"n": cell.metric.n, "done": len(cell.done), "failed": cell.states.get("failed", 0)}
    row |= {"diverged": cell.states.get("diverged", 0)}
    row["unfinished"] = sum(cell.states.values()) - row["failed"] - row["diverged"]
    estimates = {metric: cell.metric, "best_val/loss": cell.best_loss, "seconds_per_step": cell.seconds}
    for name, value in estimates.items():
        row |= {f"{name} mean": value.mean, f"{name} std": value.std, f"{name} ci95": value.half_width}
        low, high = value.boot or (math.nan, math.nan)
        row |= {f"{name} boot low": low, f"{name} boot high": high}
        row |= {f"{name} median": value.median, f"{name} worst": value.worst}
    return row | {"steps_to_target": cell.steps, "reached": cell.reached, "chosen": cell.chosen}


def summary(comparison: Comparison) -> str:
    """What ran: how many jobs, in which state, on what, for how long."""
    runs = comparison.runs
    counts = {str(state): int(count) for state, count in runs["state"].value_counts().items()}
    states = describe_states({state: count for state, count in counts.items() if state != "done"})
    parts = [
        f"{len(runs)} job{'s' * (len(runs) != 1)}, {counts.get('done', 0)} done"
        + (f", {states}" if states else "")
    ]
    for column in ("model", "data"):
        names = [str(name) for name in runs[column].dropna().unique()]
        if len(names) == 1:
            parts.append(f"{column} {names[0]}")
    hardware = runs["hardware"].dropna().unique()
    if len(hardware) == 1:
        parts.append(str(hardware[0]))
    if runs["seconds"].notna().any():
        parts.append(f"{duration(float(runs['seconds'].sum()))} of training in all")
    return " · ".join(parts)


def duration(seconds: float) -> str:
    """`42 s`, `3 min 20 s`, `5 h 12 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.3g} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def plain(comparison: Comparison) -> str:
    """The whole text without colours, as wide as the table needs."""
    text = io.StringIO()
    render(comparison, _plain_console(text))
    return "\n".join(line.rstrip() for line in text.getvalue().rstrip().split("\n"))


def console_for_stdout() -> Console:
    """A console on stdout; where that is no terminal, plain and wide enough for any table."""
    return Console() if sys.stdout.isatty() else _plain_console(sys.stdout)


def render(comparison: Comparison, console: Console) -> None:
    """Print everything to `console`."""
    grid = _grid(comparison)
    # A file has no width of its own: there the text wraps at the table's width, at least at 80.
    # In a terminal too narrow for the numbers, the terminal's own wrapping loses less than cutting would.
    size = console.measure(grid)
    width = max(console.width, size.minimum) if console.is_terminal else max(80, size.maximum)

    def say(text: str, style: str = "", first: str = "", then: str = "") -> None:
        lines = textwrap.wrap(text, width, initial_indent=first, subsequent_indent=then,
                              break_long_words=False, break_on_hyphens=False)  # fmt: skip
        _line(console, Text("\n".join(lines), style=style))

    say(f"{sweep_name(comparison)}: {summary(comparison)}")
    console.print()
    if comparison.terms:
        say(comparison.terms, style="italic")
    console.print(grid, width=width)
    console.print()
    say(comparison.verdict, style="bold")
    for finding in comparison.findings if len(comparison.findings) > 1 else []:
        say(finding.text, first="  - ", then="    ")
    for text in beyond(comparison):
        say(text)
    for caveat in comparison.caveats:
        say(caveat, style="dim")
    if comparison.against:
        console.print()
        say(comparison.against.verdict, style="bold")
        for text in comparison.against.lines:
            say(text, first="  - ", then="    ")
    _trouble(comparison, console)
    _paths(comparison, console)


def _grid(comparison: Comparison) -> Table:
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    described = columns(comparison)
    for column in described:
        longest = max(len(word) for value in column.values for word in value.split(", "))
        grid.add_column(
            Text(column.head),
            justify="right" if column.numeric else "left",
            overflow="fold",
            vertical="bottom",
            no_wrap=column.numeric,
            min_width=min(24, longest),
        )
    cells = comparison.cells
    for index, row in enumerate(zip(*(column.values for column in described), strict=True)):
        last = index + 1 < len(cells) and cells[index + 1].condition != cells[index].condition
        style = "bold" if leads(comparison, cells[index]) else None
        grid.add_row(*(_entry(value) for value in row), style=style, end_section=last)
    return grid


def _entry(value: str) -> Text:
    return Text(value.replace(", ", "\n"))


def leads(comparison: Comparison, cell: Cell) -> bool:
    """Whether the cell has the best mean under its condition."""
    found = [f for f in comparison.findings if f.condition == cell.condition]
    return cell.chosen and any(finding.best == cell.contender for finding in found)


def sweep_name(comparison: Comparison) -> str:
    """The sweep's name; of several, all of them; the directory's where the jobs do not know one."""
    names = [str(name) for name in comparison.runs["sweep"].dropna().unique()]
    if not names or len(names) > 4:
        return comparison.directory.resolve().name
    return ", ".join(names)


def broken(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs that ended in an error."""
    return runs[runs["state"].isin(["failed", "diverged"])]


def _trouble(comparison: Comparison, console: Console) -> None:
    runs = comparison.runs
    lost = broken(runs)
    if len(lost):
        console.print()
    for run in _first(list(lost.itertuples())):
        reason = run.error if isinstance(run.error, str) else "no traceback was recorded"
        _line(console, Text.assemble((f"{run.state} ", "red"), run.job, ": ", reason))
        kept = isinstance(run.log, str)  # or it is a run of W&B
        where = (
            comparison.directory / run.log if kept else run.url if isinstance(run.url, str) else run.source
        )
        _line(console, Text(f"  {where}"))
    _more(console, len(lost), "failed or diverged jobs are in results.csv")
    unfinished = runs[runs["state"].isin(["running", "preempted", "interrupted"])]
    if len(unfinished):
        _line(console, Text(f"{len(unfinished)} not finished: {', '.join(_first(list(unfinished['job'])))}"))
        _line(console, Text("  running the same sweep again resumes what is not running"))
    for note in _first(comparison.notes):
        _line(console, Text(f"note: {note}", style="yellow"))
    _more(console, len(comparison.notes), "notes are in comparison.html")


def _paths(comparison: Comparison, console: Console) -> None:
    console.print()
    for place in comparison.places():
        _line(console, Text(place))
    offline = " ".join(comparison.runs["wandb"]).split()
    if 0 < len(offline) <= 3:
        for name in offline:
            _line(console, Text(f"{comparison.directory / name} (W&B, offline)"))
    elif offline:
        pattern: Path = comparison.directory / "*/wandb/offline-run-*"
        _line(console, Text(f"{pattern} ({len(offline)} W&B runs, offline)"))


def _plain_console(file: Any) -> Console:
    return Console(file=file, width=10_000, color_system=None, force_terminal=False, highlight=False)


def _line(console: Console, text: Text) -> None:
    """A line that is not broken, so a path can be copied."""
    console.print(text, soft_wrap=True, highlight=False)


def _first(items: Sequence[Any]) -> Sequence[Any]:
    return items[:_LISTED]


def _more(console: Console, count: int, where: str) -> None:
    if count > _LISTED:
        _line(console, Text(f"... and {count - _LISTED} more: all {count} {where}"))


def _steps(cell: Cell) -> str:
    if not cell.ended:
        return "-"
    return f"{'-' if cell.steps is None else f'{cell.steps:g}'} ({cell.reached}/{cell.ended})"
