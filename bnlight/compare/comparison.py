"""One comparison: from the runs of one or several sources to what was found and where it is written."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
from rich.console import Console

from bnlight.compare import table
from bnlight.compare.against import Against, find_against
from bnlight.compare.axes import Axes, assign, describes, varying_keys
from bnlight.compare.caveats import caveats
from bnlight.compare.cells import make_cells
from bnlight.compare.derive import TARGET, Monitor, derive, monitor_of, target_metric
from bnlight.compare.evidence import Evidence, gather
from bnlight.compare.evidence.repeats import repeats_of
from bnlight.compare.read import Runs, read_runs
from bnlight.compare.results import default_output, write
from bnlight.compare.stats import Cell, pick_metric, validation_metric
from bnlight.compare.verdict import Finding, findings, headline, metric_words, terms
from bnlight.compare.where import did_you_mean, resolve, select

Source = str | Path


@dataclass(frozen=True)
class Question:
    """What is asked of the runs, as in `compare`; `by` and `tune` are None where bnlight decides."""

    metric: str | None = None
    by: Sequence[str] | None = None
    tune: Sequence[str] | None = None
    where: Sequence[str] = ()
    target: float | None = None


@dataclass(frozen=True)
class Comparison:
    """What runs show. `print(comparison)` is the table in plain text; `comparison.print()` uses colours.

    `runs`, `history`, `configs`, `notes` and `directories` are those of `read_runs`, of the runs that `question.where`
    keeps, with the derived columns. `cells` are the rows of the table in its order, `metric` what they are ranked by,
    `tuned_by` the validation metric that settings were chosen by (None: nothing is tuned), `terms` how that is said,
    `aimed_at` what the target is held against, `monitor` what the jobs monitored, `verdict` the sentence it opens
    with, `findings` one statement per condition (a batch size, say), `evidence` the tests behind them, `caveats` what
    limits them, `against` the same contenders in another sweep. `output` is the folder of `results_csv` and `page`;
    `unwritten` says why they are not there.
    """

    sources: list[str]
    directories: list[Path]
    output: Path
    question: Question
    runs: pd.DataFrame
    history: pd.DataFrame
    configs: pd.DataFrame
    notes: list[str]
    axes: Axes
    cells: list[Cell]
    metric: str
    monitor: Monitor
    tuned_by: str | None
    aimed_at: str | None
    terms: str
    verdict: str
    findings: list[Finding]
    evidence: Evidence
    caveats: list[str]
    against: Against | None = None
    unwritten: str | None = None

    @property
    def target(self) -> float:
        return TARGET if self.question.target is None else self.question.target

    @property
    def aim(self) -> str:
        """What reaching the target is, in words: `validation accuracy of 0.9`, `validation loss of 0.1 or less`."""
        less = self.aimed_at is not None and self.monitor.lower(self.aimed_at)
        words = metric_words(self.aimed_at or "val/accuracy")
        return f"{words} of {self.target:g}{' or less' if less else ''}"

    @property
    def directory(self) -> Path:
        """The first of the sources' directories; the output where there is none."""
        return self.directories[0] if self.directories else self.output

    @property
    def results_csv(self) -> Path:
        return self.output / "results.csv"

    @property
    def page(self) -> Path:
        return self.output / "comparison.html"

    @property
    def command(self) -> str:
        """What makes this comparison again, in the shell."""
        asked, words = self.question, ["bnlight", "compare", *self.sources]
        words += ["--metric", asked.metric] if asked.metric else []
        words += ["--by", ",".join(asked.by)] if asked.by is not None else []
        words += ["--tune", ",".join(asked.tune) or "none"] if asked.tune is not None else []
        words += ["--where", *asked.where] if asked.where else []
        words += ["--target", f"{asked.target:g}"] if asked.target is not None else []
        words += ["--against", self.against.name] if self.against else []
        words += ["--output", str(self.output)] if self.output != default_output(self.directories) else []
        return shlex.join(words)

    @property
    def table(self) -> pd.DataFrame:
        """The table's numbers, one row per cell."""
        return pd.DataFrame([table.numbers(cell, self.metric) for cell in self.cells])

    def places(self) -> list[str]:
        """Where the files are, or why there are none."""
        if self.unwritten:
            return [f"Nothing was written ({self.unwritten}): --output DIR writes elsewhere"]
        return [str(self.results_csv), str(self.page)]

    def print(self, console: Console | None = None) -> None:
        """Print the table, its verdict and the paths; plain text where the output is no terminal."""
        table.render(self, console or table.console_for_stdout())

    def __str__(self) -> str:
        return table.plain(self)


def compare(
    *sources: Source,
    metric: str | None = None,
    by: str | Sequence[str] | None = None,
    tune: str | Sequence[str] | None = None,
    where: str | Sequence[str] = (),
    target: float | None = None,
    against: Source | None = None,
    output: Source | None = None,
) -> Comparison:
    """Compare the runs of `sources` (see `read_runs`), and write `results.csv` and `comparison.html`.

    Runs that differ in their seeds only are averaged; runs that are not done are counted and listed, and are in
    no mean. Names of settings may be short: `lr` is `optimizer.lr`.

    - `metric`: the column that ranks the table: by default what the jobs monitor (`monitor.metric`) on the test data,
      `test/accuracy` unless they say otherwise, or the nearest thing the runs have;
    - `by`: the settings to group by: contenders (norm, weight, sync) and conditions (any other, such as
      `data.batch_size`), in this order. What varies beside them is tuned or averaged over within each seed;
    - `tune`: the settings that each contender has chosen for it, under each condition, by its validation results on
      common seeds, never by a test; `[]` compares all at shared settings. By default those of `optimizer`,
      `scheduler` and `norm`;
    - `where`: filters such as `norm=batch,renorm`, `seed!=3` or `data.batch_size<=16`, all of which runs must satisfy;
    - `target`: the value of what the jobs monitor, as "steps to 90 %" asks for; by default 0.9, of an accuracy alone;
    - `against`: another source, whose contenders are compared with these over common seeds;
    - `output`: where to write. By default into the directory compared; of several, into `comparison` in their common
      parent. Where that cannot be written, nothing is, and `unwritten` says why.

    Raises FileNotFoundError if a source does not exist; ValueError if one holds no run, if no run has the metric
    asked for, if there is no such setting, or if a filter is none or leaves nothing; OSError if an `output` that was
    asked for cannot be written.
    """
    question = Question(metric, _listed(by), _listed(tune), _listed(where) or (), target)
    read = read_runs(*sources)
    folder = Path(output) if output is not None else default_output(read.directories)
    comparison = analyse(read, [str(source) for source in sources], question, folder)
    if against is not None:
        same = replace(question, metric=comparison.metric)
        other = analyse(read_runs(against), [str(against)], same, folder)
        comparison = replace(comparison, against=find_against(comparison, other))
    return write(comparison, asked=output is not None)


def _listed(names: str | Sequence[str] | None) -> list[str] | None:
    return [names] if isinstance(names, str) else None if names is None else list(names)


def analyse(read: Runs, sources: list[str], question: Question, output: Path) -> Comparison:
    """The comparison of what was read; nothing is written."""
    shown = ", ".join(sources)
    if read.configs.empty:
        raise ValueError(
            f"no job in {shown} has a readable config.yaml: {'; '.join(read.notes) or 'nothing to compare'}"
        )
    read, left_out = _filtered(read, question.where)
    monitor = monitor_of(read.configs)
    runs = derive(read.runs, read.history, read.configs, question.target, monitor)
    if question.metric is not None and question.metric not in runs:
        names = [name for name in map(str, runs) if "/" in name or name in _logged(read)]
        hint = did_you_mean(question.metric, names)
        there = ", ".join(sorted(names)) or "none"
        raise ValueError(f"no run in {shown} has the metric {question.metric!r}; there are: {there}.{hint}")
    metric = question.metric or pick_metric(runs, monitor)
    runs = _judged(runs, metric)
    validation = validation_metric(metric, runs, monitor)
    axes, untuned = _axes(read, question, validation, bool((runs["state"] == "done").any()))
    repeats = repeats_of(read.configs, axes)
    cells = make_cells(runs, axes, metric, monitor, repeats)
    evidence = gather(cells, metric, monitor.lower(metric), repeats)
    found = findings(cells, metric, monitor, evidence.pairs)
    how = terms(cells, axes)
    tuned_by = validation if axes.tuned else None
    limits = caveats(runs, cells, axes, read.configs, metric, tuned_by, repeats)
    aimed_at = target_metric(read.history, monitor, question.target is not None)
    comparison = Comparison(
        sources=sources,
        directories=read.directories,
        output=output,
        question=question,
        runs=runs,
        history=read.history,
        configs=read.configs,
        notes=read.notes,
        axes=axes,
        cells=cells,
        metric=metric,
        monitor=monitor,
        tuned_by=tuned_by,
        aimed_at=aimed_at,
        terms=how,
        verdict=f"{headline(found, axes, metric, monitor)} {how}".strip(),
        findings=found,
        evidence=evidence,
        caveats=[*left_out, *untuned, *limits, *evidence.notes],
    )
    if question.target is None or any(cell.reached for cell in cells):
        return comparison
    missed = f"No finished run has reached a {comparison.aim}."
    if aimed_at is None:
        there = ", ".join(sorted(_logged(read))) or "nothing"
        missed = f"No run has logged {monitor.metric}, which a target is held against; there is: {there}."
    return replace(comparison, caveats=[*comparison.caveats, missed])


def _logged(read: Runs) -> set[str]:
    """The metrics of the runs' histories."""
    return {str(name) for name in read.history} - {"directory", "job", "norm", "step", "epoch", "time"}


def _judged(runs: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The runs, those that are done but whose `metric` is not finite taken for diverged: they are no survivors."""
    if "not_finite" not in runs:
        return runs
    name = metric.removeprefix("best_")
    told = runs["not_finite"].map(lambda names: name in str(names).split(" "))
    judged, lost = runs.copy(), told & (runs["state"] == "done")
    if metric in runs:
        lost &= runs[metric].isna()
    judged.loc[lost, ["state", "error"]] = ["diverged", f"{name} is not finite"]
    return judged


def _filtered(read: Runs, where: Sequence[str]) -> tuple[Runs, list[str]]:
    """The runs that the filters keep, and a sentence on those that they do not."""
    if not where:
        return read, []
    kept = select(read.runs, read.configs, where, varying_keys(read.runs, read.configs))
    lost = read.runs.loc[~kept, "state"].value_counts()
    states = table.describe_states({str(state): int(count) for state, count in lost.items()}) or "none"
    runs = read.runs[kept]
    configs = read.configs[read.configs.index.isin(runs.index)]
    if configs.empty:
        raise ValueError(f"no run with a readable config.yaml is left with {' '.join(where)}")
    history = read.history[read.history["directory"].isin(runs.index)]
    said = f"Only runs with {' and '.join(where)}: {len(runs)} of {len(kept)} (left out: {states})."
    return replace(read, runs=runs, configs=configs, history=history), [said]


def _axes(read: Runs, question: Question, validation: str | None, finished: bool) -> tuple[Axes, list[str]]:
    """The parts of the settings. Without a validation result nothing can be tuned: a test must not choose."""
    names, varying = [str(key) for key in read.configs], varying_keys(read.runs, read.configs)

    def full(asked: Sequence[str] | None) -> list[str] | None:
        keys = None if asked is None else list(dict.fromkeys(resolve(name, names, varying) for name in asked))
        strange = [key for key in keys or () if not describes(key)]
        if strange:
            raise ValueError(
                f"{', '.join(strange)}: expected settings of what a run computes. Means go over the seeds; "
                "where=['seed=0'], on the command line --where seed=0, keeps one of them"
            )
        return keys

    folders = {Path(path).parent for path in read.runs["path"].dropna()}
    searched = any((folder / "optimization_results.yaml").exists() for folder in folders)  # Optuna's
    by, tune = full(question.by), full(question.tune)
    axes = assign(varying, read.configs, searched, by, tune)
    if validation or not axes.tuned or not finished:
        return axes, []
    keys = ", ".join(axes.tuned)
    if tune:
        raise ValueError(
            f"nothing to tune {keys} by: no run has a validation result (val/accuracy, val/loss, or what "
            "monitor.metric names), and a test result must not choose. Compare at shared settings: tune=[], on the "
            "command line --tune none"
        )
    untuned = f"No run has a validation result to choose {keys} by, so none is tuned: a test result must not choose."
    return assign(varying, read.configs, searched, by, []), [untuned]
