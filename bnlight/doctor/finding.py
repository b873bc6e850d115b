"""What the doctor says."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

SHOWN = 3
"""So many layers are named in a line, then only their number."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or worth knowing: which `check` found it, in which `layers` (paths), what to do.

    A "warning" changes results or stops a training; a "note" is worth knowing.
    """

    check: str
    severity: Literal["warning", "note"]
    layers: tuple[str, ...]
    problem: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.problem}{self.where()}. {self.remedy}"

    def where(self, shown: int = SHOWN) -> str:
        """The layers in words, such as ` (in a, b, c and 4 more)`; empty if there are none."""
        if not self.layers:
            return ""
        more = len(self.layers) - shown
        names = ", ".join(path or "the model itself" for path in self.layers[:shown])
        return f" (in {names}{f' and {more} more' if more > 0 else ''})"


class Diagnosis(list[Finding]):
    """Findings, warnings first; prints as a table."""

    def __init__(self, findings: Iterable[Finding] = ()) -> None:
        super().__init__(sorted(findings, key=lambda finding: finding.severity != "warning"))

    @property
    def warnings(self) -> list[Finding]:
        """The findings that are more than notes."""
        return [finding for finding in self if finding.severity == "warning"]

    def __str__(self) -> str:
        if not self:
            return "Nothing found."
        lines = []
        for finding in self:
            lines.append(f"{finding.severity:<7}  {finding.check}")
            for label, text in (
                ("what", f"{finding.problem}{finding.where(12)}"),
                ("remedy", finding.remedy),
            ):
                lines += textwrap.wrap(
                    f"{text}.", 96, initial_indent=f"  {label:<7}", subsequent_indent=" " * 9
                )
        return "\n".join(lines)
