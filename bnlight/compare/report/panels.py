"""The panels of a W&B report and workspace: curves, results and what the norms do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bnlight.compare.axes import sortable
from bnlight.compare.page.data import spaced_by_factors
from bnlight.compare.report.library import wr
from bnlight.compare.report.names import config_key, summary_key
from bnlight.compare.verdict import metric_words
from bnlight.run.tracking.pieces import GLOBAL_STEP

if TYPE_CHECKING:
    from bnlight.compare.comparison import Comparison

X_AXES = {"optimizer steps": GLOBAL_STEP, "epochs": "epoch", "seconds": "RelativeTime(Process)"}
COLUMNS, WIDTH, HEIGHT = 3, 8, 8  # of panels in a grid, whose width is 24
BANDED = {"groupby_aggfunc": "mean", "groupby_rangefunc": "stderr"}  # mean over seeds, and its standard error
MOST_RUNS = 100  # in a line plot: W&B's own limit


def curves(comparison: Comparison) -> list[Any]:
    """What the jobs monitor over optimizer steps, epochs and seconds; accuracy and losses over steps."""
    names = dict.fromkeys([comparison.monitor.metric, "val/accuracy", "val/loss", "train/loss"])
    logged = [name for name in names if name in comparison.history]
    wanted = [(name, "optimizer steps") for name in logged]
    wanted += [(name, unit) for name in logged[:1] for unit in X_AXES if unit != "optimizer steps"]
    return [_curve(name, unit) for name, unit in wanted]


def _curve(name: str, unit: str) -> Any:
    words = metric_words(name)
    return wr.LinePlot(
        title=f"{words.capitalize()} over {unit}",
        x=X_AXES[unit],
        y=[name],
        title_x=unit,
        title_y=words,
        log_y=True if "loss" in name else None,
        aggregate=True,
        smoothing_type="none",
        max_runs_to_show=MOST_RUNS,
        **BANDED,
    )


def results(comparison: Comparison) -> list[Any]:
    """The metric and the time per step of each contender, and the metric against every numeric setting."""
    axes, metric = comparison.axes, comparison.metric
    value = wr.SummaryMetric(summary_key(comparison, metric))
    group = wr.Config(config_key(axes.contenders[0]))
    panels: list[Any] = [
        wr.BarPlot(
            title=metric_words(name).capitalize(),
            metrics=[wr.SummaryMetric(summary_key(comparison, name))],
            groupby=group,
            **BANDED,
        )
        for name in dict.fromkeys([metric, "seconds_per_step"])
    ]
    numeric = {
        key: numbers for key in [*axes.conditions, *axes.tuned] if (numbers := _numbers(comparison, key))
    }
    for key, numbers in numeric.items():
        panels.append(
            wr.ScatterPlot(
                title=f"{metric_words(metric).capitalize()} against {axes.label(key)}",
                x=wr.Config(config_key(key)),
                y=value,
                log_x=spaced_by_factors(numbers) or None,
            )
        )
    if len(numeric) > 1:
        columns = [
            wr.ParallelCoordinatesPlotColumn(
                wr.Config(config_key(key)),
                display_name=axes.label(key),
                log=spaced_by_factors(numeric.get(key, [])) or None,
            )
            for key in [*axes.contenders, *numeric]
        ]
        columns.append(wr.ParallelCoordinatesPlotColumn(value, display_name=metric_words(metric)))
        panels.append(wr.ParallelCoordinatesPlot(title="All settings", columns=columns))
    return panels


def norms() -> list[Any]:
    """What the callback NormMonitor logs of each layer."""
    shown = {
        "How far evaluation is from training": r"norm/.*train_eval_gap",
        "Lengths of the weights": r"norm/.*weight_norm",
        "Running standard deviations": r"norm/.*running_std",
    }
    common = {"x": GLOBAL_STEP, "title_x": "optimizer steps", "aggregate": True, **BANDED}
    return [wr.LinePlot(title=title, metric_regex=regex, **common) for title, regex in shown.items()]


def placed(panels: list[Any]) -> list[Any]:
    """The panels in rows of three."""
    for index, panel in enumerate(panels):
        row, column = divmod(index, COLUMNS)
        panel.layout = wr.Layout(x=column * WIDTH, y=row * HEIGHT, w=WIDTH, h=HEIGHT)
    return panels


def _numbers(comparison: Comparison, key: str) -> list[float]:
    """The values of a setting in their order; none unless they are numbers, and several."""
    ranks = sorted({sortable(value) for value in comparison.axes.values[key].dropna()})
    numbers = [number for kind, number, _ in ranks if kind == 0]
    return numbers if len(numbers) == len(ranks) > 1 else []
