"""Read runs into tidy tables, wherever they are: job directories, W&B's offline files, W&B's server."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from bnlight.compare.read.history import read_histories
from bnlight.compare.read.jobs import read_job
from bnlight.compare.read.offline import read_offline
from bnlight.compare.read.places import find
from bnlight.compare.read.run import STATES, Run, flatten
from bnlight.compare.read.same import tell_apart

SERVER = "wandb:"  # begins a source that is no path

__all__ = ["STATES", "Runs", "read_runs"]


@dataclass(frozen=True)
class Runs:
    """Runs of one or several sources. Every table is keyed by `directory`, the job directory's name (of a run of
    W&B, the run's), with the sweep before it where there are several: `norms/batch-cnn-digits-s0-1a2b3c4d`.

    `runs` has one row per run, whatever became of it: job, state, norm, model, data, seed, batch_size, lr,
    world_size, identity, overrides, every number of `result.json`, seconds, error, directory, path (the job's folder;
    None for a run of W&B), log and wandb (below `directory` where there is one), url (W&B's page), sweep, source.
    `history` has the columns directory, job, norm, step, epoch, time and the metrics, one row per step of a
    run. `configs` has the flattened resolved configs. `notes` says what could not be read. `directories` are the
    sources on this disk.
    """

    directories: list[Path]
    runs: pd.DataFrame
    history: pd.DataFrame
    configs: pd.DataFrame
    notes: list[str]


def read_runs(*sources: str | Path) -> Runs:
    """Read every run of `sources`; what is broken becomes a note, never an error.

    A source is the directory of a sweep or of a single job, a directory of sweeps, a folder or file that W&B has
    written offline, or `wandb:entity/project[/group]` on W&B's server. A run that is seen twice is counted once.

    Raises FileNotFoundError if a source does not exist, ValueError if one holds no run, and for W&B's server
    PermissionError or ConnectionError if it does not let in or does not answer.
    """
    if not sources:
        raise TypeError("read_runs() expected a source, such as outputs/norms")
    notes: list[str] = []
    found = {run.folder.resolve() if run.folder else id(run): run for run in _found(sources, notes)}
    if not found:
        raise ValueError(f"no run could be read: {'; '.join(notes)}")
    runs = tell_apart(list(found.values()), notes)
    history = read_histories(runs)
    directories = [Path(source) for source in sources if not str(source).startswith(SERVER)]
    rows = [_row(run, directories) for run in runs]
    configs = {run.key: flatten(run.config, run.row) for run in runs if run.config is not None}
    table = pd.DataFrame(rows).set_index("directory", drop=False).rename_axis(None)
    notes += [f"{run.key}: {note}" for run in runs for note in run.notes]
    return Runs(directories, table, history, pd.DataFrame.from_dict(configs, "index", object), notes)


def _found(sources: Sequence[str | Path], notes: list[str]) -> Iterator[Run]:
    for source in sources:
        if str(source).startswith(SERVER):
            from bnlight.compare.read.online import read_online

            yield from read_online(str(source))
            continue
        places = find(Path(source))
        notes += places.notes
        for folder in places.jobs:
            yield read_job(folder, folder.absolute().parent.parts, str(source))
        yield from read_offline(places.pieces, str(source), notes)


def _row(run: Run, directories: Sequence[Path]) -> dict[str, Any]:
    """The run's row, with where its files are."""
    files = {"directory": run.key, "path": None, "log": None, "wandb": "", "source": run.source}
    if run.folder:
        base = directories[0] if len(directories) == 1 else None
        shown = run.folder.relative_to(base) if base else run.folder.absolute()
        pieces = sorted(path.name for path in run.folder.glob("wandb/offline-run-*"))
        files |= {"path": str(run.folder.absolute()), "log": str(shown / "job.log")}
        files["wandb"] = " ".join(str(shown / "wandb" / name) for name in pieces)
    return {**run.row, **files}
