"""The page as one HTML document: its parts in order, its data, and a policy that forbids any request."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING

from bnlight.compare import table
from bnlight.compare.page import evidence, plan, sections
from bnlight.compare.page.data import payload
from bnlight.compare.page.markup import compact, text
from bnlight.compare.page.pictures import Pictures

if TYPE_CHECKING:
    from bnlight.compare.comparison import Comparison

SCRIPTS = (
    "runs.js", "figures.js", "settings.js", "evidence.js", "export.js", "page.js", "filter.js", "panel.js", "begin.js",
)  # fmt: skip


def render(comparison: Comparison) -> str:
    """The page as text. Every name and message in it is escaped, and its policy forbids any request."""
    from plotly.offline import get_plotlyjs

    pictures = Pictures()
    body = "\n".join([
        sections.head(comparison), sections.filters(comparison), sections.table_of_cells(comparison),
        pictures.sections(plan.sections(comparison)), evidence.render(comparison, pictures),
        sections.broken(comparison), sections.runs(comparison),
    ])  # fmt: skip
    data = payload(comparison, plan.histories(comparison))
    data |= {"figures": pictures.specs, **sections.command(comparison), **evidence.payload(comparison)}
    scripts = [*([get_plotlyjs()] if pictures.specs else []), script()]
    # Only these very scripts may run: a name that slipped through escaping still could not.
    sources = " ".join(_digest(source) for source in scripts)
    policy = (
        "default-src 'none'; base-uri 'none'; form-action 'none'; style-src 'unsafe-inline'; img-src data: blob:; "
        f"script-src {sources}"
    )
    return "\n".join([
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{text(table.sweep_name(comparison))}: comparison</title>",
        f"<style>{_read('page.css')}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n{sections.footer(comparison)}",
        sections.PANEL,
        f'<script type="application/json" id="data">{compact(data)}</script>',
        *(f"<script>{source}</script>" for source in scripts),
        "</body>\n</html>\n",
    ])  # fmt: skip


@cache
def script() -> str:
    """The page's own script: its files in one scope of their own."""
    return '(() => {\n"use strict";\n' + "\n".join(map(_read, SCRIPTS)) + "})();\n"


def _read(name: str) -> str:
    return files("bnlight.compare.page").joinpath(name).read_text(encoding="utf-8")


def _digest(source: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"
