"""What the benchmarks' commands have in common: their options, what they say first and last, tables, the JSON file."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

STYLE: dict[str, Any] = {
    "title_justify": "left",
    "title_style": "bold",
    "box": None,
    "padding": (0, 1, 0, 0),
    "pad_edge": False,
}


class Options(argparse.ArgumentParser):
    """The parser of `bnlight bench NAME`, with the options that every benchmark has.

    Args:
        name: of the benchmark.
        about: what it measures.
        rounds: the default of `--rounds`.
        what: a round is.
        layers: it runs layers in this process, so `--threads` and `--device` are options too.
    """

    def __init__(self, name: str, about: str | None, *, rounds: int, what: str, layers: bool = True) -> None:
        super().__init__(prog=f"bnlight bench {name}", description=about)
        self.add_argument("--rounds", type=positive, default=rounds, help=f"{what} (default: {rounds})")
        self.add_argument("--json", type=Path, metavar="FILE", help="write all numbers to FILE")
        if layers:
            self.add_argument("--threads", type=positive, default=1, help="of the CPU (default: 1)")
            self.add_argument("--device", choices=["cpu", "cuda"], default="cpu")

    def checked(self, arguments: Sequence[str]) -> argparse.Namespace:
        """The options; argparse prints what is wrong and exits with 2."""
        options = self.parse_args(arguments)
        if getattr(options, "device", "cpu") == "cuda" and not torch.cuda.is_available():
            self.error("--device cuda: torch sees no GPU here")
        if options.json is not None and not options.json.absolute().parent.is_dir():
            self.error(f"--json: there is no folder {options.json.absolute().parent}")
        return options


def positive(text: str) -> int:
    """An option's value that is a number of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return int(text)


class Report:
    """What a benchmark prints and writes: first what ran where, and in the end how long it took."""

    def __init__(self, about: Mapping[str, Any], *explained: str) -> None:
        self.console, self.about, self.begun = Console(), about, time.perf_counter()
        self.say(", ".join(f"{key} {value}" for key, value in about.items() if key != "what"))
        for line in (*([about["what"]] if "what" in about else []), *explained):
            self.say(line)
        self.console.print()

    def say(self, line: str) -> None:
        """A line that the terminal may break anywhere."""
        self.console.print(line, soft_wrap=True, highlight=False)

    def table(self, shown: Table) -> None:
        self.console.print(shown)
        self.console.print()

    def end(self, what: str, file: Path | None, **content: Any) -> None:
        """Say how long `what` took, and write everything to `file`."""
        seconds = time.perf_counter() - self.begun
        self.say(f"{what} in {seconds:.0f} s")
        if file is not None:
            text = json.dumps({**self.about, "seconds": seconds, **content}, indent=1)
            file.write_text(text + "\n", encoding="utf-8")


def table(left: Iterable[str], right: Iterable[str], title: str | None = None) -> Table:
    """An empty table with columns of words and of numbers."""
    made = Table(*left, title=title, **STYLE)
    for column in right:
        made.add_column(column, justify="right")
    return made
