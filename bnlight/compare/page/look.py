"""How each contender looks in every figure: a colour, and a marker and a dash that say the same without colour."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from bnlight.compare.palette import COLOURS, hexadecimal, slots

DASHES = ("solid", "dash", "dot", "dashdot")
MARKERS = ("circle", "square", "diamond", "triangle-up", "cross", "triangle-down", "star", "pentagon")


def looks(names: Iterable[str]) -> list[dict[str, Any]]:
    """One look per name, by name and not by rank: a norm keeps its colour when another takes the lead."""
    return [{"name": name} | _look(slot) for name, slot in slots(names).items()]


def _look(slot: int) -> dict[str, Any]:
    # One further in each round of colours, so that two of one colour differ in marker and dash.
    turn = slot + slot // len(COLOURS)
    return {
        "colour": [hexadecimal(slot), hexadecimal(slot, dark=True)],
        "dash": DASHES[turn % len(DASHES)],
        "symbol": MARKERS[turn % len(MARKERS)],
    }
