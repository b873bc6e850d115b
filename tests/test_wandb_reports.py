"""`bnlight wandb report`: what the specifications hold, what is saved in W&B, and what happens without it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL
from wandb import teardown
from wandb_file import records
from wandb_reports_server import ReportsServer
from wandb_server import serving

from bnlight.cli import main
from bnlight.compare.palette import hexadecimal, slots

Command = Callable[..., subprocess.CompletedProcess[str]]
COLOURS = {name: hexadecimal(slot) for name, slot in slots(["batch", "group"]).items()}
SWEEP = ["norm=batch,group", "data.batch_size=64,256", "optimizer.lr=0.05,0.2", "seed=1,2"]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two norms at two batch sizes and two learning rates, two seeds each, with W&B offline."""
    folder = tmp_path_factory.mktemp("reports")
    small = [argument for argument in SMALL if not argument.startswith("logger")]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    subprocess.run(
        [sys.executable, "-m", "bnlight", "train", "-m", *small, *SWEEP, "logger=wandb"],
        cwd=folder, env=environment | {"WANDB_MODE": "offline"}, check=True, timeout=300, capture_output=True,
    )  # fmt: skip
    return folder / "outputs" / "train"


@pytest.fixture
def report(sweep: Path, project: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["wandb", "report", str(sweep)]) == 0
    teardown()  # W&B's process writes the file's end after `finish` has returned
    assert "`wandb login`, then the same command with --push" in capsys.readouterr().out
    return json.loads((sweep / "wandb_report.json").read_text())


def grids(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [block["metadata"] for block in report["spec"]["blocks"] if block["type"] == "panel-grid"]


def test_curves_have_one_line_per_norm_over_its_own_runs_in_its_colour(report: dict[str, Any]) -> None:
    _, *curves, _ = grids(report)
    assert len(curves) == 2  # batch sizes
    for size, grid in zip((64, 256), curves, strict=True):
        assert {runset["name"] for runset in grid["runSets"]} == {"batch", "group"}
        for runset in grid["runSets"]:
            wanted = {item["key"]["name"]: item["value"] for item in runset["filters"]["filters"]}
            assert wanted["norm.value.name"] == runset["name"]
            assert wanted["data.value.batch_size"] == size
            assert wanted["optimizer.value.lr"] in (0.05, 0.2)  # the one that was chosen for it
            assert wanted["group"] == ["train"]
            assert [key["name"] for key in runset["grouping"]] == ["norm.value.name"]
            line = f"{runset['id']}-config:norm.value.name:{runset['name']}"
            assert grid["customRunColors"][line] == COLOURS[runset["name"]]
        panels = [panel["config"] for panel in grid["panelBankSectionConfig"]["panels"]]
        assert {(panel["groupAgg"], panel["groupArea"]) for panel in panels} == {("mean", "stderr")}
        axes = {panel["xAxis"] for panel in panels if panel["metrics"] == ["val/accuracy"]}
        assert axes == {"trainer/global_step", "epoch", "_runtime"}


def test_every_run_has_its_norms_colour_and_the_metric_stands_against_each_setting(
    report: dict[str, Any], sweep: Path
) -> None:
    results = grids(report)[-1]
    for status in sweep.glob("*/status.json"):
        run = json.loads(status.read_text())["wandb_id"]
        assert results["customRunColors"][run] == COLOURS[status.parent.name.split("-")[0]]
    panels = results["panelBankSectionConfig"]["panels"]
    scatters = {p["config"]["xAxis"]: p["config"] for p in panels if p["viewType"] == "Scatter Plot"}
    assert scatters.keys() == {"config:data.value.batch_size", "config:optimizer.value.lr"}
    assert {plot["yAxis"] for plot in scatters.values()} == {"summary:test/accuracy"}
    assert all(plot["xAxisLogScale"] for plot in scatters.values())


def test_the_report_says_what_the_comparison_says(report: dict[str, Any], sweep: Path) -> None:
    from bnlight.compare import compare
    from bnlight.compare.formats import as_markdown

    comparison = compare(sweep)
    texts = [block["content"] for block in report["spec"]["blocks"] if block["type"] == "markdown-block"]
    assert texts[0] == as_markdown(comparison)
    assert comparison.verdict == report["description"]
    assert comparison.verdict in texts[0]


def test_the_library_reads_what_was_written(report: dict[str, Any], sweep: Path) -> None:
    from bnlight.compare.report.library import ReportViewspec, View, wr, ws

    text = (sweep / "wandb_report.json").read_text()
    read = wr.Report._from_model(ReportViewspec.model_validate_json(text))
    assert not [block for block in read.blocks if "Unknown" in type(block).__name__]
    kinds = {type(panel).__name__ for b in read.blocks if isinstance(b, wr.PanelGrid) for panel in b.panels}
    assert kinds == {
        "LinePlot", "ScatterPlot", "BarPlot", "ParallelCoordinatesPlot", "MediaBrowser", "WeavePanelSummaryTable",
    }  # fmt: skip
    view = View.model_validate_json((sweep / "wandb_workspace.json").read_text())
    workspace = ws.Workspace._from_model(view)
    assert [section.name for section in workspace.sections] == ["Learning curves", "Results", "Norms"]
    assert workspace.settings.x_axis == "trainer/global_step"
    assert workspace.runset_settings.group_colors == COLOURS


def test_the_summary_run_holds_table_page_and_verdict(report: dict[str, Any], sweep: Path) -> None:
    (piece,) = sweep.glob(".report/wandb/offline-run-*")
    assert piece.name.endswith(grids(report)[0]["runSets"][0]["filters"]["filters"][0]["value"])
    (file,) = piece.glob("*.wandb")
    summary: dict[str, Any] = {}
    for record in records(file):
        if record.WhichOneof("record_type") == "summary":
            changed = record.summary.update
            summary |= {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in changed}
    assert summary["verdict"] == report["description"]
    page = piece / "files" / summary["comparison_page.path"]
    assert page.read_text() == (sweep / "comparison.html").read_text()
    table = json.loads((piece / "files" / summary["comparison_table.path"]).read_text())
    assert len(table["data"]) == 8
    assert {row[table["columns"].index("contender")] for row in table["data"]} == {"batch", "group"}
    assert not list(sweep.parents[1].glob("wandb"))


def test_push_saves_run_report_and_workspace(sweep: Path, project: Path, bnlight: Command) -> None:
    with serving(ReportsServer) as server:
        there = {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": server.url, "WANDB_MODE": "online"}
        arguments = ["wandb", "report", str(sweep), "--title", "Which norm?", "--push"]
        done = bnlight(*arguments, "--output", "mine/spec.json", **there, timeout=120)
        assert done.returncode == 0, done.stderr
    report, workspace = server.views
    assert [(view["type"], view["displayName"]) for view in server.views] == [
        ("runs", "Which norm?"), ("project-view", "Which norm?"),
    ]  # fmt: skip
    assert report["entityName"] == workspace["entityName"] == "us"
    assert report["projectName"] == workspace["projectName"] == "bnlight"
    assert json.loads(Path("mine/spec.json").read_text())["spec"] == report["spec"]
    assert json.loads(Path("mine/spec_workspace.json").read_text())["spec"] == workspace["spec"]
    (run,) = server.begun and set(server.begun)
    assert server.exits[run] == [0]
    assert {artifact["artifactTypeName"] for artifact in server.artifacts} == {"run_table"}
    for address in (f"/us/bnlight/runs/{run}", "/us/bnlight/reports/Which-norm", "/us/bnlight?nw="):
        assert f"{server.url}{address}" in done.stdout


def test_a_server_that_keeps_no_report_is_one_line(sweep: Path, project: Path, bnlight: Command) -> None:
    with serving(ReportsServer) as server:
        server.keeps_no_view = True
        there = {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": server.url, "WANDB_MODE": "online"}
        done = bnlight("wandb", "report", str(sweep), "--push", **there, timeout=120)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    (said,) = (line for line in done.stderr.splitlines() if line.startswith("not all was saved: "))
    assert f"{server.url} has not answered as it should (" in said
    assert "401" in said


def test_what_cannot_be_pushed_is_said_at_once(
    sweep: Path, project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NETRC", str(project / "netrc"))
    push = ["wandb", "report", str(sweep), "--push"]
    assert main(push) == 2
    assert "WANDB_MODE=offline; unset it" in capsys.readouterr().err
    monkeypatch.delenv("WANDB_MODE")
    assert main(push) == 2
    assert "W&B has no key here: `wandb login`" in capsys.readouterr().err
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert main(push) == 2
    assert "127.0.0.1:9 cannot be reached" in capsys.readouterr().err
    assert main(["wandb", "report", str(project / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_without_a_page_there_is_no_report(
    sweep: Path, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(sweep, project / "runs", ignore=shutil.ignore_patterns("*.html", "wandb_*.json"))
    (project / "runs" / "comparison.html").mkdir()
    assert main(["wandb", "report", "runs"]) == 2
    assert "a report needs its page, which was not written (Is a directory: runs)" in capsys.readouterr().err
    assert not (project / "runs" / "wandb_report.json").exists()


def test_it_needs_its_library_and_no_torch(sweep: Path, project: Path) -> None:
    script = (
        "import sys\n{}\nfrom bnlight.compare.report.command import main\n"
        f"code = main([{str(sweep)!r}])\nassert 'torch' not in sys.modules\nsys.exit(code)"
    )

    def run(first: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", script.format(first)]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)

    done = run("")
    assert done.returncode == 0, done.stderr
    without = run("sys.modules['wandb_workspaces'] = None")
    assert without.returncode == 2
    assert "pip install 'bnlight[wandb]'" in without.stderr
