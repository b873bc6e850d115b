"""`metrics.csv`: one wide table, whatever is logged and whenever the process dies."""

from __future__ import annotations

import csv
from pathlib import Path

from bnlight.run.metrics import MetricsFile


def rows(path: Path) -> list[dict[str, str]]:
    with (path / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_new_metric_widens_the_table_and_keeps_the_rows(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path, attempt=1)
    file.log_metrics({"train/loss": 1.5, "epoch": 0}, step=10)
    file.log_metrics({"val/accuracy": 0.5, "epoch": 0}, step=10)
    file.log_metrics({"train/loss": 1.25, "epoch": 1}, step=20)
    first, second, third = rows(tmp_path)
    assert list(first)[:4] == ["attempt", "step", "epoch", "time"]
    assert (first["train/loss"], first["val/accuracy"]) == ("1.5", "")
    assert (second["train/loss"], second["val/accuracy"]) == ("", "0.5")
    assert (third["step"], third["epoch"], third["train/loss"]) == ("20", "1", "1.25")


def test_a_resumed_job_appends_under_its_own_attempt(tmp_path: Path) -> None:
    MetricsFile(tmp_path, attempt=1).log_metrics({"train/loss": 1.0}, step=1)
    MetricsFile(tmp_path, attempt=2).log_metrics({"train/loss": 2.0}, step=1)
    assert [row["attempt"] for row in rows(tmp_path)] == ["1", "2"]


def test_a_line_cut_by_a_kill_does_not_mix_with_the_next(tmp_path: Path) -> None:
    MetricsFile(tmp_path, attempt=1).log_metrics({"train/loss": 1.0}, step=1)
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("1,2,,17000")
    MetricsFile(tmp_path, attempt=2).log_metrics({"train/loss": 3.0}, step=2)
    assert [(row["attempt"], row["step"], row["train/loss"]) for row in rows(tmp_path)] == [
        ("1", "1", "1.0"),
        ("2", "2", "3.0"),
    ]
