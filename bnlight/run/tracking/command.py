"""`bnlight wandb`: the runs on this disk listed, uploaded, or shown in the terminal."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bnlight.run.tracking.offline import Run, find_runs, show, sync, unreachable

USAGE = """\
bnlight wandb ls DIR...                  the W&B runs below DIR, piece by piece
       bnlight wandb sync DIR... [--dry-run]    upload what was written offline, in order
       bnlight wandb leet DIR...                look at them in the terminal, all in one view
       bnlight wandb report DIR... [--push]     a W&B report and workspace of their comparison (report --help)"""
COMMANDS = ("ls", "sync", "leet")


def main(arguments: Sequence[str]) -> int:
    """`bnlight wandb ls|sync|leet`; returns the exit code."""
    if not arguments or arguments[0] not in COMMANDS:
        print(f"usage: {USAGE}", file=sys.stderr)
        return 0 if arguments and arguments[0] in ("-h", "--help") else 2
    what, *rest = arguments
    parser = argparse.ArgumentParser(prog=f"bnlight wandb {what}", usage=USAGE)
    parser.add_argument("directories", nargs="+", type=Path, metavar="DIR")
    if what == "sync":
        parser.add_argument("--dry-run", action="store_true", help="print the commands, upload nothing")
    options = parser.parse_args(rest)
    try:
        runs = find_runs(options.directories)
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 2
    if what == "sync":
        return _sync(runs, options.dry_run)
    if what == "ls":
        show(runs)
        return 0
    from bnlight.run.tracking.leet import leet

    if not runs:
        print(f"no W&B run below {', '.join(map(str, options.directories))}", file=sys.stderr)
        return 2
    return leet(runs)


def _sync(runs: Sequence[Run], dry_run: bool) -> int:
    """Upload, if there is a key and somebody who answers."""
    from bnlight.run.tracking.logger import logged_in

    if not any(run.waiting for run in runs):
        print("no W&B run waits for its upload")
        return 0
    if not dry_run and not logged_in():
        print(
            "W&B has no key here: `wandb login`, or set WANDB_API_KEY; --dry-run shows the commands",
            file=sys.stderr,
        )
        return 2
    if not dry_run and (silent := unreachable()):
        print(f"{silent}; nothing was uploaded", file=sys.stderr)
        return 2
    return sync(runs, dry_run)
