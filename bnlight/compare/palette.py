"""The colours of what is compared: the same on the page, in a W&B report and in a workspace.

>>> slots(["group", "batch"])
{'batch': 0, 'group': 1}
>>> hexadecimal(0)
'#0072b2'
"""

from __future__ import annotations

from collections.abc import Iterable

# Okabe and Ito's order of hues, darkened where they are too faint for a line on white: (light, dark page).
# They stay apart under the common colour blindnesses.
COLOURS = (
    ("0,114,178", "86,172,240"),
    ("213,94,0", "255,140,80"),
    ("0,148,108", "52,199,152"),
    ("170,68,153", "224,134,212"),
    ("176,130,0", "240,192,76"),
    ("96,100,108", "186,190,198"),
    ("136,34,85", "240,110,158"),
    ("46,150,200", "150,220,250"),
)
# Each has the colour of its place, in every sweep in which no one before it has taken that.
NORMS = (
    "batch", "group", "layer", "renorm", "instance", "none", "full", "rms",
    "batch_layer", "frn", "switchable", "tanh", "batch_instance",
)  # fmt: skip


def slots(names: Iterable[str]) -> dict[str, int]:
    """A slot for each name: `slot % 8` is its colour, `slot // 8` tells apart those that share one.

    A norm has its own colour wherever that is free, else the next free one; with all eight taken, a second
    round begins. So a name keeps its slot when the results, or their order, change.
    """
    own = {name: place for place, name in enumerate(NORMS)}
    taken: dict[str, int] = {}
    for name in sorted({*names}, key=lambda name: (own.get(name, len(own)), name)):
        first = own.get(name, len(taken)) % len(COLOURS)
        dash = len(taken) // len(COLOURS) * len(COLOURS)
        free = (dash + (first + step) % len(COLOURS) for step in range(len(COLOURS)))
        taken[name] = next(slot for slot in free if slot not in taken.values())
    return taken


def hexadecimal(slot: int, dark: bool = False) -> str:
    """The colour of a slot as `#rrggbb`, on a light page or a dark one."""
    return "#" + "".join(f"{int(part):02x}" for part in COLOURS[slot % len(COLOURS)][dark].split(","))
