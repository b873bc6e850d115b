"""Find what lies below a path: the directories of jobs, and what W&B has written offline."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from bnlight.compare.read.run import why

_JOB = re.compile(r"^job:", re.MULTILINE)


@dataclass
class Places:
    """`jobs` are directories of jobs, `pieces` folders or files of W&B; `notes` say what is neither."""

    jobs: list[Path] = field(default_factory=list)
    pieces: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def find(source: Path) -> Places:
    """What is at `source` (a job, a `.wandb` file) or below it, at any depth.

    Raises FileNotFoundError if there is nothing at `source`, and ValueError if it holds no run.
    """
    if source.is_file() and source.suffix == ".wandb":
        return Places(pieces=[source])
    if not source.is_dir():
        raise FileNotFoundError(
            f"{source}: expected the directory of a sweep, found {'a file' if source.exists() else 'nothing'}. "
            "Give the directory that holds one sub-directory per job, as `bnlight sweep` prints it (by default "
            "outputs/<sweep>), or a folder or file of W&B's offline runs."
        )
    if _is_job(source):
        return Places(jobs=[source])
    if _is_piece(source):
        return Places(pieces=[source])
    places = Places()
    if not _walk(source, places):
        seen = sum(1 for path in source.iterdir() if path.is_dir())
        raise ValueError(
            f"{source}: expected one sub-directory per job with config.yaml and status.json, or W&B's offline "
            f"runs, found {f'{seen} sub-directories, none of them a job' if seen else 'no sub-directory'}. "
            "Run `bnlight sweep` first, or give the directory it printed (by default outputs/<sweep>)."
        )
    return places


def _walk(folder: Path, places: Places) -> bool:
    """Add what is in `folder`, which itself is neither; whether there was anything."""
    jobs, others, pieces = [], [], len(places.pieces)
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        places.notes.append(f"{folder}: cannot be looked into ({why(error)})")
        return False
    for entry in entries:
        if entry.name[0] in "._" or not entry.is_dir():
            continue
        path = folder / entry.name
        if _is_job(path):
            jobs.append(path)
        elif entry.is_symlink():  # W&B's latest-run, or a way round in a circle
            continue
        elif _is_piece(path):
            places.pieces.append(path)
        else:
            others.append(path)
    places.jobs += jobs
    empty = [path for path in others if not _walk(path, places)]
    if jobs:  # beside jobs, one is expected
        places.notes += [
            f"{path.name}: not a job (no config.yaml with a job block), left out" for path in empty
        ]
    return bool(jobs or len(places.pieces) > pieces or len(others) > len(empty))


def _is_job(folder: Path) -> bool:
    if (folder / "status.json").exists():
        return True
    try:
        return bool(_JOB.search((folder / "config.yaml").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return False


def _is_piece(folder: Path) -> bool:
    return any(folder.glob("*.wandb"))
