"""Reading a sweep's directory: every job is told, whatever became of it."""

import math
import shutil
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
from test_compare_builder import WITHOUT, write_job, write_json, write_metrics, write_result, write_sweep

from bnlight.compare import compare, read_runs
from bnlight.compare.derive import derive, lower_is_better


def derived(root, target=0.9):
    read = read_runs(root)
    return derive(read.runs, read.history, read.configs, target)


def test_a_job_becomes_one_row_with_its_settings_and_results(tmp_path):
    job = write_job(tmp_path, norm="renorm", seed=7, settings={"optimizer.lr": 0.05}, wandb=True)
    write_result(job, {"test/accuracy": 0.5, "val/accuracy": 0.25}, world_size=2, seconds=3.5)
    runs = read_runs(tmp_path).runs
    assert len(runs) == 1
    row = runs.iloc[0]
    assert (row["job"], row["state"], row["norm"], row["model"], row["data"]) == (
        job.name, "done", "renorm", "cnn", "digits",
    )  # fmt: skip
    assert (row["seed"], row["batch_size"], row["lr"], row["world_size"], row["seconds"]) == (
        7,
        32,
        0.05,
        2,
        3.5,
    )
    assert row["overrides"] == "norm=renorm seed=7 optimizer.lr=0.05"
    assert len(row["identity"]) == 64
    assert (row["test/accuracy"], row["val/accuracy"]) == (0.5, 0.25)
    assert (row["directory"], row["log"]) == (job.name, f"{job.name}/job.log")
    assert row["wandb"].startswith(f"{job.name}/wandb/offline-run-")


def test_failed_and_diverged_jobs_keep_their_row_and_their_last_error_line(tmp_path):
    write_job(tmp_path, norm="batch")
    write_job(
        tmp_path,
        norm="tanh",
        state="failed",
        traceback="Traceback:\n  File x\nRuntimeError: out of memory\n\n",
    )
    write_job(tmp_path, norm="frn", state="diverged", traceback="ValueError: the loss is nan")
    runs = read_runs(tmp_path).runs.set_index("norm")
    assert runs["state"].to_dict() == {"batch": "done", "tanh": "failed", "frn": "diverged"}
    assert runs["error"]["tanh"] == "RuntimeError: out of memory"
    assert runs["error"]["frn"] == "ValueError: the loss is nan"
    assert pd.isna(runs["error"]["batch"])
    assert pd.isna(runs["test/accuracy"]["tanh"])


def test_a_running_job_whose_owner_is_gone_reads_as_interrupted(tmp_path):
    alive, dead = write_job(tmp_path, seed=0, state="running"), write_job(tmp_path, seed=1, state="running")
    write_json(
        dead / "status.json", {"state": "running", "host": "elsewhere", "heartbeat": time.time() - 1e5}
    )
    states = read_runs(tmp_path).runs["state"]
    assert states[alive.name] == "running"
    assert states[dead.name] == "interrupted"


def test_foreign_directories_are_noted_and_hidden_ones_passed_over(tmp_path):
    write_job(tmp_path)
    (tmp_path / "my plots").mkdir()
    (tmp_path / ".cache").mkdir()
    (tmp_path / "notes.txt").write_text("hello")
    read = read_runs(tmp_path)
    assert len(read.runs) == 1
    assert read.notes == ["my plots: not a job (no config.yaml with a job block), left out"]


@pytest.mark.parametrize(
    ("file", "content", "note"),
    [
        ("config.yaml", "a: [1, 2", "config.yaml cannot be read"),
        ("config.yaml", "- a list", "config.yaml has no job block"),
        ("status.json", '{"state": "do', "status.json cannot be read"),
        ("status.json", "[1]", "status.json cannot be read"),
        ("result.json", '{"metrics": ', "result.json cannot be read"),
        ("metrics.csv", "epoch,val/loss\n1,2\n", "no column step"),
        ("metrics.csv", b"\xff\xfe\x00", "metrics.csv cannot be read"),
    ],
)
def test_a_broken_file_is_a_note_and_its_job_stays_in_the_list(tmp_path, file, content, note):
    write_job(tmp_path, seed=0)
    broken = write_job(tmp_path, seed=1)
    (broken / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    read = read_runs(tmp_path)
    assert len(read.runs) == 2
    assert [n for n in read.notes if n.startswith(broken.name) and note in n], read.notes
    compare(tmp_path)


@pytest.mark.parametrize("file", ["config.yaml", "status.json", "result.json", "metrics.csv", "job.log"])
def test_a_missing_file_never_stops_the_comparison(tmp_path, file):
    write_job(tmp_path, seed=0)
    (write_job(tmp_path, seed=1) / file).unlink()
    read = read_runs(tmp_path)
    assert len(read.runs) == 2
    assert len(read.notes) == (1 if file in ("config.yaml", "status.json", "result.json") else 0)
    compare(tmp_path)


def test_empty_files_everywhere_are_no_error(tmp_path):
    write_job(tmp_path, seed=0)
    for file in (write_job(tmp_path, seed=1)).iterdir():
        file.write_text("")
    assert "1 done" in str(compare(tmp_path))


def test_null_and_not_a_number_metrics_are_missing_values(tmp_path):
    job = write_job(tmp_path)
    missing = {"test/accuracy": None, "test/loss": math.nan, "a/b": "text", "c/d": True, "g/h": math.inf}
    write_json(job / "result.json", {"metrics": missing | {"e/f": 1}})
    row = read_runs(tmp_path).runs.iloc[0]
    assert row[list(missing)].isna().all()
    assert row["e/f"] == 1.0
    compare(tmp_path)


def test_a_metric_called_like_a_setting_does_not_take_its_place(tmp_path):
    write_job(tmp_path, seed=3, result={"seed": 7.0, "lr": 8.0, "test/accuracy": 0.9})
    run = read_runs(tmp_path).runs.iloc[0]
    assert (run["seed"], run["lr"], run["result/seed"], run["result/lr"]) == (3, 0.1, 7.0, 8.0)


def test_a_copied_job_is_counted_once(tmp_path):
    job = write_job(tmp_path, seed=0)
    write_job(tmp_path, seed=1)
    shutil.copytree(job, tmp_path / "a copy")
    read = read_runs(tmp_path)
    assert read.runs["state"].to_dict()["a copy"] == "duplicate"
    assert "not done" not in str(compare(tmp_path))
    assert read.notes == [f"a copy: the same run as {job.name}, counted once"]
    assert compare(tmp_path).cells[0].metric.n == 2


def test_a_resumed_job_keeps_the_last_attempt_of_each_step_and_metric(tmp_path):
    job = write_job(tmp_path)
    write_metrics(job, [
        {"attempt": 1, "step": 10, "epoch": 0, "time": 1, "train/loss": 3.0},
        {"attempt": 1, "step": 10, "epoch": 0, "time": 1, "val/loss": 2.0, "val/accuracy": 0.5},
        {"attempt": 1, "step": 20, "epoch": 1, "time": 2, "val/loss": 0.1, "val/accuracy": 0.95},
        {"attempt": 1, "step": 30, "epoch": 2, "time": 3, "val/loss": 0.05, "val/accuracy": 0.99},
        {"attempt": 2, "step": 20, "epoch": 1, "time": 9, "val/loss": 1.0, "val/accuracy": 0.6},
        {"attempt": 2, "step": 30, "epoch": 2, "time": 9, "val/accuracy": 0.91},
    ])  # fmt: skip
    history = read_runs(tmp_path).history.set_index("step")
    assert history["val/accuracy"].to_dict() == {10: 0.5, 20: 0.6, 30: 0.91}
    assert history["val/loss"].to_dict() == {10: 2.0, 20: 1.0, 30: 0.05}
    assert history["train/loss"][10] == 3.0
    row = derived(tmp_path).iloc[0]
    assert (row["best_val/accuracy"], row["best_val/loss"], row["steps_to_target"]) == (0.91, 0.05, 30)


def test_the_order_of_attempts_in_the_file_does_not_matter(tmp_path):
    job = write_job(tmp_path)
    rows = [{"attempt": a, "step": 1, "epoch": 0, "time": 0, "val/loss": float(a)} for a in (2, 10, 1)]
    write_metrics(job, rows)
    assert read_runs(tmp_path).history["val/loss"].tolist() == [10.0]


def test_a_last_line_cut_by_a_kill_is_not_believed(tmp_path):
    job = write_job(tmp_path)
    (job / "metrics.csv").write_text("attempt,step,epoch,time,val/accuracy\n1,10,0,1.0,0.5\n1,20,1,2.0,0.9")
    assert read_runs(tmp_path).history["val/accuracy"].tolist() == [0.5]


def test_steps_to_the_target_is_the_first_step_that_reaches_it_or_missing(tmp_path):
    job = write_job(tmp_path)
    write_metrics(job, [
        {"attempt": 1, "step": step, "epoch": 0, "time": 0, "val/accuracy": accuracy}
        for step, accuracy in ((5, 0.2), (10, 0.8), (15, 0.7), (20, 0.95))
    ])  # fmt: skip
    assert derived(tmp_path, 0.8)["steps_to_target"].tolist() == [10]
    assert derived(tmp_path, 0.9)["steps_to_target"].tolist() == [20]
    assert derived(tmp_path, 0.96)["steps_to_target"].isna().all()


def test_seconds_per_step_is_the_median_over_epochs_without_the_first(tmp_path):
    many, one = write_job(tmp_path, seed=0), write_job(tmp_path, seed=1)
    seconds = [9.0, 0.5, 0.1, 0.3]
    rows = [{"attempt": 1, "step": i, "epoch": i, "time": 0} for i in range(len(seconds))]
    write_metrics(many, [row | {"train/seconds_per_step": s} for row, s in zip(rows, seconds, strict=True)])
    write_metrics(one, [{"attempt": 1, "step": 0, "epoch": 0, "time": 0, "train/seconds_per_step": 4.0}])
    assert derived(tmp_path)["seconds_per_step"].to_dict() == {many.name: 0.3, one.name: 4.0}


def test_infinite_losses_do_not_become_a_best_value(tmp_path):
    job = write_job(tmp_path)
    values = ("-inf", "inf", "nan", "0.5", "")
    write_metrics(job, [
        {"attempt": 1, "step": i, "epoch": i, "time": 0, "val/loss": v} for i, v in enumerate(values)
    ])  # fmt: skip
    assert derived(tmp_path)["best_val/loss"].tolist() == [0.5]


def test_without_a_history_the_best_value_is_the_result_s_own(tmp_path):
    job = write_job(tmp_path)
    (job / "metrics.csv").unlink()
    write_result(job, {"val/loss": 0.25, "val/accuracy": 0.75})
    row = derived(tmp_path).iloc[0]
    assert (row["best_val/loss"], row["best_val/accuracy"]) == (0.25, 0.75)
    assert np.isnan(row["steps_to_target"])
    assert np.isnan(row["seconds_per_step"])


def test_losses_errors_and_times_are_better_when_lower():
    assert all(
        map(lower_is_better, ("val/loss", "test/mse", "seconds_per_step", "best_val/nll", "test/top1_error"))
    )
    assert not any(map(lower_is_better, ("test/accuracy", "val/f1", "test/auroc", "test/closeness")))


def test_a_directory_without_jobs_says_what_was_seen_and_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"found nothing.*bnlight sweep"):
        read_runs(tmp_path / "absent")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match="found a file"):
        read_runs(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no sub-directory.*bnlight sweep"):
        read_runs(tmp_path / "empty")
    (tmp_path / "foreign" / "x").mkdir(parents=True)
    with pytest.raises(ValueError, match="1 sub-directories, none of them a job"):
        read_runs(tmp_path / "foreign")


def test_the_package_needs_neither_torch_nor_lightning_nor_hydra(tmp_path):
    write_sweep(tmp_path / "norms", norms=("batch", "renorm"), seeds=(0, 1))
    script = f"""
{WITHOUT.format(names=("torch", "lightning", "pytorch_lightning", "hydra", "omegaconf", "torchmetrics", "wandb"))}
import bnlight.compare
print(bnlight.compare.compare({str(tmp_path / "norms")!r}))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "renorm" in done.stdout
