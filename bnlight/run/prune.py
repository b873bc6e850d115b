"""`bnlight prune`: remove the checkpoints of finished jobs that nothing will need."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from bnlight.run.status import read_status
from bnlight.run.survive.lock import JobBusy, own

FINISHED = ("done", "diverged")
KEEP = ("all", "best", "none")


def find_jobs(root: Path) -> Iterator[Path]:
    """The directories of all jobs below `root`, at any depth, or `root` itself if it is one, by name.

    Raises FileNotFoundError if there is no such directory.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: expected the directory of a sweep or a job, such as outputs/norms")
    for folder, names, files in os.walk(root):
        if "status.json" in files:
            names.clear()
            yield Path(folder)
        names.sort()


def superfluous(directory: Path, keep: str) -> list[Path]:
    """The checkpoints of a finished job that `keep` leaves out: all but `best.ckpt`, or all of them.

    Without a `best.ckpt` (another name, no validation) `best` leaves out nothing.
    """
    folder = directory / "checkpoints"
    if keep == "all" or (keep == "best" and not (folder / "best.ckpt").is_file()):
        return []
    kept = "best.ckpt" if keep == "best" else ""
    found = [*folder.glob("*.ckpt"), *folder.glob(".*.ckpt.*")]  # the latter were being written at a kill
    return sorted(path for path in found if path.name != kept and path.is_file())


def prune(root: Path, keep: str, dry_run: bool = False) -> tuple[int, int, list[str]]:
    """Prune every finished job below `root`: the number of files, their bytes, and which jobs were left alone."""
    files, size, left = 0, 0, []
    for directory in find_jobs(root):
        try:
            state = read_status(directory).get("state")
            if state not in FINISHED:
                left.append(f"{directory.name}: {state}")
                continue
            if dry_run:
                going = superfluous(directory, keep)
                size += sum(path.stat().st_size for path in going)
            else:
                with own(directory):  # nobody starts it again meanwhile
                    going = superfluous(directory, keep)
                    size += remove(going)
        except (JobBusy, ValueError, OSError) as error:  # or a file system that may only be read
            left.append(f"{directory.name}: {error}")
            continue
        files += len(going)
    return files, size, left


def remove(paths: Sequence[Path]) -> int:
    """Delete the files; their bytes."""
    size = sum(path.stat().st_size for path in paths)
    for path in paths:
        path.unlink(missing_ok=True)
    return size


def main(arguments: Sequence[str]) -> int:
    """`bnlight prune DIR [--keep best|none] [--dry-run]`; returns the exit code."""
    parser = argparse.ArgumentParser(prog="bnlight prune", description=__doc__)
    parser.add_argument("directory", type=Path, help="a sweep's or a job's, such as outputs/norms")
    parser.add_argument("--keep", choices=KEEP[1:], default="best", help="best.ckpt (the default), or none")
    parser.add_argument("--dry-run", action="store_true", help="say what would go, remove nothing")
    options = parser.parse_args(arguments)
    try:
        files, size, left = prune(options.directory, options.keep, options.dry_run)
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{files} checkpoints, {size / 1e6:.1f} MB, {'would be' if options.dry_run else 'were'} removed")
    for line in left:
        print(f"left alone: {line}")
    return 0
