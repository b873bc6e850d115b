"""`metrics.csv`: one wide table, whatever is logged and whenever the process dies."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from conftest import SMALL

from bnlight.cli import main
from bnlight.compare import read_runs
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


@pytest.mark.parametrize(
    "limits", [["trainer.max_epochs=2"], ["trainer.max_epochs=9", "+trainer.max_steps=5"]]
)
def test_the_final_test_stands_at_the_epoch_that_was_trained_last(project: Path, limits: list[str]) -> None:
    assert main(["train", *SMALL, "progress=off", "+trainer.limit_train_batches=3", *limits]) == 0
    (job,) = project.glob("outputs/train/*/")
    tested = [row for row in rows(job) if row["test/accuracy"]]
    assert [row["epoch"] for row in tested] == ["1"]
    assert max(row["epoch"] for row in rows(job)) == "1"
    result = json.loads((job / "result.json").read_text())
    assert (result["epochs"], result["steps"]) == (2, int(tested[0]["step"]))


def test_a_step_belongs_to_one_epoch_whatever_an_older_test_has_written(tmp_path: Path) -> None:
    job = tmp_path / "one"
    job.mkdir()
    file = MetricsFile(job, attempt=1)
    file.log_metrics({"val/accuracy": 0.5, "epoch": 0}, step=10)
    file.log_metrics({"test/accuracy": 0.4, "epoch": 1}, step=10)
    (job / "config.yaml").write_text("{job: {name: one}}")
    (job / "status.json").write_text('{"state": "done"}')
    history = read_runs(tmp_path).history
    assert history["epoch"].tolist() == [0]
    assert history["test/accuracy"].tolist() == [0.4]
