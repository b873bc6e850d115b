"""`metrics.csv`: one wide table, whatever is logged and whenever the process dies."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from conftest import SMALL
from own_code import MAE, MINE, REGRESSION

from bnlight.cli import main
from bnlight.compare import compare, read_runs
from bnlight.run.metrics import MetricsFile

LOGS = """
class Logs(pl.Callback):
    def on_train_epoch_end(self, trainer, module):
        trainer.logger.log_metrics({"own/free": 5.0})
        trainer.logger.log_metrics({"own/value": torch.tensor(3.0 + trainer.current_epoch)}, step=trainer.global_step)

class Named(Regression):
    def training_step(self, batch, index):
        self.log("time", 7.0)
        self.log("attempt", 8.0)
        return super().training_step(batch, index)

    def on_train_epoch_end(self):
        self.log("step", 100.0 + self.current_epoch)
        self.log("epoch", 50.0)

class Pictures(Regression):
    def on_train_start(self):
        self.logger.experiment.add_image("a", 1)
        self.logger.log_image("a", [1])
        self.logger.watch(self)
"""
RATES = [
    "+callbacks.rate._target_=pytorch_lightning.callbacks.LearningRateMonitor",
    "+callbacks.logs._target_=mine.Logs",
]


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


@pytest.mark.parametrize("logger", ["csv", "wandb"])
def test_what_a_callback_logs_to_the_loggers_alone_can_be_compared(project: Path, logger: str) -> None:
    (project / "mine.py").write_text(MINE + LOGS)
    assert main(["train", *REGRESSION, *MAE, *RATES, f"logger={logger}"]) == 0
    (job,) = project.glob("outputs/train/*/")
    metrics = json.loads((job / "result.json").read_text())["metrics"]
    assert (metrics["lr-SGD"], metrics["own/value"]) == (pytest.approx(0.05), 4.0)
    assert [row["own/value"] for row in rows(job) if row["own/value"]] == ["3.0", "4.0"]
    assert [row["step"] for row in rows(job) if row["own/free"]] == ["6", "12"]
    assert compare("outputs/train").metric == "test/mae"
    assert compare("outputs/train", metric="lr-SGD").cells[0].metric.mean == pytest.approx(0.05)
    assert {"lr-SGD", "own/value"} <= {
        *(project / "outputs/train/results.csv").read_text().split("\n")[0].split(",")
    }
    with pytest.raises(ValueError, match=r"there are: .*lr-SGD.*own/value"):
        compare("outputs/train", metric="lr-Adam")


@pytest.mark.parametrize("logger", ["csv", "wandb"])
def test_metrics_called_as_the_columns_of_the_index_are_beside_them(project: Path, logger: str) -> None:
    (project / "mine.py").write_text(MINE + LOGS)
    named = ["module._target_=mine.Named", f"logger={logger}", "trainer.log_every_n_steps=2"]
    assert main(["train", *REGRESSION, *MAE, *named]) == 0
    (job,) = project.glob("outputs/train/*/")
    found = rows(job)
    assert {row["attempt"] for row in found} == {"1"}
    assert {row["epoch"] for row in found} <= {"0", "1", "2"}
    assert max(int(row["step"]) for row in found) == 12
    assert all(float(row["time"]) > 1e9 for row in found)
    logged = {
        name: {row[f"logged/{name}"] for row in found} - {""} for name in ("step", "epoch", "time", "attempt")
    }
    assert logged == {"step": {"100.0", "101.0"}, "epoch": {"50.0"}, "time": {"7.0"}, "attempt": {"8.0"}}
    metrics = json.loads((job / "result.json").read_text())["metrics"]
    assert (metrics["logged/step"], metrics["logged/time"]) == (101, 7)
    assert not {"step", "epoch", "time", "attempt"} & metrics.keys()
    assert (job / "job.log").read_text().count("metric `step`") == 1
    assert compare("outputs/train").cells[0].metric.n == 1


def test_what_only_a_tracker_can_does_nothing_without_one(project: Path) -> None:
    (project / "mine.py").write_text(MINE + LOGS)
    assert main(["train", *REGRESSION, *MAE, "module._target_=mine.Pictures"]) == 0


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
