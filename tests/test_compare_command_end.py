"""The end of a sweep writes and prints the comparison, whatever became of the jobs."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import SMALL

from bnlight.cli import main

OURS = ["train", "-m", *SMALL, "hydra.sweep.dir=outputs/ours"]
STOPPING = """
import os, pathlib, signal
from bnlight.data import Digits
class Data(Digits):
    def test_dataloader(self):
        if list(pathlib.Path("outputs/ours").glob("*/result.json")):
            os.kill(os.getpid(), signal.SIGINT)
        return super().test_dataloader()
"""


def test_where_all_jobs_failed_it_says_so_and_lists_them(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*OURS, "norm=instance", "seed=0,1"]) == 1  # an MLP has no space for it
    text, errors = capsys.readouterr()
    assert "No run has finished with a test accuracy yet." in text
    assert text.count("failed instance-mlp-digits-s") == 2
    assert "Traceback" not in errors
    assert {path.name for path in Path("outputs/ours").glob("*.*")} >= {"results.csv", "comparison.html"}


def test_a_sweep_that_fails_fast_ends_with_it(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*OURS, "norm=batch,instance,group", "--fail-fast"]) == 1
    text = capsys.readouterr().out
    assert "2 jobs, 1 done, 1 failed" in text
    assert "instance (1 failed) has no result." in text
    assert Path("outputs/ours/comparison.html").exists()


def test_a_wrong_setting_in_the_middle_ends_with_what_is_there(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*OURS, "time_limit=1h,soon"]) == 2
    text, errors = capsys.readouterr()
    assert "1 job, 1 done" in text
    assert errors.splitlines()[-1].startswith("time_limit=soon is not a duration")
    assert Path("outputs/ours/comparison.html").exists()
    assert main([*OURS, "norm=nothing,batch"]) == 2
    assert "jobs" not in capsys.readouterr().out  # a typo, before any job: the error alone


def test_ctrl_c_says_how_to_get_it(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.py").write_text(STOPPING)
    assert main([*OURS, "seed=0,1", "data=custom", "data._target_=mine.Data"]) == 130
    errors = capsys.readouterr().err
    assert errors.count("Compare what has finished with: bnlight compare") == 1
    (line,) = (line for line in errors.splitlines() if "bnlight compare" in line)
    command = line.partition("bnlight ")[2].split()
    assert main(command) == 0
    assert "2 jobs, 1 done, 1 interrupted" in capsys.readouterr().out


def test_a_comparison_that_cannot_be_written_is_printed_and_fails_nothing(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("outputs/ours/results.csv").mkdir(parents=True)
    assert main([*OURS, "seed=0,1"]) == 0
    text, errors = capsys.readouterr()
    assert "2 jobs, 2 done" in text
    assert "Nothing was written (Is a directory: " in text
    assert "Traceback" not in errors
