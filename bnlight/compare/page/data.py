"""What the page carries of the runs: their numbers, histories and configs, column by column."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from bnlight.compare.axes import shown, sortable
from bnlight.compare.evidence.repeats import seeds_of
from bnlight.compare.page.look import looks
from bnlight.compare.page.markup import link
from bnlight.compare.stats import validation_metric
from bnlight.compare.verdict import metric_words

if TYPE_CHECKING:
    from bnlight.compare.comparison import Comparison

POINTS = 100  # of one run's history of one metric
_FIELDS = ("norm", "model", "data", "seed")  # what a reader filters by, if it varies
_FEW = 12  # a further condition with more values is no filter
_SECOND = ("best_val/loss", "best_val/accuracy", "seconds_per_step", "steps_to_target", "seconds_to_target")
_COST = ("samples_per_second", "train_eval_gap", "roughness", "peak_memory", "seconds")


def payload(comparison: Comparison, metrics: Sequence[str]) -> dict[str, Any]:
    """Everything the script needs, as plain JSON; `metrics` are those whose histories it draws."""
    runs, axes, cells = ordered(comparison), comparison.axes, comparison.cells
    names = looks(cell.contender for cell in cells)
    index = {look["name"]: position for position, look in enumerate(names)}
    conditions = list(dict.fromkeys(cell.condition for cell in cells))
    return {
        "metric": comparison.metric,
        "lower": comparison.monitor.lower(comparison.metric),
        "validation": _validation(comparison),
        "words": {name: metric_words(name) for name in [*columns(comparison), *metrics]},
        "t": [float(stdtrit(freedom, 0.975)) for freedom in range(1, len(runs))],
        "contenders": names,
        "conditions": conditions,
        "axes": [axis(comparison, key) for key in axes.keys],
        "cells": [
            {
                "contender": index[cell.contender],
                "condition": conditions.index(cell.condition),
                "settings": [shown(cell.settings[key]) for key in axes.keys],
                "chosen": cell.chosen,
            }
            for cell in cells
        ],
        "runs": _runs(comparison, runs),
        "filters": filters(comparison, runs),
        "history": _histories(comparison.history, metrics, list(runs.index)),
        "configs": _configs(comparison.configs.reindex(runs.index)),
    }


def ordered(comparison: Comparison) -> pd.DataFrame:
    """The runs in the order of the table; at the end those whose config could not be read."""
    first = (name for cell in comparison.cells for name in cell.runs.index)
    return comparison.runs.loc[list(dict.fromkeys([*first, *comparison.runs.index]))]


def columns(comparison: Comparison) -> list[str]:
    """The numbers of a run that the page shows, where some run has them."""
    runs, monitor = comparison.runs, comparison.monitor
    own = [f"best_{monitor.metric}"] if monitor.own else []
    tuned = [name for name in [validation_metric(comparison.metric, runs, monitor)] if name]
    names = dict.fromkeys([comparison.metric, *own, *tuned, *_SECOND, *_COST])
    return [name for name in names if name in runs and runs[name].notna().any()]


def axis(comparison: Comparison, key: str) -> dict[str, Any]:
    """What a figure must know of a key: its words, its part, its values, and how they are spaced."""
    axes = comparison.axes
    levels = sorted({sortable(value): shown(value) for value in axes.values[key]}.items())
    numbers = [level[1] for level, _ in levels if level[0] == 0 and math.isfinite(level[1])]
    role = next(r for r in ("contenders", "tuned", "conditions") if key in getattr(axes, r))
    return {
        "key": key, "label": axes.label(key), "role": role, "levels": [text for _, text in levels],
        "numeric": len(numbers) > 1 and all(level[0] != 1 for level, _ in levels), "log": spaced_by_factors(numbers),
    }  # fmt: skip


def spaced_by_factors(values: Sequence[float]) -> bool:
    """Whether positive sorted values are more evenly spaced by their logarithms than by their differences."""
    if len(values) < 2 or values[0] <= 0:
        return False
    if len(values) == 2:
        return values[1] / values[0] >= 4
    unevenness = [float(gaps.std() / gaps.mean()) for gaps in (np.diff(values), np.diff(np.log(values)))]
    return unevenness[1] < unevenness[0]


def filters(comparison: Comparison, runs: pd.DataFrame) -> list[dict[str, Any]]:
    """The fields a reader may filter by, each with its values and the value of every run."""
    chosen: dict[str, pd.Series] = {name: runs[name] for name in _FIELDS if name in runs}
    values = comparison.axes.values.reindex(runs.index)
    for key in comparison.axes.keys:
        if key not in chosen and values[key].map(shown).nunique() <= _FEW:
            chosen[key] = values[key]
    fields = []
    for key, column in chosen.items():
        levels = dict(sorted({sortable(value): shown(value) for value in column}.items()))
        # A value with a comma would not be one value to `--where`.
        if len(levels) < 2 or any("," in level for level in levels.values()):
            continue
        codes = pd.Index(levels.values()).get_indexer(pd.Index(column.map(shown)))
        fields.append({
            "key": key, "label": comparison.axes.label(key), "levels": list(levels.values()), "codes": codes.tolist(),
        })  # fmt: skip
    return fields


def links(comparison: Comparison, run: Mapping[Any, Any]) -> tuple[str | None, str | None]:
    """Where the run's directory lies, seen from the page, and its address at W&B."""
    path, url = run["path"], run["url"]
    relative = None
    if isinstance(path, str):
        relative = link(Path(os.path.relpath(path, comparison.page.parent)).as_posix())
    # Only an address of the web may become a link: a run's files are not trusted to hold no script.
    web = url if isinstance(url, str) and url.startswith(("https://", "http://")) else None
    return relative, web


def _validation(comparison: Comparison) -> dict[str, Any] | None:
    """The metric that stands in where several settings share one place in a figure, and whether less is better."""
    name = validation_metric(comparison.metric, comparison.runs, comparison.monitor)
    return {"name": name, "lower": comparison.monitor.lower(name)} if name else None


def _runs(comparison: Comparison, runs: pd.DataFrame) -> dict[str, Any]:
    cell_of = {name: position for position, cell in enumerate(comparison.cells) for name in cell.runs.index}
    rows = runs.to_dict("records")
    where = [links(comparison, row) for row in rows]
    return {
        "key": [str(name) for name in runs.index],
        "name": [str(row["job"]) for row in rows],
        "state": [str(row["state"]) for row in rows],
        "seed": [shown(row["seed"]) for row in rows],
        "repeat": _repeats(comparison, runs),
        "cell": [cell_of.get(name, -1) for name in runs.index],
        "error": {at: row["error"] for at, row in enumerate(rows) if isinstance(row["error"], str)},
        "path": [path for path, _ in where],
        "url": [url for _, url in where],
        "columns": {name: _finite(runs[name]) for name in columns(comparison)},
    }


def _repeats(comparison: Comparison, runs: pd.DataFrame) -> list[int]:
    """The number of each run's seed: a mean first goes over the runs of one. A run without a seed is its own."""
    seeds = seeds_of(comparison.configs).reindex(runs.index)
    return pd.factorize(seeds.where(seeds.notna(), runs.index))[0].tolist()


def _finite(column: pd.Series) -> list[float | None]:
    return [
        float(value) if math.isfinite(value) else None for value in pd.to_numeric(column, errors="coerce")
    ]


def _histories(history: pd.DataFrame, metrics: Sequence[str], order: list[str]) -> dict[str, Any]:
    """Of each metric the grids of steps that occur, and of every run its grid and its values there."""
    result = {}
    position = pd.Index(order).get_indexer(pd.Index(history["directory"]))
    sorting = np.lexsort((history["step"].to_numpy(float), position))
    position, steps = position[sorting], history["step"].to_numpy(float)[sorting]
    for metric in metrics:
        values = history[metric].to_numpy(float)[sorting]
        known = np.isfinite(values) & np.isfinite(steps) & (position >= 0)
        at, x, y = position[known], steps[known], values[known]
        runs, starts = np.unique(at, return_index=True)
        grids: dict[tuple[float, ...], int] = {}
        grid: list[int] = [-1] * len(order)
        kept: list[list[float] | None] = [None] * len(order)
        for run, part in zip(runs, np.split(np.arange(len(at)), starts[1:]), strict=True):
            if len(part) > POINTS:
                part = part[np.linspace(0, len(part) - 1, POINTS).round().astype(int)]
            grid[run] = grids.setdefault(tuple(x[part].tolist()), len(grids))
            kept[run] = [float(f"{value:.5g}") for value in y[part]]  # more digits are not seen
        result[metric] = {"grids": [_whole(steps) for steps in grids], "grid": grid, "values": kept}
    return result


def _whole(steps: Sequence[float]) -> list[float]:
    return [int(step) if step == int(step) else step for step in steps]


def _configs(configs: pd.DataFrame) -> dict[str, Any]:
    """The settings all runs share, once; of the others the values that occur and which one each run has."""
    same: dict[str, str] = {}
    varying: dict[str, Any] = {}
    for key in configs:
        codes, levels = pd.factorize(configs[key].map(shown))
        if len(levels) == 1:
            same[str(key)] = levels[0]
        else:
            varying[str(key)] = {"levels": list(levels), "codes": codes.tolist()}
    return {"same": same, "varying": varying}
