"""What a comparison writes, and where: `results.csv` and `comparison.html`."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from bnlight.compare import page

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
    """Write both files or, where one does not fit, neither: that raises OSError if the folder was asked for, else it
    is noted in `unwritten`.
    """
    folder = comparison.output
    texts = {
        comparison.results_csv: results_table(comparison).to_csv(index=False),
        comparison.page: page.render(comparison),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".comparison.", dir=folder) as beside:
            for path, text in texts.items():
                (Path(beside) / path.name).write_text(text, encoding="utf-8", newline="")
            for path in texts:
                (Path(beside) / path.name).replace(path)
    except OSError as error:
        if asked:
            raise OSError(error.errno, f"Nothing was written ({error.strerror})", str(folder)) from error
        return replace(comparison, unwritten=f"{error.strerror or error}: {folder}")
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
