"""A sweep from a file: progress, comparison, skipping, failures, and stopping it."""

from __future__ import annotations

import csv
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import SMALL

from bnlight.cli import main
from bnlight.run.status import read_status
from bnlight.run.sweep import Sweep, duration

SWEEP = """
# Which of two?
defaults: [train, _self_, {override model: mlp}, {override logger: csv}, {override trainer: cpu}]
model: {width: 16, depth: 1}
trainer: {max_epochs: 1}
hydra:
  mode: MULTIRUN
  sweeper: {params: {norm: "batch,group", seed: "0,1"}}
"""


@pytest.fixture
def ours(project: Path) -> Path:
    (project / "sweeps").mkdir()
    (project / "sweeps" / "ours.yaml").write_text(SWEEP)
    return project / "outputs" / "ours"


def test_a_users_own_sweep_file_runs_and_ends_with_the_comparison(
    ours: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", "ours"]) == 0
    output = capsys.readouterr().out
    for number in range(1, 5):
        assert f"[{number}/4" in output
    assert " left] " in output
    for text in (
        "test accuracy",
        "mean ± 95 % CI",
        "best validation",
        "time per",
        "results.csv",
    ):
        assert text in output
    with (ours / "results.csv").open() as file:
        assert sorted(row["norm"] for row in csv.DictReader(file)) == ["batch", "batch", "group", "group"]
    assert (ours / "comparison.html").stat().st_size > 1_000_000
    begun = time.perf_counter()
    assert main(["sweep", "sweeps/ours.yaml"]) == 0
    assert time.perf_counter() - begun < 20
    assert capsys.readouterr().out.count("done before, skipped") == 4


def test_the_plain_hydra_form_of_a_sweep_does_the_same(ours: Path) -> None:
    hydra = ["--config-dir", "sweeps", "--config-name", "ours", "-m", "norm=batch,group", "seed=0"]
    assert main(["train", *hydra]) == 0
    assert len(list(ours.glob("*/result.json"))) == 2
    assert (ours / "comparison.html").exists()


def test_overrides_widen_a_sweep_and_finished_jobs_stay(
    ours: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["sweep", "ours", "norm=batch", "seed=0"])
    assert main(["sweep", "ours", "norm=batch,layer", "seed=0"]) == 0
    assert capsys.readouterr().out.count("done before, skipped") == 1
    assert len(list(ours.glob("*/result.json"))) == 2


def test_a_failed_job_is_shown_and_the_rest_is_compared(
    ours: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(["sweep", "ours", "norm=batch,instance", "seed=0"]) == 1
    )  # instance norm needs space; an MLP has none
    output = capsys.readouterr().out
    states = sorted(read_status(path.parent)["state"] for path in ours.glob("*/status.json"))
    assert states == ["done", "failed"]
    assert output.count("InstanceNorm") >= 2  # when it happened, and under the table
    with (ours / "results.csv").open() as file:
        assert {row["norm"]: row["state"] for row in csv.DictReader(file)} == {
            "batch": "done",
            "instance": "failed",
        }
    assert "failed" in (ours / "comparison.html").read_text()


def test_the_comparison_is_rebuilt_from_a_folder_that_has_moved(ours: Path) -> None:
    main(["sweep", "ours", "seed=0"])
    before = (ours / "results.csv").read_text()
    moved = ours.parent.parent / "elsewhere"
    shutil.move(ours, moved)
    (moved / "results.csv").unlink()
    assert main(["compare", str(moved)]) == 0
    assert (moved / "results.csv").read_text() == before


def test_a_users_sweep_comes_before_one_of_the_package(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "sweeps").mkdir()
    (project / "sweeps" / "norms.yaml").write_text(SWEEP)
    assert main(["sweep", "norms", "--cfg", "job"]) == 0
    assert "bnlight.models.MLP" in capsys.readouterr().out
    assert main(["sweep", "norms", "norm=batch", "seed=0", "+trainer.limit_train_batches=2"]) == 0
    assert "1 job, 1 done" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "arguments", "said"),
    [
        (SWEEP + "modle: {width: 3}", [], "has a key 'modle' that nothing reads.\nDid you mean 'module'?"),
        (SWEEP.replace("norm:", "+nrom:"), [], "adds a key that nothing reads.\nDid you mean 'norm'?"),
        (SWEEP, ["model.widht=3"], "There is no key 'widht' in 'model'.\nDid you mean 'width'?"),
        (SWEEP, ["nrom=a,b"], "There is no key 'nrom'.\nDid you mean 'norm'?"),
        (SWEEP, ["+nrom=a,b"], "adds a key that nothing reads.\nDid you mean 'norm'?"),
    ],
)
def test_a_misspelt_key_in_or_beside_a_sweep_file_is_refused(
    project: Path, capsys: pytest.CaptureFixture[str], text: str, arguments: list[str], said: str
) -> None:
    (project / "sweeps").mkdir()
    (project / "sweeps" / "ours.yaml").write_text(text)
    assert main(["sweep", "ours", *arguments]) == 2
    assert said in capsys.readouterr().err
    assert not list(project.glob("**/status.json"))


def test_a_single_job_after_a_sweep_in_one_process_is_a_single_job(ours: Path) -> None:
    assert main(["sweep", "ours", "seed=0"]) == 0
    assert main(["train", *SMALL]) == 0


def test_progress_shows_epoch_and_metric_in_lines_and_in_a_bar(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bnlight.run.progress.SECONDS_TO_FIRST_LINE", 0.0)
    main(["train", *SMALL, "trainer.max_epochs=3", "progress=plain"])
    output = capsys.readouterr().out
    assert "batch-mlp-digits-s0  epoch 1/3\n" in output
    assert "batch-mlp-digits-s0  epoch 3/3 val 0." in output
    monkeypatch.setattr("bnlight.run.progress.SECONDS_BETWEEN_REFRESHES", 0.0)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    main(["train", *SMALL, "trainer.max_epochs=4", "progress=bar"])
    assert "epoch 4/4 val 0." in capsys.readouterr().out
    main(["train", *SMALL, "trainer.max_epochs=5", "progress=off"])
    assert "epoch" not in capsys.readouterr().out


def test_ctrl_c_stops_the_sweep_and_names_the_command_that_continues(
    ours: Path, bnlight: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    arguments = ["sweep", "ours", "trainer.max_epochs=40"]
    command = [sys.executable, "-m", "bnlight", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    deadline = time.monotonic() + 120
    while not list(ours.glob("*/checkpoints/last.ckpt")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "bnlight sweep ours trainer.max_epochs=40" in errors
    (status,) = ours.glob("*/status.json")
    assert json.loads(status.read_text())["state"] == "interrupted"
    done = bnlight(*arguments)
    assert done.returncode == 0
    assert "interrupted before, continued" in done.stdout
    assert len(list(ours.glob("*/result.json"))) == 4


def test_the_label_says_which_job_of_how_many_and_what_is_left() -> None:
    sweep = Sweep(Path(), total=18)
    assert sweep.label(0) == "[ 1/18]"
    sweep.seconds = [10.0, 20.0]
    assert sweep.label(12) == "[13/18, 90 s left]"
    sweep.at_a_time = 3
    assert sweep.label(12) == "[13/18, 30 s left]"
    assert Sweep(Path(), total=None).label(4) == "[5]"
    assert [duration(seconds) for seconds in (3, 240, 7800)] == ["3 s", "4 min", "2 h 10 min"]
