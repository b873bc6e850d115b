"""The parts of the page in words and tables: verdict, filters, table, what went wrong, runs, footer."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from bnlight.compare import table
from bnlight.compare.axes import shown
from bnlight.compare.page import columns as page_columns
from bnlight.compare.page import data
from bnlight.compare.page.markup import attributes, cell, grid, items, text
from bnlight.compare.verdict import is_tuned

if TYPE_CHECKING:
    from bnlight.compare.comparison import Comparison

# Of a run's numbers those that are in its panel alone.
_IN_PANEL = ("steps_to_target", "seconds_to_target", "roughness", "train_eval_gap")
_OPEN_RUNS = 100  # a longer list of runs starts folded
PANEL = '<dialog id="panel" aria-labelledby="panel-title"></dialog>'


def head(comparison: Comparison) -> str:
    """The verdict in plain words, what it rests on, and what limits it."""
    several = len(comparison.findings) > 1
    name = text(table.sweep_name(comparison))
    return "\n".join([
        f'<header><p class="kicker">{name}</p><button type="button" id="theme" hidden></button></header>',
        f"<h1>{text(comparison.verdict)}</h1>",
        f'<p class="soft">{text(table.summary(comparison))}</p>',
        f'<div class="beside">{items(finding.text for finding in comparison.findings)}</div>' if several else "",
        f'<div class="soft beside">{items(comparison.caveats)}</div>',
        "<noscript><p>Figures, filters and exports need JavaScript; the words and tables do not.</p></noscript>",
    ])  # fmt: skip


def command(comparison: Comparison) -> dict[str, Any]:
    """What computes this comparison again, in the shell, and the filters it already has."""
    everything = replace(comparison, question=replace(comparison.question, where=()))
    return {"command": everything.command, "where": list(comparison.question.where)}


def filters(comparison: Comparison) -> str:
    """The form of what a reader may filter by. In a field, none ticked means all."""
    fields = []
    for number_, field in enumerate(data.filters(comparison, data.ordered(comparison))):
        boxes = "".join(
            f'<label><input type="checkbox" name="{number_}" value="{code}">{text(level)}</label>'
            for code, level in enumerate(field["levels"])
        )
        fields.append(f"<fieldset><legend>{text(field['label'])}</legend><div>{boxes}</div></fieldset>")
    if not fields:
        return ""
    return (
        f'<form id="filters" aria-label="Filters" hidden>{"".join(fields)}</form>\n'
        '<div id="filtered" role="status" hidden></div>'
    )


def table_of_cells(comparison: Comparison) -> str:
    """The table: one row per cell, with the numbers that a filter computes again."""
    described = page_columns.columns(comparison)
    rows, cells = [], comparison.cells
    for index, each in enumerate(cells):
        marks = ["lead"] if table.leads(comparison, each) else []
        marks += ["section"] if index and each.condition != cells[index - 1].condition else []
        marks += [] if each.chosen else ["tried"]
        marked = attributes({"class": " ".join(marks) or None, "data-cell": index})
        rows.append(f"<tr{marked}>{page_columns.row(comparison, each, described)}</tr>")
    note = "Means over the n seeds that are done; ± is the half-width of the 95 % interval."
    if any(column.kind == "steps" for column in described):
        note += (
            " Steps: the median number of optimizer steps until a "
            f"{comparison.aim} is reached, and how many of the runs got there."
        )
    toggles = _toggle("more", "Spread, median and worst seed")
    if is_tuned(cells):
        note += " * marks the setting chosen for a contender by its validation results."
        toggles += _toggle("tried", "All settings tried")
    heads = [column.attributes for column in described]
    table_ = grid("cells", "Table", heads, rows)
    return f'<h2>Table</h2>\n<p class="soft">{text(note)}</p>\n<div class="toggles">{toggles}</div>\n{table_}'


def broken(comparison: Comparison) -> str:
    """The runs that ended in an error, with it, and what could not be read."""
    lost = table.broken(comparison.runs)
    if lost.empty and not comparison.notes:
        return ""
    parts = []
    for run in lost.to_dict("records"):
        error = run["error"] if isinstance(run["error"], str) else "no traceback was recorded"
        path, url = data.links(comparison, run)
        where = " ".join(_links(path, url))
        parts.append(
            f'<div class="error"><span class="bad">{text(run["state"])}</span> {text(run["job"])}'
            f"<code>{text(error)}</code>{where}</div>"
        )
    shown_, folded = "".join(parts[:20]), "".join(parts[20:])
    rest = f"<details><summary>{len(parts) - 20} more</summary>{folded}</details>" if folded else ""
    notes = f"<h3>Notes on reading</h3>\n{items(comparison.notes)}" if comparison.notes else ""
    return f"<h2>What went wrong</h2>\n{shown_}{rest}{notes}"


def runs(comparison: Comparison) -> str:
    """Every run with its settings and results; its name leads to its config, log and W&B run."""
    axes, listed = comparison.axes, data.ordered(comparison)
    names = [name for name in data.columns(comparison) if name not in _IN_PANEL]
    heads = ["run", "state", *map(axes.label, axes.keys), "seed", *map(page_columns.heading, names), "links"]
    settings = axes.values[axes.keys].reindex(listed.index).map(shown).to_numpy()
    rows = []
    for index, run in enumerate(listed.to_dict("records")):
        path, url = data.links(comparison, run)
        lost = run["state"] in ("failed", "diverged")
        target = f'href="{text(path or url)}/"' if path else f'href="{text(url or "#")}"'
        entries = [f'<td class="job"><a {target} data-run="{index}">{text(run["job"])}</a></td>']
        entries.append(cell(text(run["state"]), "bad" if lost else ""))
        entries += [cell(text(value)) for value in settings[index]]
        entries.append(cell(text(shown(run["seed"])), "number"))
        entries += [page_columns.exact(page_columns.amount(name, run[name]), run[name]) for name in names]
        entries.append(cell(" ".join(_links(path, url))))
        rows.append(
            f"<tr{attributes({'class': 'lost' if lost else None, 'data-run': index})}>{''.join(entries)}</tr>"
        )
    numeric = {"seed", *map(page_columns.heading, names)}
    described = [{"head": name, "class": "number" if name in numeric else None} for name in heads]
    fold = "" if len(rows) > _OPEN_RUNS else " open"
    table_ = grid("runs", "Runs", described, rows, **{"class": "runs"})
    return f"<h2>Runs</h2>\n<details{fold}><summary>{len(rows)} runs</summary>\n{table_}</details>"


def footer(comparison: Comparison) -> str:
    """When, on what and with which versions the runs were made, and by what the page was written."""
    frame, lines = comparison.runs, []
    beats = frame["heartbeat"].dropna()
    if len(beats):
        first, last = (
            datetime.fromtimestamp(float(b), UTC).strftime("%Y-%m-%d") for b in (beats.min(), beats.max())
        )
        lines.append(f"Runs last active {first}" + (f" to {last}" if last != first else "") + " (UTC).")
    for column, what in (("hardware", "Hardware"), ("versions", "Versions"), ("git", "Commit")):
        kinds = [str(kind) for kind in frame[column].dropna().unique()]
        if kinds:
            more = f"; and {len(kinds) - 5} more" if len(kinds) > 5 else ""
            lines.append(f"{what}: {'; '.join(kinds[:5])}{more}.")
    lines.append(
        "Intervals: mean ± t(0.975, n - 1) · s / √n over the n done seeds of a row, s with n - 1. "
        "One seed has none."
    )
    lines.append(f"Written by {_program()}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC.")
    return f"<footer>{''.join(f'<p>{text(line)}</p>' for line in lines)}</footer>"


def _toggle(name: str, words: str) -> str:
    return f'<label><input type="checkbox" id="{name}">{words}</label>'


def _program() -> str:
    try:
        return f"bnlight {version('bnlight')}"
    except PackageNotFoundError:
        return "bnlight"


def _links(path: str | None, url: str | None) -> list[str]:
    found = [f'<a href="{text(path)}/job.log">job.log</a>'] if path else []
    return found + ([f'<a href="{text(url)}">W&amp;B</a>'] if url else [])
