"""What a comparison writes, and where: `results.csv` and `comparison.html`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from bnlight.compare import page
from bnlight.run.status import write_atomic

if TYPE_CHECKING:
    from bnlight.compare.comparison import Comparison


def default_output(directories: Sequence[Path]) -> Path:
    """Where a comparison of these sources is written unless it is told: see `compare`."""
    folders = [path if path.is_dir() else path.parent for path in directories]
    if len(folders) == 1:
        return folders[0]
    shared = os.path.commonpath([folder.absolute() for folder in folders]) if folders else "."
    return Path(os.path.relpath(shared)) / "comparison"


def write(comparison: Comparison, asked: bool) -> Comparison:
    """Write both files; where that fails, raise OSError if the folder was asked for, else note it in `unwritten`."""
    try:
        write_atomic(comparison.results_csv, results_table(comparison).to_csv(index=False))
        write_atomic(comparison.page, page.render(comparison))
    except OSError as error:
        if asked:
            raise
        return replace(comparison, unwritten=f"{error.strerror or error}: {comparison.output}")
    return comparison


def results_table(comparison: Comparison) -> pd.DataFrame:
    """The rows of `results.csv`: every job, with the settings that vary where no other column has them."""
    runs = comparison.runs.copy()
    runs["target"] = comparison.target
    for key in reversed([*comparison.axes.keys, *comparison.axes.averaged]):
        if key not in runs and key not in ("data.batch_size", "optimizer.lr"):
            runs.insert(2, key, comparison.configs[key].reindex(runs.index))
    order = {"test": 0, "best_val": 1, "val": 2}
    metrics = sorted(
        (n for n in map(str, runs) if "/" in n), key=lambda n: (order.get(n.partition("/")[0], 3), n)
    )
    last = [
        "seconds",
        "error",
        "directory",
        "log",
        "wandb",
        "url",
        "identity",
        "overrides",
        "git",
        "versions",
    ]
    last += ["hardware"]
    absolute = ["path", "source"]  # they would not survive a move of the folder
    first = [str(name) for name in runs if name not in (*metrics, *last, *absolute)]
    return runs[[*first, *metrics, *(name for name in last if name in runs)]]
