"""What a careful reader would ask about a comparison, where it applies to its runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pandas as pd

from bnlight.compare.axes import NULL, Axes, describes, follows, shown, sortable
from bnlight.compare.stats import Cell
from bnlight.compare.verdict import is_tuned, metric_words

_OPTIONS = ("norm", "weight", "sync")  # whose own options go with the choice
INTERVALS = (
    "Intervals are 95 % Student-t intervals of the mean over seeds: they cover the randomness of the seed, "
    "not the choice of data or of hyperparameters."
)


def caveats(
    runs: pd.DataFrame,
    cells: Sequence[Cell],
    axes: Axes,
    configs: pd.DataFrame,
    metric: str,
    tuned_by: str | None,
    repeats: pd.DataFrame,
) -> list[str]:
    """The sentences that limit what the cells say of `metric`; `tuned_by` is that by which settings were chosen."""
    notes = [INTERVALS] if any(cell.metric.half_width is not None for cell in cells) else []
    lost = {state: int((runs["state"] == state).sum()) for state in ("failed", "diverged")}
    if any(lost.values()):
        counts = " and ".join(f"{count} {state}" for state, count in lost.items() if count)
        notes.append(
            f"{counts} of {len(runs)} runs are in no mean. Means over the survivors flatter a norm that "
            "sometimes breaks, so read them together with the runs that are not done."
        )
    if is_tuned(cells) and tuned_by:
        names = ", ".join(axes.label(key) for key in axes.tuned)
        some_diverged = any("diverged" in cell.states for cell in cells)
        among = " among the settings with the fewest diverged runs" if some_diverged else ""
        notes.append(
            f"Each contender is judged at its own best {names} (marked *), chosen by {metric_words(tuned_by)}{among}, "
            "never by a test result."
        )
        if metric.removeprefix("best_") == tuned_by.removeprefix("best_"):
            notes.append(
                "What a setting was chosen by is what is reported of it too: this flatters the chosen ones, the more "
                "the more were tried. A test metric would not."
            )
        notes.extend(_fewer(cells))
        notes.extend([] if axes.searched else _edges(cells, axes))  # of values drawn, one is always outermost
        notes.extend(_chosen_on(cells))
    done = runs.index[runs["state"] == "done"]
    drawn = axes.values.reindex(done).join(repeats["seed"].rename("drawn")).dropna(subset="drawn")
    if not axes.averaged and drawn.duplicated().any():
        notes.append(
            "Some seeds ran more than once at the same settings: their runs are averaged, n counts seeds."
        )
    return (
        notes
        + _shared(axes, configs)
        + _together(axes, configs)
        + _averaged(axes, configs)
        + _unequal(runs, cells)
    )


def _shared(axes: Axes, configs: pd.DataFrame) -> list[str]:
    """Norms compared at one shared learning rate."""
    if "norm" not in axes.contenders or "optimizer.lr" not in configs:
        return []
    rates = configs["optimizer.lr"].replace(NULL, None).dropna().unique()
    if len(rates) == 1:
        return [
            f"All norms share one learning rate ({shown(rates[0])}), and another norm may win at its own. Sweep "
            "optimizer.lr as well, and each norm is judged at its best."
        ]
    if "optimizer.lr" in axes.conditions:
        return ["The norms meet at shared learning rates, untuned: another norm may win at its own."]
    return []


def _together(axes: Axes, configs: pd.DataFrame) -> list[str]:
    """What changes together with the norm without being an option of it, as an experiment's file may set both."""
    if "norm" not in axes.contenders:
        return []
    used = {*axes.keys, *axes.averaged}
    others = [
        str(key) for key in configs if key not in used and describes(str(key)) and "_target_" not in str(key)
    ]
    found = [
        key
        for key in others
        if key.split(".")[0] not in (*_OPTIONS, *used) and "." in key and follows(key, axes, configs)
    ]
    pairs = [
        f"{key} ({_some([f'{shown(value)} with {name}' for name, value in _per_norm(key, axes, configs)])})"
        for key in found
    ]
    if not pairs:
        return []
    return [f"Not the norm alone differs: {_some(pairs)}. A difference may be due to that."]


def _per_norm(key: str, axes: Axes, configs: pd.DataFrame) -> list[tuple[str, object]]:
    settings = configs[[*axes.contenders, key]].drop_duplicates()
    rows = [
        dict(zip(map(str, settings), row, strict=True)) for row in settings.itertuples(index=False, name=None)
    ]
    return [(axes.contender(row), row[key]) for row in rows]


def _averaged(axes: Axes, configs: pd.DataFrame) -> list[str]:
    notes = []
    for key in axes.averaged:
        values = _some([shown(value) for value in sorted(configs[key].unique(), key=sortable)])
        notes.append(f"{axes.label(key)} varies too ({values}) and is averaged over within each seed.")
    return notes


def _fewer(cells: Sequence[Cell]) -> list[str]:
    """Contenders with fewer settings to choose from than another under the same condition."""
    tried: dict[str, Counter[str]] = {}
    for cell in cells:
        tried.setdefault(cell.condition, Counter())[cell.contender] += cell.ended > 0
    fewer = [name for counts in tried.values() for name in counts if 0 < counts[name] < max(counts.values())]
    names = _some(list(dict.fromkeys(fewer)))
    return (
        [f"Fewer settings were tried of {names} than of others: a best of more is better."] if fewer else []
    )


def _edges(cells: Sequence[Cell], axes: Axes) -> list[str]:
    """A best value at the edge of what was tried may lie beyond it."""
    notes = []
    for key in axes.tuned:
        tried: dict[tuple[str, str], set[tuple[int, float, str]]] = {}
        for cell in cells:
            tried.setdefault((cell.contender, cell.condition), set()).add(sortable(cell.settings[key]))
        at_edge: dict[str, set[str]] = {}
        for cell in cells:
            values = sorted(value for value in tried[cell.contender, cell.condition] if value[0] == 0)
            if len(values) < 2 or not (cell.chosen and cell.metric.n):
                continue
            for name, edge in (("lowest", values[0]), ("highest", values[-1])):
                if sortable(cell.settings[key]) == edge:
                    at_edge.setdefault(cell.contender, set()).add(name)
        if at_edge:
            names = ", ".join(f"{name} ({' and '.join(sorted(ends))})" for name, ends in at_edge.items())
            notes.append(
                f"The best {axes.label(key)} lies at the edge of those tried for {names}: try beyond it."
            )
    return notes


def _chosen_on(cells: Sequence[Cell]) -> list[str]:
    """Contenders whose settings did not finish on the same seeds."""
    notes = []
    for cell in cells:
        if cell.chosen_on is None:
            continue
        where = f" at {cell.condition}" if cell.condition else ""
        seeds = _some(sorted(cell.chosen_on, key=sortable))
        how = f"the seeds they share ({seeds})" if seeds else "different seeds, as they share none"
        notes.append(f"{cell.contender}{where}: its settings were compared on {how}.")
    more = [f"... and {len(notes) - 3} more contenders likewise."] if len(notes) > 3 else []
    return notes[:3] + more


def _unequal(runs: pd.DataFrame, cells: Sequence[Cell]) -> list[str]:
    notes = []
    groups: dict[tuple[str, ...], list[str]] = {}
    for cell in cells:
        if cell.chosen and cell.seeds:
            groups.setdefault(tuple(shown(seed) for seed in cell.seeds), []).append(cell.contender)
    if len(groups) > 1:
        usual = max(groups, key=lambda seeds: len(groups[seeds]))
        rest = [
            f"{_some(list(dict.fromkeys(names)))} on {_some(seeds)}"
            for seeds, names in groups.items()
            if seeds != usual
        ]
        notes.append(
            f"Not every contender has finished on the same seeds: most on {_some(usual)}; {'; '.join(rest[:8])}. "
            "Differences are taken over the seeds that both have."
        )
    kinds = runs[runs["state"] == "done"][["hardware", "versions"]].nunique()
    if kinds["hardware"] > 1:
        notes.append(f"The runs come from {kinds['hardware']} kinds of hardware: times do not compare.")
    if kinds["versions"] > 1:
        notes.append(f"The runs come from {kinds['versions']} sets of software versions.")
    return notes


def _some(words: Sequence[str], limit: int = 8) -> str:
    more = f" and {len(words) - limit} more" if len(words) > limit else ""
    return ", ".join(words[:limit]) + more
