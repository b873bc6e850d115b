"""`bnlight compare`: the comparison in the terminal, and as Markdown, LaTeX, CSV or JSON."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from bnlight.compare.comparison import compare
from bnlight.compare.derive import TARGET
from bnlight.compare.formats import FORMATS

DESCRIPTION = """\
Compare runs: means over seeds with intervals, paired tests, and a verdict in plain words. Writes results.csv
(every run) and comparison.html (tables and figures, for a browser) into the directory compared; of several sources,
into `comparison` in their common parent; or where --output says.
"""
EXAMPLES = """\
examples:
  bnlight compare outputs/norms
  bnlight compare outputs/norms --by batch_size --tune lr       each norm at its best learning rate
  bnlight compare outputs/norms --tune none                     all at shared settings
  bnlight compare outputs/norms --where norm=batch,renorm 'batch_size<=16' 'seed!=3'
  bnlight compare outputs/norms --format latex > table.tex
  bnlight compare outputs/new --against outputs/old
"""


def command_line() -> argparse.ArgumentParser:
    """The parser of `bnlight compare`."""
    parser = argparse.ArgumentParser(
        prog="bnlight compare",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    source = (
        "directory of a sweep, of sweeps or of a job, W&B's offline runs, or wandb:entity/project[/group]"
    )
    add("sources", nargs="+", metavar="SOURCE", help=source)
    add("--metric", metavar="M", help="what ranks the table (default: what the jobs monitor, on test data)")
    by = "settings to group by, the norm apart; what varies beside them is tuned or averaged over"
    add("--by", type=_names, metavar="K,...", help=by)
    tune = (
        "settings that each contender has chosen for it by validation results, never by a test; none: all at shared "
        "settings (default: those of optimizer, scheduler and norm)"
    )
    add("--tune", type=_tuned, metavar="K,...|none", help=tune)
    where = "only runs with KEY=VALUE[,VALUE...], KEY!=VALUE, 'KEY<=NUMBER' (also < > >=); state and seed are keys too"
    add("--where", nargs="+", action="extend", default=[], metavar="EXPR", help=where)
    target = (
        f"value of what the jobs monitor whose first step is reported (default: {TARGET:g}, of an accuracy)"
    )
    add("--target", type=float, metavar="T", help=target)
    add(
        "--against",
        metavar="OTHER",
        help="compare with this source too, contender by contender, over common seeds",
    )
    formats = "text (default), markdown, latex (booktabs), csv (one line per cell), json (everything)"
    add("--format", choices=list(FORMATS), default="text", metavar="F", help=formats)
    add("--output", type=Path, metavar="DIR", help="where to write results.csv and comparison.html")
    return parser


def main(arguments: Sequence[str]) -> int:
    """`bnlight compare SOURCE... [options]`; returns the exit code, 2 where nothing could be compared."""
    options = vars(command_line().parse_args(arguments))
    sources, chosen = options.pop("sources"), options.pop("format")
    try:
        comparison = compare(*sources, **options)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    try:
        if chosen == "text":
            comparison.print()
        else:
            print(FORMATS[chosen](comparison), flush=True)
            print("\n".join(comparison.places()), file=sys.stderr)
    except BrokenPipeError:  # `| head` has seen enough; Python would complain once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def finish(directory: Path) -> None:
    """Write and print the comparison at a sweep's end, which must not fail for it: an error becomes one line."""
    try:
        compare(directory).print()
    except Exception as error:
        what = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        print(f"The comparison could not be made ({what}). {how_to(directory)}", file=sys.stderr)


def how_to(directory: Path) -> str:
    """How to get a sweep's comparison later."""
    return f"Compare what has finished with: bnlight compare {directory}"


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _tuned(text: str) -> list[str]:
    return [] if text == "none" else _names(text)
