"""A comparison as Markdown, LaTeX, CSV or JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from bnlight.compare.beyond import beyond
from bnlight.compare.table import Column, columns, leads, plain, summary, sweep_name
from bnlight.compare.verdict import is_tuned, metric_words

if TYPE_CHECKING:
    from bnlight.compare.comparison import Comparison

_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"}
_LATEX |= {sign: rf"\{sign}" for sign in "&%$#_{}"} | {"<": r"\textless{}", ">": r"\textgreater{}"}
_LATEX |= {"≥": r"$\geq$", "≤": r"$\leq$", "·": r"\textperiodcentered{}"}


def markdown(described: Sequence[Column], bold: Sequence[bool] = ()) -> str:
    """A table as GitHub's Markdown has it; `bold` marks rows."""

    def cell(text: str) -> str:
        return re.sub(r"([\\|*_`<])", r"\\\1", " ".join(text.split()))

    head = "| " + " | ".join(cell(column.head) for column in described) + " |"
    rule = "|" + "|".join("--:" if column.numeric else ":--" for column in described) + "|"
    rows = []
    for index, row in enumerate(zip(*(column.values for column in described), strict=True)):
        texts = [cell(value) for value in row]
        if index < len(bold) and bold[index]:
            texts = [f"**{text}**" if text else "" for text in texts]
        rows.append("| " + " | ".join(texts) + " |")
    return "\n".join([head, rule, *rows])


def latex(described: Sequence[Column], bold: Sequence[bool] = (), caption: str = "") -> str:
    r"""A `table` for the package booktabs, escaped; `bold` marks rows. It needs `\usepackage{booktabs}`."""
    lines = [r"\begin{table}", r"\centering"]
    lines += [rf"\caption{{{escaped(caption)}}}"] if caption else []
    lines += [rf"\begin{{tabular}}{{{''.join('r' if column.numeric else 'l' for column in described)}}}"]
    lines += [r"\toprule", " & ".join(escaped(column.head) for column in described) + r" \\", r"\midrule"]
    for index, row in enumerate(zip(*(column.values for column in described), strict=True)):
        texts = [escaped(value) for value in row]
        if index < len(bold) and bold[index]:
            texts = [rf"\textbf{{{text}}}" if text else "" for text in texts]
        lines.append(" & ".join(texts) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"])


def escaped(text: str) -> str:
    """Text in which nothing is a command of LaTeX, on one line."""
    return "".join(_LATEX.get(sign, sign) for sign in " ".join(text.split()))


def as_markdown(comparison: Comparison) -> str:
    """Verdict, table and caveats as a document."""
    findings = [f"- {finding.text}" for finding in comparison.findings if len(comparison.findings) > 1]
    parts = [
        f"## {sweep_name(comparison)}",
        summary(comparison),
        f"**{comparison.verdict}**",
        "\n".join(findings),
        markdown(columns(comparison, spread=True), _leading(comparison)),
        "\n".join(f"- {text}" for text in beyond(comparison)),
        "\n".join(f"- {caveat}" for caveat in comparison.caveats),
    ]
    if comparison.against:
        lines = [f"- {line}" for line in comparison.against.lines]
        parts += [f"**{comparison.against.verdict}**", "\n".join(lines)]
    return "\n\n".join(part for part in parts if part)


def as_latex(comparison: Comparison) -> str:
    """The table, its caption the verdict."""
    chosen = f" *: chosen by {metric_words(comparison.tuned_by or '')}." if is_tuned(comparison.cells) else ""
    return latex(columns(comparison), _leading(comparison), comparison.verdict + chosen)


def as_csv(comparison: Comparison) -> str:
    """One line per cell, with every number in full."""
    return comparison.table.to_csv(index=False).rstrip("\n")


def as_json(comparison: Comparison) -> str:
    """All that was found; what is no finite number is null."""
    cells = [
        {
            "contender": cell.contender,
            "condition": cell.condition,
            "settings": cell.settings,
            "chosen": cell.chosen,
            "states": {"done": len(cell.done), **cell.states},
            "seeds": cell.seeds,
            "metric": cell.metric,
            "validation": cell.validation,
            "best_val_loss": cell.best_loss,
            "seconds_per_step": cell.seconds,
            "steps_to_target": cell.steps,
            "reached": cell.reached,
            "runs": list(cell.runs.index),
        }
        for cell in comparison.cells
    ]
    axes = comparison.axes
    content = {
        "sources": comparison.sources,
        "question": comparison.question,
        "metric": comparison.metric,
        "tuned_by": comparison.tuned_by,
        "terms": comparison.terms,
        "axes": {name: getattr(axes, name) for name in ("contenders", "conditions", "tuned", "averaged")},
        "verdict": comparison.verdict,
        "findings": comparison.findings,
        "cells": cells,
        "evidence": comparison.evidence,
        "against": comparison.against,
        "caveats": comparison.caveats,
        "notes": comparison.notes,
        "written": [] if comparison.unwritten else [comparison.results_csv, comparison.page],
    }
    return json.dumps(_jsonable(content), indent=2, allow_nan=False, ensure_ascii=False)


def _leading(comparison: Comparison) -> list[bool]:
    return [leads(comparison, cell) for cell in comparison.cells]


def _jsonable(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _jsonable(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): _jsonable(child) for key, child in value.items()}
    if isinstance(value, pd.DataFrame):
        return [_jsonable(row) for row in value.to_dict("records")]
    if isinstance(value, (list, tuple, set)):
        return [_jsonable(child) for child in value]
    if isinstance(value, np.generic):
        return _jsonable(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value


FORMATS: dict[str, Callable[[Comparison], str]] = {
    "text": plain,
    "markdown": as_markdown,
    "latex": as_latex,
    "csv": as_csv,
    "json": as_json,
}
