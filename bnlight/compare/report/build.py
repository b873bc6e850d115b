"""A comparison as the objects of wandb-workspaces, and as the JSON that W&B's server takes. No network."""

from __future__ import annotations

import json
import warnings
from typing import TYPE_CHECKING, Any

from bnlight.compare.formats import as_markdown
from bnlight.compare.report.library import ReportViewspec, View, expr, wr, ws
from bnlight.compare.report.names import colours, config_key, filters, only, owners, server_key, summary_key
from bnlight.compare.report.panels import HEIGHT, curves, norms, placed, results
from bnlight.compare.report.run import PAGE, TABLE
from bnlight.compare.stats import Cell
from bnlight.compare.table import sweep_name
from bnlight.compare.verdict import metric_words
from bnlight.run.tracking.pieces import GLOBAL_STEP

if TYPE_CHECKING:
    from bnlight.compare.comparison import Comparison

MOST_CONDITIONS = 12  # that have curves of their own in a report
MOST_LINKS = 100
MOST_TITLE = 128  # characters: W&B's limit
LINES = "Means over seeds with their standard errors; a colour is a contender, the same as on the page."


def build_report(
    comparison: Comparison, project: str, entity: str, title: str, summary_run: str
) -> wr.Report:
    """Verdict and table, the page, learning curves under each condition, results against settings, links.

    A run set holds the runs of one contender at the setting that stands for it, and becomes one line with a band.
    `entity` may be empty until the report is saved; `summary_run` is the id of the run that holds table and page.
    """
    conditions: dict[str, list[Cell]] = {}
    for cell in comparison.cells:
        if cell.chosen:
            conditions.setdefault(cell.condition, []).append(cell)
    contenders = {cell.contender: cell for cell in comparison.cells}.values()
    blocks: list[Any] = [
        wr.MarkdownBlock(text=as_markdown(comparison)),
        wr.TableOfContents(),
        wr.H1(text="Table and page"),
        _summary(summary_run),
    ]
    for condition, cells in list(conditions.items())[:MOST_CONDITIONS]:
        head = f"Learning curves at {condition}" if condition else "Learning curves"
        sets = [(cell, cell.settings) for cell in cells]
        blocks += [wr.H1(text=head), wr.P(text=LINES), _grid(comparison, sets, curves(comparison))]
    if len(conditions) > MOST_CONDITIONS:
        blocks.append(wr.P(text=f"{len(conditions) - MOST_CONDITIONS} more conditions are in the workspace."))
    sets = [(cell, only(cell, comparison.axes.contenders)) for cell in contenders]
    blocks += [
        wr.H1(text=metric_words(comparison.metric).capitalize()),
        wr.P(text="Every run, as it was set."),
        _grid(comparison, sets, results(comparison)),
        wr.MarkdownBlock(text=_links(comparison)),
    ]
    return wr.Report(
        project=project,
        entity=entity,
        title=_title(comparison, title),
        description=comparison.verdict,
        blocks=blocks,
        width="fluid",
    )


def build_workspace(comparison: Comparison, project: str, entity: str, title: str) -> ws.Workspace:
    """The same panels for all runs of the sweeps, grouped by what is compared, and what NormMonitor logs."""
    palette, axes = colours(comparison), comparison.axes
    paths = {cell.contender: ws.GroupPath(*_values(cell, axes.contenders)) for cell in comparison.cells}
    pinned = [f"config:{server_key(key)}" for key in axes.keys]
    return ws.Workspace(
        entity=entity,
        project=project,
        name=_title(comparison, title),
        sections=[
            ws.Section(name="Learning curves", panels=placed(curves(comparison)), is_open=True),
            ws.Section(name="Results", panels=placed(results(comparison)), is_open=True),
            ws.Section(name="Norms", panels=placed(norms())),
        ],
        settings=ws.WorkspaceSettings(x_axis=GLOBAL_STEP, max_runs=100),
        runset_settings=ws.RunsetSettings(
            filters=filters(comparison.runs, {}),
            groupby=[expr.Config(config_key(key)) for key in axes.contenders],
            group_colors={path: palette[name] for name, path in paths.items()},
            run_settings={
                run: ws.RunSettings(color=palette[name]) for run, name in owners(comparison).items()
            },
            pinned_columns=[*pinned, f"summary:{summary_key(comparison, comparison.metric)}"],
        ),
    )


def report_json(report: wr.Report) -> str:
    """The report's specification, after a round trip through the library's models."""
    return _checked(report, ReportViewspec)


def workspace_json(workspace: ws.Workspace) -> str:
    """The workspace's specification, after a round trip through the library's models."""
    return _checked(workspace, View)


def _checked(thing: Any, model: Any) -> str:
    """ValueError where the library loses, of what it has written, anything but defaults: W&B would show less."""
    form: dict[str, Any] = {"by_alias": True, "exclude_none": True, "indent": 2}
    text: str = thing._to_model().model_dump_json(**form)
    with warnings.catch_warnings(record=True) as doubts:
        warnings.simplefilter("always")
        read = model.model_validate_json(text).model_dump_json(**form)
    if doubts or not _within(json.loads(text), json.loads(read)):
        raise ValueError(
            f"wandb-workspaces does not read back the {type(thing).__name__.lower()} that it has written "
            f"({'; '.join(str(doubt.message) for doubt in doubts) or 'something is lost'}); try another release of it"
        )
    return text


def _within(part: Any, whole: Any) -> bool:
    if isinstance(part, dict) and isinstance(whole, dict):
        return all(key in whole and _within(value, whole[key]) for key, value in part.items())
    if isinstance(part, list) and isinstance(whole, list):
        return len(part) == len(whole) and all(map(_within, part, whole))
    return bool(part == whole)


def _summary(run: str) -> Any:
    """The summary run's table and page, both as wide as the report."""
    table = wr.WeavePanelSummaryTable(table_name=TABLE, layout=wr.Layout(x=0, y=0, w=24, h=HEIGHT))
    page = wr.MediaBrowser(
        media_keys=[PAGE], num_columns=1, layout=wr.Layout(x=0, y=HEIGHT, w=24, h=3 * HEIGHT)
    )
    runset = wr.Runset(name="comparison", filters=f"Metric('ID') == {run!r}")
    return wr.PanelGrid(runsets=[runset], panels=[table, page], hide_run_sets=True)


def _grid(comparison: Comparison, sets: list[tuple[Cell, dict[str, Any]]], panels: list[Any]) -> Any:
    """Panels over a run set for each cell and the settings that its runs share, in its contender's colour."""
    palette, owned, keys = colours(comparison), owners(comparison), comparison.axes.contenders
    runsets, groups = [], {}
    for cell, settings in sets:
        name, colour = cell.contender, palette[cell.contender]
        own = [run for run, owner in owned.items() if owner == name]
        runset = wr.Runset(
            name=name,
            filters=filters(comparison.runs, settings),
            groupby=[f"config.{config_key(key)}" for key in keys],
            run_settings={run: wr.RunSettings(color=colour) for run in own},
        )
        values = zip(keys, _values(cell, keys), strict=True)
        group = tuple(wr.RunsetGroupKey(wr.Config(config_key(key)), value) for key, value in values)
        runsets.append(runset)
        groups[wr.RunsetGroup(runset_name=name, keys=group)] = colour
    return wr.PanelGrid(runsets=runsets, panels=placed(panels), custom_run_colors=groups)


def _values(cell: Cell, keys: list[str]) -> list[str]:
    return [str(cell.settings[key]) for key in keys]


def _title(comparison: Comparison, title: str) -> str:
    return (title or f"{sweep_name(comparison)}: comparison")[:MOST_TITLE]


def _links(comparison: Comparison) -> str:
    runs = comparison.runs.dropna(subset=["url"]).head(MOST_LINKS)
    lines = [f"- [{job}]({url})" for job, url in zip(runs["job"], runs["url"], strict=True)]
    again = comparison.command.replace("bnlight compare", "bnlight wandb report", 1)
    return "\n".join(["# Runs", f"Made by `{again}`.", "", *lines])
