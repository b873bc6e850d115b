"""docs/tested-against.md: each report leads somewhere, to a test that exists, and none of the tests' is left out."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "tested-against.md").read_text()
ROWS = re.findall(
    r"^\| (\[.*\]\(https://.*?\)) \| (.+?) \| (.+?) \| `(\w+\.py)::(\w+)` \|$", PAGE, re.MULTILINE
)
REPORT = re.compile(r"[\w.-]+/[\w.-]+#\d+")


def functions(file: Path) -> dict[str, str]:
    """The tests of a file, and what they say of themselves."""
    found = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)]
    return {node.name: ast.get_docstring(node) or "" for node in found}


def test_each_row_names_a_test_that_exists() -> None:
    assert len(ROWS) == len(re.findall(r"^\| \[", PAGE, re.MULTILINE)) > 40
    missing = [
        f"{file}::{name}"
        for _, _, _, file, name in ROWS
        if not (ROOT / "tests" / file).exists() or name not in functions(ROOT / "tests" / file)
    ]
    assert missing == []


def test_each_link_leads_to_the_report_that_it_names() -> None:
    links = re.findall(r"\[([^\]]+)\]\(https://github\.com/(.+?)/(?:issues|pull)/(\d+)\)", PAGE)
    assert len(links) == len(REPORT.findall(PAGE))
    assert [text for text, repository, number in links if text != f"{repository}#{number}"] == []


def test_each_report_of_a_tests_docstring_stands_in_the_row_of_that_test() -> None:
    rows: dict[str, set[str]] = {}
    for reports, _, _, _, name in ROWS:
        rows.setdefault(name, set()).update(REPORT.findall(reports))
    told = {
        name: {*REPORT.findall(docstring)}
        for file in (ROOT / "tests").glob("test_reports_*.py")
        for name, docstring in functions(file).items()
        if REPORT.search(docstring)
    }
    assert len(told) > 20
    assert {
        name: reports - rows.get(name, set())
        for name, reports in told.items()
        if reports - rows.get(name, set())
    } == {}
