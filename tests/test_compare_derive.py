"""The derived columns: recomputed row by row from the files that the jobs wrote."""

import csv
import itertools
import json
import math
import statistics
import time

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_compare_builder import write_job, write_json, write_metrics, write_sweep

from bnlight.compare import compare, read_runs
from bnlight.compare.derive import derive, roughness, training_seconds


def derived(root, target=0.9):
    read = read_runs(root)
    return derive(read.runs, read.history, read.configs, target)


def row(step, **values):
    return {
        "attempt": 1,
        "step": step,
        "epoch": 0,
        "time": 1e9,
        **{k.replace("__", "/"): v for k, v in values.items()},
    }


def one(root, rows, settings=None, target=0.9):
    """The derived row of one job with these rows of metrics."""
    write_metrics(write_job(root, settings=settings), rows)
    return derived(root, target).iloc[0]


def log_of(losses):
    return pd.DataFrame({"directory": "a", "step": range(len(losses)), "train/loss": losses})


def test_every_column_agrees_with_the_raw_files(tmp_path):
    write_sweep(tmp_path, ("batch", "renorm"), (0, 1))
    runs = derived(tmp_path, target=0.93)
    for key, run in runs.iterrows():
        with (tmp_path / run["job"] / "metrics.csv").open() as file:
            rows = [{k: float(v) for k, v in line.items() if v} for line in csv.DictReader(file)]
        losses = [r["train/loss"] for r in rows if "train/loss" in r]
        steps = {r["step"]: r["train/seconds_per_step"] for r in rows if "train/seconds_per_step" in r}
        val = [r for r in rows if "val/loss" in r]
        reached = next(r["step"] for r in val if r["val/accuracy"] >= 0.93)
        logged = sorted(steps)
        lengths = [b - a for a, b in zip([0, *logged], logged, strict=False)]
        clock = sum(steps[s] * n for s, n in zip(logged, lengths, strict=True) if s <= reached)
        assert run["steps_to_target"] == reached, key
        assert run["seconds_to_target"] == pytest.approx(clock)
        assert run["train_eval_gap"] == pytest.approx(val[-1]["val/loss"] - statistics.fmean(losses[-2:]))
        increments = [math.log(b / a) for a, b in itertools.pairwise(losses)]
        assert run["roughness"] == pytest.approx(statistics.stdev(increments))
        per_step = statistics.median(list(steps.values())[1:])
        assert run["samples_per_second"] == pytest.approx(32 / per_step)


def test_a_pause_between_attempts_is_not_training_time(tmp_path):
    rows = [
        row(10, train__seconds_per_step=0.5, time=100), row(10, val__accuracy=0.5, time=101),
        row(20, train__seconds_per_step=0.5, time=106),
        row(20, train__seconds_per_step=1.0, attempt=2, time=90_000),
        row(30, train__seconds_per_step=0.25, val__accuracy=0.95, attempt=2, time=90_003),
    ]  # fmt: skip
    run = one(tmp_path, rows)
    assert run["steps_to_target"] == 30
    assert run["seconds_to_target"] == pytest.approx(10 * 0.5 + 10 * 1.0 + 10 * 0.25)


def test_without_a_timer_a_step_takes_the_median_of_the_clock(tmp_path):
    times = [0, 5, 10, 90_000, 90_005]
    rows = [row(10 * (i + 1), time=1e9 + t, train__loss=1.0) for i, t in enumerate(times)]
    rows.append(row(50, val__accuracy=0.95, time=1e9 + times[-1]))
    assert one(tmp_path, rows)["seconds_to_target"] == pytest.approx(50 * 0.5)


def test_a_step_of_several_batches_takes_as_many_times_as_long(tmp_path):
    rows = [row(10, train__seconds_per_step=0.5, val__accuracy=0.95)]
    settings = {"trainer.accumulate_grad_batches": 4, "data.batch_size": 8}
    write_metrics(write_job(tmp_path, settings=settings), rows)
    run = compare(tmp_path).runs.iloc[0]
    assert run["seconds_to_target"] == 20.0
    assert run["samples_per_second"] == 16.0


def test_a_target_in_the_middle_of_an_epoch_takes_the_share_of_it(tmp_path):
    rows = [
        row(10, train__seconds_per_step=1.0),
        row(14, val__accuracy=0.95),
        row(20, train__seconds_per_step=0.5),
    ]
    assert one(tmp_path, rows)["seconds_to_target"] == pytest.approx(10 + 4 * 0.5)
    assert one(tmp_path / "cut", rows[:2])["seconds_to_target"] == pytest.approx(14)


def test_what_was_not_reached_or_not_logged_is_missing(tmp_path):
    run = one(tmp_path, [row(10, val__accuracy=0.5)])
    names = [
        "steps_to_target",
        "seconds_to_target",
        "seconds_per_step",
        "samples_per_second",
        "train_eval_gap",
    ]
    assert run[[*names, "norm_gap", "roughness", "peak_memory"]].isna().all()
    write_job(tmp_path / "empty", state="failed").joinpath("metrics.csv").unlink()
    assert derived(tmp_path / "empty")[names].isna().all(axis=None)


def test_of_a_run_whose_history_is_lost_the_best_is_what_its_result_says(tmp_path):
    write_metrics(write_job(tmp_path, seed=0), [row(10, val__accuracy=0.5)])
    write_job(tmp_path, seed=1, result={"val/accuracy": 0.7}).joinpath("metrics.csv").unlink()
    assert sorted(derived(tmp_path)["best_val/accuracy"]) == [0.5, 0.7]


def test_the_gap_is_that_of_the_last_validation(tmp_path):
    rows = [
        row(5, train__loss=9.0), row(10, train__loss=3.0, val__loss=4.0),
        row(15, train__loss=1.0), row(20, train__loss=0.5, val__loss=2.0, norm__max_train_eval_gap=0.75),
        row(25, train__loss=0.1, norm__max_train_eval_gap=0.25),
    ]  # fmt: skip
    run = one(tmp_path, rows)
    assert run["train_eval_gap"] == pytest.approx(2.0 - 0.75)
    assert run["norm_gap"] == 0.25


def test_all_processes_of_a_job_count_in_its_throughput_and_memory_is_in_bytes(tmp_path):
    job = write_job(tmp_path, settings={"data.batch_size": 8})
    write_metrics(job, [row(10, train__seconds_per_step=0.5)])
    result = json.loads((job / "result.json").read_text())
    write_json(job / "result.json", result | {"world_size": 4, "peak_memory": 123_456_789})
    run = derived(tmp_path).iloc[0]
    assert run["samples_per_second"] == 64.0
    assert run["peak_memory"] == 123_456_789


@settings(deadline=None)
@given(st.floats(0.1, 10), st.floats(0.5, 1.0), st.integers(4, 40))
def test_an_exponential_decay_is_not_rough_whatever_its_scale_and_rate(scale, rate, n):
    losses = scale * rate ** np.arange(n)
    assert roughness(log_of(losses))["a"] == pytest.approx(0, abs=1e-9)


@settings(deadline=None)
@given(st.lists(st.floats(0.01, 10), min_size=4, max_size=20), st.floats(0.01, 100))
def test_roughness_does_not_depend_on_the_scale_of_the_loss(losses, scale):
    base, scaled = (roughness(log_of(np.array(losses) * factor))["a"] for factor in (1.0, scale))
    assert scaled == pytest.approx(base, abs=1e-9)


def test_a_jagged_loss_and_a_spike_are_rougher_than_a_smooth_loss():
    smooth = np.linspace(2.0, 1.0, 30)
    spike = np.where(np.arange(30) == 15, 5.0, smooth)
    jagged = smooth * np.where(np.arange(30) % 2, 1.1, 1 / 1.1)
    values = [roughness(log_of(losses))["a"] for losses in (smooth, jagged, spike)]
    assert values == sorted(values)
    assert values[1] == pytest.approx(2 * math.log(1.1), rel=0.05)


def test_losses_that_are_not_positive_are_left_out_of_the_roughness():
    assert roughness(log_of([1.0, 0.0, 0.5, -1.0, 0.25, 0.125]))["a"] == pytest.approx(0)


def test_the_clock_never_runs_backwards():
    history = log_of([1.0] * 6).assign(time=np.nan)
    history["train/seconds_per_step"] = [np.nan, 0.5, np.nan, np.nan, 0.1, np.nan]
    assert training_seconds(history).tolist() == pytest.approx([0.0, 0.5, 0.6, 0.7, 0.8, 0.9])


def test_a_thousand_runs_of_two_hundred_rows_take_a_fraction_of_a_second():
    jobs, rows = 1000, 200
    keys = [f"norm-cnn-digits-s{index}" for index in range(jobs)]
    step = np.tile(np.arange(1, rows + 1) * 10, jobs)
    history = pd.DataFrame(
        {"directory": np.repeat(keys, rows), "step": step, "epoch": step // 100, "time": step * 0.1}
    )
    rng = np.random.default_rng(0)
    for name in (
        "train/loss",
        "train/accuracy",
        "val/loss",
        "val/accuracy",
        *(f"norm/{i}/scale" for i in range(20)),
    ):
        history[name] = rng.random(jobs * rows)
    history["train/seconds_per_step"] = np.where(step % 100 == 0, 0.01, np.nan)
    runs = pd.DataFrame({"batch_size": 32.0, "world_size": 1.0}, index=keys)
    begun = time.process_time()
    result = derive(runs, history, pd.DataFrame(), 0.99)
    assert time.process_time() - begun < 1.0  # 0.1 s where nothing else runs
    assert result["seconds_to_target"].notna().sum() == result["steps_to_target"].notna().sum() > 500
