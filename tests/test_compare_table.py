"""What a comparison prints and writes: the table in the terminal, and results.csv."""

import io
import re
import subprocess
import sys

import pandas as pd
import pytest
from rich.console import Console
from test_compare_builder import QUALITY, write_job, write_sweep

from bnlight.compare import compare


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    root = tmp_path_factory.mktemp("outputs") / "norms"
    write_sweep(root, seeds=(0, 1), wandb=True)
    write_job(root, norm="frn", seed=0, state="diverged", traceback="Traceback\nValueError: the loss is nan")
    write_job(
        root, norm="tanh", seed=0, state="failed", traceback="Traceback\nRuntimeError: no kernel " + "x" * 200
    )
    write_job(root, norm="tanh", seed=1, state="interrupted")
    (root / "junk").mkdir()
    return root


def printed(comparison, width):
    console = Console(file=io.StringIO(), force_terminal=True, width=width, record=True)
    comparison.print(console)
    return console.export_text()


def test_the_plain_text_has_no_colour_codes_and_every_column(sweep):
    text = str(compare(sweep))
    assert "\x1b" not in text
    assert "…" not in text
    for word in (
        "norm",
        "n",
        "not done",
        "test accuracy",
        "mean ± 95 % CI",
        "best validation",
        "steps to",
        "90 %",
        "time per",
    ):
        assert word in text
    for norm in (*QUALITY, "frn", "tanh"):
        assert any(line.startswith(norm) for line in text.splitlines()), norm


def test_the_table_is_sorted_by_test_accuracy(sweep):
    text = str(compare(sweep)).splitlines()
    rows = [
        line.split()[0] for line in text if line.split()[:1] and line.split()[0] in QUALITY and "±" in line
    ]
    table = [name for name in rows if name in QUALITY][: len(QUALITY)]
    assert table == sorted(QUALITY, key=QUALITY.get, reverse=True)


@pytest.mark.parametrize("width", [80, 100, 120])
def test_in_a_terminal_no_column_is_cut_off(sweep, width):
    comparison = compare(sweep)
    text = printed(comparison, width)
    assert "…" not in text
    for cell in comparison.cells:
        assert str(cell.metric) in text
    head = text.split("───")[0]
    assert all(len(line) <= width for line in [*head.splitlines(), comparison.verdict.splitlines()[0][:1]])


def test_in_a_narrow_terminal_the_numbers_stay_whole(sweep):
    comparison = compare(sweep)
    text = printed(comparison, 40)
    assert all(str(cell.metric) in text for cell in comparison.cells)


def test_a_path_is_never_broken_over_two_lines(sweep):
    text = printed(compare(sweep), 60)
    for path in (sweep / "results.csv", sweep / "comparison.html", next(sweep.glob("frn*")) / "job.log"):
        assert str(path) in text


def test_failed_jobs_are_listed_with_their_last_line_and_their_log(sweep):
    text = str(compare(sweep))
    frn, tanh = next(sweep.glob("frn*")), next(sweep.glob("tanh-*-s0-*"))
    assert f"diverged {frn.name}: ValueError: the loss is nan\n  {frn / 'job.log'}\n" in text
    assert f"failed {tanh.name}: RuntimeError: no kernel {'x' * 200}\n  {tanh / 'job.log'}\n" in text
    assert "1 not finished: tanh" in text
    assert "note: junk: not a job" in text
    assert "18 jobs" not in text
    assert "15 jobs, 12 done, 1 diverged, 1 failed, 1 interrupted" in text


def test_the_paths_of_the_results_stand_at_the_end(sweep):
    lines = str(compare(sweep)).splitlines()
    assert lines[-3:] == [
        f"{sweep / 'results.csv'}",
        f"{sweep / 'comparison.html'}",
        f"{sweep}/*/wandb/offline-run-* (12 W&B runs, offline)",
    ]


def test_many_failures_are_summed_up(tmp_path):
    for seed in range(25):
        write_job(tmp_path, seed=seed, state="failed", traceback=f"Error: number {seed}")
    text = str(compare(tmp_path))
    assert text.count("Error: number") == 10
    assert "... and 15 more: all 25 failed or diverged jobs are in results.csv" in text


def test_the_intervals_are_explained_once(sweep):
    assert str(compare(sweep)).count("Student-t") == 1


def test_piped_output_is_plain(sweep):
    script = f"from bnlight.compare import compare; compare({str(sweep)!r}).print()"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True
    )
    assert "\x1b" not in done.stdout
    assert [line.rstrip() for line in done.stdout.rstrip().splitlines()] == str(compare(sweep)).splitlines()


def test_square_brackets_in_a_message_are_printed_as_they_are(tmp_path):
    job = write_job(tmp_path, norm="batch", state="failed", traceback="KeyError: [bold]norm[/] not in [red]")
    config = (job / "config.yaml").read_text()
    (job / "config.yaml").write_text(config.replace("norm: batch", "norm: '[red]batch[/red]'"))
    text = str(compare(tmp_path))
    assert "KeyError: [bold]norm[/] not in [red]" in text
    assert "\n[red]batch[/red]  0  1 failed" in text


def test_results_csv_has_one_row_per_job_failed_ones_too(sweep):
    comparison = compare(sweep)
    table = pd.read_csv(comparison.results_csv)
    assert len(table) == 15
    assert table["state"].value_counts().to_dict() == {
        "done": 12,
        "diverged": 1,
        "failed": 1,
        "interrupted": 1,
    }
    assert list(table.columns[:5]) == ["job", "state", "norm", "model", "data"]
    done = table[table["state"] == "done"]
    assert done["test/accuracy"].notna().all()
    assert table.set_index("state")["error"]["diverged"] == "ValueError: the loss is nan"
    expected = comparison.runs["test/accuracy"].tolist()
    assert table["test/accuracy"].fillna(-1).tolist() == pytest.approx(
        [-1 if x != x else x for x in expected]
    )
    for name in (
        "seed",
        "batch_size",
        "lr",
        "steps_to_target",
        "seconds_per_step",
        "best_val/loss",
        "identity",
    ):
        assert name in table.columns


def test_results_csv_has_the_settings_that_vary(tmp_path):
    for dropout in (0.0, 0.5):
        write_job(tmp_path, settings={"model.dropout": dropout})
    assert set(pd.read_csv(compare(tmp_path).results_csv)["model.dropout"]) == {0.0, 0.5}


def test_nothing_but_the_two_files_is_left_behind(tmp_path):
    write_sweep(tmp_path, ("batch",), (0, 1))
    before = {path.name for path in tmp_path.iterdir()}
    compare(tmp_path)
    compare(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == before | {"results.csv", "comparison.html"}


def test_a_moved_sweep_compares_the_same(tmp_path):
    write_sweep(tmp_path / "here" / "norms", ("batch", "renorm"), (0, 1))
    before = compare(tmp_path / "here" / "norms")
    (tmp_path / "there").mkdir()
    (tmp_path / "here" / "norms").rename(tmp_path / "there" / "moved")
    after = compare(tmp_path / "there" / "moved")
    assert after.verdict == before.verdict
    assert str(tmp_path) not in (tmp_path / "there" / "moved" / "results.csv").read_text()
    page = (tmp_path / "there" / "moved" / "comparison.html").read_text()
    assert not re.search(rf"""(href|src)=["']?(file:)?/*{re.escape(str(tmp_path).lstrip("/"))}""", page)
