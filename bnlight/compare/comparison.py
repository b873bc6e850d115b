"""One comparison: from a sweep's directory to what was found and where it is written."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
from rich.console import Console

from bnlight.compare import page, table
from bnlight.compare.axes import Axes, find_axes
from bnlight.compare.derive import Monitor, derive, monitor_of
from bnlight.compare.read import Runs, read_runs
from bnlight.compare.stats import Cell, make_cells, pick_metric
from bnlight.compare.verdict import Finding, caveats, findings, headline
from bnlight.run.status import write_atomic


@dataclass(frozen=True)
class Comparison:
    """What a sweep shows. `print(comparison)` is the table in plain text; `comparison.print()` uses colours.

    `runs`, `history` and `notes` are those of `read_runs`, with the derived columns. `cells` are the rows of
    the table in its order, `metric` what they are ranked by, `monitor` what the jobs monitored, `verdict` the
    sentence it opens with, `findings` one statement per condition (a batch size, say), `caveats` what limits them.
    """

    directory: Path
    runs: pd.DataFrame
    history: pd.DataFrame
    configs: pd.DataFrame
    notes: list[str]
    axes: Axes
    cells: list[Cell]
    metric: str
    monitor: Monitor
    target: float
    verdict: str
    findings: list[Finding]
    caveats: list[str]

    @property
    def results_csv(self) -> Path:
        return self.directory / "results.csv"

    @property
    def page(self) -> Path:
        return self.directory / "comparison.html"

    @property
    def table(self) -> pd.DataFrame:
        """The table's numbers, one row per cell."""
        return pd.DataFrame([table.numbers(cell, self.metric) for cell in self.cells])

    def print(self, console: Console | None = None) -> None:
        """Print the table, its verdict and the paths; plain text where the output is no terminal."""
        table.render(self, console or table.console_for_stdout())

    def __str__(self) -> str:
        return table.plain(self)


def compare(directory: str | Path, *, target: float = 0.9, metric: str | None = None) -> Comparison:
    """Compare the jobs of the sweep in `directory`, and write `results.csv` and `comparison.html` into it.

    `target` is the validation accuracy that "steps to 90 %" asks for. `metric` is the column the table is
    ranked by: by default what the jobs monitor (`monitor.metric`) on the test data, `test/accuracy` unless they say
    otherwise, or the nearest thing the runs have. Runs that differ in their seeds
    only are averaged; runs that are not done are counted and listed, and are in no mean.

    Raises FileNotFoundError if the directory does not exist; ValueError if it holds no job, or if no run has
    the metric asked for.
    """
    read = read_runs(directory)
    if read.configs.empty:
        raise ValueError(
            f"no job in {directory} has a readable config.yaml: {'; '.join(read.notes) or 'nothing to compare'}"
        )
    monitor = monitor_of(read.configs)
    runs = derive(read.runs, read.history, target, monitor)
    if metric is not None and metric not in runs:
        names = sorted(str(name) for name in runs if "/" in str(name))
        raise ValueError(
            f"no run in {directory} has the metric {metric!r}; there are: {', '.join(names) or 'none'}"
        )
    comparison = _compare(replace(read, runs=runs), metric or pick_metric(runs, monitor), target, monitor)
    write_atomic(comparison.results_csv, results_table(comparison).to_csv(index=False))
    write_atomic(comparison.page, page.render(comparison))
    return comparison


def results_table(comparison: Comparison) -> pd.DataFrame:
    """The rows of `results.csv`: every job, with the settings that vary where no other column has them."""
    runs = comparison.runs.copy()
    runs["target"] = comparison.target
    for key in reversed(comparison.axes.keys):
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
        "identity",
        "overrides",
        "git",
        "versions",
        "hardware",
    ]
    first = [str(name) for name in runs if name not in metrics and name not in last]
    return runs[[*first, *metrics, *last]]


def _compare(read: Runs, metric: str, target: float, monitor: Monitor) -> Comparison:
    searched = (read.directory / "optimization_results.yaml").exists()  # Hydra's Optuna sweeper writes it
    axes = find_axes(read.runs, read.configs, searched)
    cells = make_cells(read.runs, axes, metric, monitor)
    found = findings(cells, metric, monitor)
    return Comparison(
        directory=read.directory,
        runs=read.runs,
        history=read.history,
        configs=read.configs,
        notes=read.notes,
        axes=axes,
        cells=cells,
        metric=metric,
        monitor=monitor,
        target=target,
        verdict=headline(found, axes, metric, monitor),
        findings=found,
        caveats=caveats(read.runs, cells, axes, metric, read.configs, monitor),
    )
