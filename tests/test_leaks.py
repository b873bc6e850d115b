"""What one job changes in its process, the next one does not see; and `self.logger` is the logger that was chosen."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import wandb
from own_code import MAE, MINE, REGRESSION
from wandb_file import read_run

from bnlight.cli import main
from bnlight.compare import compare

LEAKS = """
import os, sys

class Leaky(Regression):
    def on_fit_start(self):
        os.makedirs("elsewhere", exist_ok=True)
        os.chdir("elsewhere")
        sys.path.append("/leaked")
        torch.set_default_device("cpu")
        torch.autograd.set_detect_anomaly(True)

class Ends(Regression):
    def __init__(self, how):
        super().__init__()
        self.how = how

    def on_train_epoch_start(self):
        import wandb
        wandb.finish()
        if self.how == "init":
            wandb.init(project="own", reinit=True)

class Tracks(Regression):
    def on_train_start(self):
        self.logger.experiment.log({"own/value": 3.0})
        self.logger.log_table("own/table", columns=["a"], data=[[1]])
"""


def test_jobs_after_one_that_changes_its_process_are_where_and_what_they_should_be(project: Path) -> None:
    (project / "mine.py").write_text(MINE + LEAKS)
    before = [*sys.path]
    leaky = [*REGRESSION, *MAE, "module._target_=mine.Leaky", "seed=0,1"]
    assert main(["train", "-m", *leaky]) == 0
    assert Path.cwd() == project
    assert "/leaked" not in sys.path
    assert len(before) + 1 >= len(sys.path)  # the command itself makes the folder importable
    assert not torch.is_anomaly_enabled()
    assert getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None) is None
    assert len(compare("outputs/train").runs) == 2
    assert not Path("elsewhere/outputs").exists()


def test_the_logger_of_anybodys_module_is_the_wandb_logger(project: Path) -> None:
    (project / "mine.py").write_text(MINE + LEAKS)
    assert main(["train", *REGRESSION, *MAE, "module._target_=mine.Tracks", "logger=wandb"]) == 0
    (directory,) = project.glob("outputs/train/*/wandb/offline-run-*")
    logged = read_run(directory)["metrics"]
    assert {"own/value", "val/mae"} <= logged
    assert any(name.startswith("own/table") for name in logged)


@pytest.mark.parametrize("how", ["finish", "init"])
def test_a_module_that_ends_the_run_or_begins_its_own_fails_no_job(project: Path, how: str) -> None:
    (project / "mine.py").write_text(MINE + LEAKS)
    ends = ["module._target_=mine.Ends", f"+module.how={how}", "logger=wandb", "seed=0,1"]
    assert main(["train", "-m", *REGRESSION, *MAE, *ends]) == 0
    assert wandb.run is None
    for job in project.glob("outputs/train/*/"):
        assert "test/mae" in (job / "metrics.csv").read_text()
