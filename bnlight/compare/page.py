"""The self-contained page of a comparison: one HTML file that asks nothing of the network."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from bnlight.compare import figures, table
from bnlight.compare.assets import SCRIPT, STYLE
from bnlight.compare.axes import shown
from bnlight.compare.stats import Cell, number
from bnlight.compare.verdict import is_tuned, metric_words, milliseconds

if TYPE_CHECKING:
    from bnlight.compare.comparison import Comparison

_OPEN_RUNS = 100  # a longer list of runs starts folded


def render(comparison: Comparison) -> str:
    """The page as text. Every name and message in it is escaped, and its policy forbids any request."""
    from plotly.offline import get_plotlyjs

    drawn: dict[str, Any] = {}
    body = "\n".join([
        _head(comparison), _table(comparison), _trend(comparison, drawn), _curves(comparison, drawn),
        _results(comparison, drawn),
        _broken(comparison), _runs(comparison),
    ])  # fmt: skip
    scripts = [get_plotlyjs(), SCRIPT] if drawn else []
    # Only these very scripts may run: a name that slipped through escaping still could not.
    sources = " ".join(_digest(script) for script in scripts) or "'none'"
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data: blob:; script-src {sources}"
    data = {"figures": drawn, "theme": figures.THEME} if drawn else {}
    blocks = [
        f'<script type="application/json" id="{name}">{_json(value)}</script>' for name, value in data.items()
    ]
    return "\n".join([
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{_text(table.sweep_name(comparison))}: comparison</title>",
        f"<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n{_footer(comparison)}",
        *blocks,
        *(f"<script>{script}</script>" for script in scripts),
        "</body>\n</html>\n",
    ])  # fmt: skip


def _head(comparison: Comparison) -> str:
    several = len(comparison.findings) > 1
    return "\n".join([
        f'<p class="kicker">{_text(table.sweep_name(comparison))}</p>',
        f"<h1>{_text(comparison.verdict)}</h1>",
        f'<p class="soft">{_text(table.summary(comparison))}</p>',
        _list(finding.text for finding in comparison.findings) if several else "",
        f'<div class="soft">{_list(comparison.caveats)}</div>',
    ])  # fmt: skip


def _table(comparison: Comparison) -> str:
    described = table.columns(comparison)
    heads = [(column.head, column.numeric) for column in described]
    rows = []
    cells = comparison.cells
    for index, values in enumerate(zip(*(column.values for column in described), strict=True)):
        marks = ["lead"] if table.leads(comparison, cells[index]) else []
        marks += ["section"] if index and cells[index].condition != cells[index - 1].condition else []
        entries = [
            _cell(_text(value), column.numeric) for value, column in zip(values, described, strict=True)
        ]
        rows.append(f'<tr class="{" ".join(marks)}">{"".join(entries)}</tr>')
    return f'<h2>Table</h2>\n<p class="soft">{_text(_legend_of_table(comparison))}</p>\n{_grid(heads, rows)}'


def _legend_of_table(comparison: Comparison) -> str:
    text = "Means over the done runs (n); ± is the half-width of the 95 % interval."
    if "val/accuracy" in comparison.history:
        text += (
            " Steps: the median number of optimizer steps until the validation accuracy is "
            f"{comparison.target:g} or more, and how many of the runs got there."
        )
    return text


def _trend(comparison: Comparison, drawn: dict[str, Any]) -> str:
    look = figures.look_of(comparison.cells)
    figure = figures.trend(comparison, look)
    if figure is None:
        return ""
    note = "Means over seeds with their 95 % intervals. Click a name to hide or show it."
    legend, chart = _legend(comparison, look), _block("", [figure], drawn, captions=False)
    return f'<h2>{_text(figure.title)}</h2>\n<p class="soft">{note}</p>\n{legend}\n{chart}'


def _curves(comparison: Comparison, drawn: dict[str, Any]) -> str:
    look = figures.look_of(comparison.cells)
    blocks = []
    for condition, cells in _conditions(comparison):
        names = dict.fromkeys((comparison.monitor.metric, "val/accuracy", "val/loss"))
        pair = [figures.curves(comparison, cells, name, look) for name in names]
        blocks.append(_block(condition, pair, drawn))
    if not any(blocks):
        return ""
    note = (
        "Mean over the done seeds, as far as each of them got; the band reaches from the lowest to the "
        "highest seed. Click a name to hide or show it."
    )
    if is_tuned(comparison.cells):
        note += " Of each contender the chosen setting (*) is drawn."
    head = f'<h2>Learning curves</h2>\n<p class="soft">{note}</p>\n{_legend(comparison, look)}\n'
    return head + "".join(blocks)


def _results(comparison: Comparison, drawn: dict[str, Any]) -> str:
    look = figures.look_of(comparison.cells)
    names = dict.fromkeys([comparison.metric, "seconds_per_step"])
    blocks = [
        _block(condition, [figures.dots(cells, name, look) for name in names], drawn)
        for condition, cells in _conditions(comparison)
    ]
    if not any(blocks):
        return ""
    words = metric_words(comparison.metric).capitalize()
    heading = words if comparison.metric == "seconds_per_step" else f"{words} and time per step"
    note = "Large points are means, bars their 95 % intervals, the faint points below them the single seeds."
    return f'<h2>{_text(heading)}</h2>\n<p class="soft">{note}</p>\n{"".join(blocks)}'


def _conditions(comparison: Comparison) -> list[tuple[str, list[Cell]]]:
    chosen = [cell for cell in comparison.cells if cell.chosen]
    names = dict.fromkeys(cell.condition for cell in chosen)
    return [(name, [cell for cell in chosen if cell.condition == name]) for name in names]


def _block(
    condition: str,
    drawings: Sequence[figures.Figure | None],
    drawn: dict[str, Any],
    captions: bool = True,
) -> str:
    parts = []
    for figure in filter(None, drawings):
        name = f"figure-{len(drawn)}"
        drawn[name] = figure.spec
        label = _text(f"{figure.title}{f', {condition}' if condition else ''}")
        caption = f"<figcaption>{_text(figure.title)}</figcaption>" if captions else ""
        parts.append(
            f'<figure>{caption}<div class="chart" id="{name}" role="img" aria-label="{label}"></div></figure>'
        )
    head = f"<h3>{_text(condition[:1].upper() + condition[1:])}</h3>\n" if condition else ""
    return f'{head}<div class="figures">{"".join(parts)}</div>\n' if parts else ""


def _legend(comparison: Comparison, look: figures.Look) -> str:
    dashes = {"solid": "", "dash": "6 4", "dot": "2 3"}
    buttons = []
    for name in dict.fromkeys(cell.contender for cell in comparison.cells if cell.done.size):
        colour = look.colour(name)
        line = (
            '<svg width="26" height="10" aria-hidden="true"><line x1="1" y1="5" x2="25" y2="5" '
            f'stroke="{colour}" data-colour="{colour}" stroke-width="3" '
            f'stroke-dasharray="{dashes[look.dash(name)]}"/></svg>'
        )
        index = look.index(name)
        buttons.append(
            f'<button type="button" data-index="{index}" aria-pressed="true">{line}{_text(name)}</button>'
        )
    return f'<div class="legend">{"".join(buttons)}</div>'


def _broken(comparison: Comparison) -> str:
    lost = table.broken(comparison.runs)
    if lost.empty and not comparison.notes:
        return ""
    parts = []
    for run in lost.itertuples():
        error = run.error if isinstance(run.error, str) else "no traceback was recorded"
        parts.append(
            f'<div class="error"><span class="bad">{_text(run.state)}</span> {_text(run.job)}'
            f'<code>{_text(error)}</code><a href="{_href(str(run.log))}">{_text(run.log)}</a></div>'
        )
    notes = f"<h3>Notes on reading</h3>\n{_list(comparison.notes)}" if comparison.notes else ""
    return f"<h2>What went wrong</h2>\n{''.join(parts)}{notes}"


def _runs(comparison: Comparison) -> str:
    runs, axes = comparison.runs, comparison.axes
    own = [f"best_{comparison.monitor.metric}"] if comparison.monitor.own else []
    metrics = [comparison.metric, *own, "best_val/loss", "best_val/accuracy"]
    metrics = [name for name in dict.fromkeys(metrics) if name in runs and runs[name].notna().any()]
    heads = [
        ("run", False),
        ("state", False),
        *((axes.label(key), False) for key in axes.keys),
        ("seed", True),
    ]
    heads += [(metric_words(name).replace("validation", "val."), True) for name in metrics]
    heads += [("time per step", True), ("seconds", True), ("log", False)]
    rows = []
    # In the order of the table; at the end those whose config could not be read.
    order = dict.fromkeys([*(name for cell in comparison.cells for name in cell.runs.index), *runs.index])
    for directory, run in runs.loc[list(order)].to_dict("index").items():
        known = directory in axes.values.index
        lost = run["state"] in ("failed", "diverged")
        state = f'<span class="{"bad" if lost else ""}">{_text(run["state"])}</span>'
        entries = [
            f'<td class="job"><a href="{_href(str(directory))}/">{_text(run["job"])}</a></td>',
            _cell(state),
        ]
        entries += [
            _cell(_text(shown(axes.values.at[directory, key]) if known else "-")) for key in axes.keys
        ]
        entries += [
            _cell(_text(shown(run["seed"])), True),
            *(_cell(number(run[name]), True) for name in metrics),
        ]
        entries += [_cell(milliseconds(run["seconds_per_step"]), True), _cell(number(run["seconds"]), True)]
        entries.append(_cell(f'<a href="{_href(run["log"])}">job.log</a>'))
        rows.append(f'<tr class="{"lost" if lost else ""}">{"".join(entries)}</tr>')
    fold = "" if len(rows) > _OPEN_RUNS else " open"
    grid = _grid(heads, rows, "runs")
    return f"<h2>Runs</h2>\n<details{fold}><summary>{len(rows)} runs</summary>\n{grid}</details>"


def _footer(comparison: Comparison) -> str:
    runs = comparison.runs
    lines = []
    beats = runs["heartbeat"].dropna()
    if len(beats):
        first, last = (
            datetime.fromtimestamp(float(b), UTC).strftime("%Y-%m-%d") for b in (beats.min(), beats.max())
        )
        lines.append(f"Runs last active {first}" + (f" to {last}" if last != first else "") + " (UTC).")
    for column, what in (("hardware", "Hardware"), ("versions", "Versions"), ("git", "Commit")):
        kinds = [str(kind) for kind in runs[column].dropna().unique()]
        if kinds:
            lines.append(
                f"{what}: {'; '.join(kinds[:5])}{f'; and {len(kinds) - 5} more' if len(kinds) > 5 else ''}."
            )
    lines.append(
        "Intervals: mean ± t(0.975, n - 1) · s / √n over the n done seeds of a row, s with n - 1. "
        "One seed has none."
    )
    try:
        lines.append(f"Written by bnlight {version('bnlight')}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC.")
    except PackageNotFoundError:
        lines.append(f"Written by bnlight, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC.")
    return f"<footer>{''.join(f'<p>{_text(line)}</p>' for line in lines)}</footer>"


def _grid(heads: Sequence[tuple[str, bool]], rows: Sequence[str], name: str = "") -> str:
    head = "".join(f'<th scope="col"{_number_class(numeric)}>{_text(text)}</th>' for text, numeric in heads)
    return (
        f'<div class="scroll" tabindex="0"><table class="{name}"><thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{chr(10).join(rows)}\n</tbody></table></div>"
    )


def _cell(content: str, numeric: bool = False) -> str:
    return f"<td{_number_class(numeric)}>{content}</td>"


def _number_class(numeric: bool) -> str:
    return ' class="number"' if numeric else ""


def _list(items: Iterable[str]) -> str:
    entries = "".join(f"<li>{_text(item)}</li>" for item in items)
    return f"<ul>{entries}</ul>" if entries else ""


def _text(value: Any) -> str:
    """Escaped text, in which a line never breaks around `±`."""
    return html.escape(str(value)).replace(" ± ", "\u00a0±\u00a0")


def _href(path: str) -> str:
    return html.escape("./" + quote(path))


def _json(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    return json.dumps(value, allow_nan=False, default=float).replace("<", "\\u003c")


def _digest(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
