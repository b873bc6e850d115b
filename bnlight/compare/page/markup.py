"""Small pieces of HTML, in which every name and message is escaped."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence
from typing import Any
from urllib.parse import quote


def text(value: Any) -> str:
    """Escaped text, in which a line never breaks around `±` or before `%`."""
    return html.escape(str(value)).replace(" ± ", "\u00a0±\u00a0").replace(" %", "\u00a0%")


def link(path: str) -> str:
    """A relative address, in which a `:` or `#` of a name stays part of the name."""
    return quote(path) if path.startswith("../") else "./" + quote(path)


def items(entries: Iterable[str]) -> str:
    lines = "".join(f"<li>{text(entry)}</li>" for entry in entries)
    return f"<ul>{lines}</ul>" if lines else ""


def attributes(values: dict[str, Any]) -> str:
    """` name="value"` for each value but None and False; True is the name alone."""
    given = ((name, value) for name, value in values.items() if value is not None and value is not False)
    return "".join(
        f" {name}" if value is True else f' {name}="{html.escape(str(value))}"' for name, value in given
    )


def cell(content: str, *classes: str, **more: Any) -> str:
    kinds = " ".join(filter(None, classes)) or None
    return f"<td{attributes({'class': kinds} | more)}>{content}</td>"


def number_class(numeric: bool) -> str:
    return "number" if numeric else ""


def grid(name: str, title: str, heads: Sequence[dict[str, Any]], rows: Sequence[str], **more: Any) -> str:
    """A table that scrolls inside the page, with the buttons that export it.

    Each of `heads` has a `head` and the attributes of its `th`.
    """
    titles = "".join(
        f'<th scope="col"{attributes({k: v for k, v in head.items() if k != "head"})}>{text(head["head"])}</th>'
        for head in heads
    )
    label = attributes({"aria-label": title})
    return (
        f'<div class="scroll" tabindex="0" role="region"{label}><table id="{name}"{attributes(more)}>'
        f"<thead><tr>{titles}</tr></thead>\n<tbody>\n{chr(10).join(rows)}\n</tbody></table></div>\n"
        f'<div class="exports" data-table="{name}"></div>'
    )


def compact(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    return json.dumps(value, allow_nan=False, separators=(",", ":"), default=float).replace("<", "\\u003c")
