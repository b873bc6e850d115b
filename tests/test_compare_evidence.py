"""Ranks, stability and fronts: against a published example, by hand, and on job directories."""

import json
import math
import shutil
import statistics
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import friedmanchisquare
from test_compare_builder import scored, write_job, write_json, write_metrics, write_result, write_sweep

from bnlight.compare import compare
from bnlight.compare.evidence.pareto import undominated
from bnlight.compare.evidence.ranking import rank

# Demšar (2006), table 6: ranks of four variants of C4.5 by AUC on 14 data sets.
DEMSAR = {
    "C4.5": [4, 1, 4, 4, 4, 1, 3, 2.5, 4, 2.5, 4, 3, 4, 3],
    "C4.5+m": [3, 2, 1, 1, 2, 2.5, 2, 2.5, 3, 2.5, 2.5, 2, 1, 1],
    "C4.5+cf": [2, 3, 2, 3, 3, 4, 4, 4, 2, 2.5, 1, 4, 2, 4],
    "C4.5+m+cf": [1, 4, 3, 2, 1, 2.5, 1, 1, 1, 2.5, 2.5, 1, 3, 2],
}
# Demšar (2006), table 5 (a): critical values of the two-tailed Nemenyi test at 0.05.
NEMENYI = {3: 2.343, 4: 2.569, 5: 2.728, 6: 2.850, 7: 2.949, 8: 3.031, 9: 3.102, 10: 3.164}


def test_the_ranking_is_that_of_the_published_example():
    table = pd.DataFrame(DEMSAR)
    got = rank(table)
    assert got.contenders == ["C4.5+m+cf", "C4.5+m", "C4.5+cf", "C4.5"]
    assert [round(value, 3) for value in got.mean_ranks] == [1.964, 2.0, 2.893, 3.143]
    assert (got.blocks, round(got.critical_difference, 2)) == (14, 1.25)
    assert got.p == pytest.approx(friedmanchisquare(*table.to_numpy().T).pvalue)
    assert 0.01 < got.p < 0.05
    assert got.groups == [tuple(got.contenders)]  # the paper: not powerful enough to tell any of them apart


@pytest.mark.parametrize(("k", "q"), NEMENYI.items())
def test_the_critical_difference_has_the_published_critical_values(k, q):
    blocks = pd.DataFrame(np.tile(np.arange(k), (20, 1)), columns=[f"n{i}" for i in range(k)])
    critical = rank(blocks).critical_difference
    assert critical / math.sqrt(k * (k + 1) / (6 * 20)) == pytest.approx(q, abs=1e-3)


@settings(deadline=None)
@given(st.integers(3, 8), st.integers(2, 40), st.integers(0, 2**32 - 1), st.floats(0, 3))
def test_groups_are_maximal_and_hold_every_pair_that_is_not_separated(k, n, seed, spread):
    values = np.random.default_rng(seed).normal(size=(n, k)) + spread * np.arange(k)
    got = rank(pd.DataFrame(values, columns=[f"n{i}" for i in range(k)]))
    assert sum(got.mean_ranks) == pytest.approx(k * (k + 1) / 2)
    assert got.mean_ranks == sorted(got.mean_ranks)
    ranks = dict(zip(got.contenders, got.mean_ranks, strict=True))
    for first in got.contenders:
        for second in got.contenders:
            together = any({first, second} <= set(group) for group in got.groups)
            close = abs(ranks[first] - ranks[second]) < got.critical_difference
            assert first == second or together == (close or got.p > 0.05)
    assert not any(set(a) < set(b) for a in got.groups for b in got.groups)


def test_what_friedman_does_not_separate_is_one_group_however_far_apart():
    ranks = [
        [4, 2, 1, 0, 5, 3],
        [5, 1, 4, 0, 3, 2],
        [3, 4, 1, 0, 5, 2],
        [1, 4, 0, 3, 5, 2],
        [2, 0, 3, 1, 4, 5],
    ]
    got = rank(pd.DataFrame(ranks, columns=list("abcdef")))
    assert got.mean_ranks[-1] - got.mean_ranks[0] > got.critical_difference
    assert got.p == pytest.approx(friedmanchisquare(*np.transpose(ranks)).pvalue)
    assert got.groups == [tuple(got.contenders)]


def test_blocks_are_the_seeds_of_each_condition_that_all_contenders_share(tmp_path):
    for batch_size in (4, 32):
        place = {"data.batch_size": batch_size}
        scored(tmp_path, "batch", [0.90, 0.91, 0.92], settings=place)
        scored(tmp_path, "group", [0.93, 0.91, 0.94], settings=place)
        scored(tmp_path, "layer", [0.80, 0.81], settings=place)
    ranking = compare(tmp_path).evidence.ranking
    assert ranking.contenders == ["group", "batch", "layer"]
    assert ranking.mean_ranks == [1.25, 1.75, 3.0]  # one tie in each condition
    assert ranking.blocks == 4


def test_who_diverged_ranks_last_and_who_never_ran_is_named(tmp_path):
    for norm, results in {"batch": [0.9, 0.9], "group": [0.91, 0.91], "renorm": [0.95]}.items():
        scored(tmp_path, norm, results)
    write_job(tmp_path, norm="renorm", seed=1, state="diverged")
    for seed in (0, 1):
        write_job(tmp_path, norm="instance", seed=seed, state="diverged")
    for norm in ("batch", "group", "renorm", "instance"):  # no block: nobody finished
        write_job(tmp_path, norm=norm, seed=2, state="diverged")
    write_job(tmp_path, norm="tanh", state="failed")
    evidence = compare(tmp_path).evidence
    assert evidence.ranking.blocks == 2
    assert dict(zip(evidence.ranking.contenders, evidence.ranking.mean_ranks, strict=True)) == {
        "group": 1.5, "renorm": 2.25, "batch": 2.5, "instance": 3.75,
    }  # fmt: skip
    assert "The ranking leaves out tanh: no run finished or diverged." in evidence.notes


@pytest.mark.parametrize(
    ("norms", "seeds", "why"),
    [(("batch", "group"), (0, 1, 2), "at least 3 contenders that ran; there are 2"),
     (("batch", "group", "layer"), (0,), "at least 2 seeds or conditions that all contenders share; there is 1")],
)  # fmt: skip
def test_without_enough_to_rank_the_reason_is_given(tmp_path, norms, seeds, why):
    write_sweep(tmp_path, norms, seeds)
    evidence = compare(tmp_path).evidence
    assert evidence.ranking is None
    assert any(why in note for note in evidence.notes)


def test_the_notes_say_how_the_tests_were_made_and_that_few_seeds_are_few(tmp_path):
    write_sweep(tmp_path / "three", ("batch", "group"), (0, 1, 2))
    write_sweep(tmp_path / "five", ("batch", "group"), range(5))
    three, five = (compare(tmp_path / name).evidence.notes for name in ("three", "five"))
    assert any("Holm over all pairs of one condition" in note for note in three)
    assert any("fewer than 5 common seeds" in note for note in three)
    assert not any("fewer than 5 common seeds" in note for note in five)


def learning_rates(root, norm, results):
    for lr, accuracies in results.items():
        for seed, accuracy in enumerate(accuracies):
            state = "done" if accuracy is not None else "diverged"
            job = write_job(root, norm=norm, seed=seed, state=state, settings={"optimizer.lr": lr})
            rows = [
                {"attempt": 1, "step": 10 * (seed + 1), "epoch": 0, "time": 0, "train/seconds_per_step": 0.5}
            ]
            write_metrics(
                job, [rows[0] | {"val/accuracy": accuracy or 0.1, "val/loss": 0.5, "train/loss": 0.2}]
            )
            if accuracy is not None:
                write_result(job, {"test/accuracy": accuracy})


def test_the_largest_stable_rate_neither_diverges_nor_forgets_to_learn(tmp_path):
    learning_rates(tmp_path, "batch", {0.1: [0.9, 0.92], 0.4: [0.8, 0.5], 1.6: [0.1, 0.1]})
    learning_rates(tmp_path, "renorm", {0.1: [0.93, 0.95], 0.4: [0.94, 0.9], 1.6: [0.9, None]})
    learning_rates(tmp_path, "none", {0.1: [None, None], 0.4: [None, None], 1.6: [None, None]})
    batch, renorm, none = sorted(
        compare(tmp_path).evidence.stability, key=lambda s: ["batch", "renorm", "none"].index(s.contender)
    )
    assert (batch.largest_stable_lr, batch.largest_lr) == (0.4, 1.6)
    assert (renorm.largest_stable_lr, renorm.largest_lr) == (0.4, 1.6)
    assert none.largest_stable_lr is None
    assert (batch.runs, batch.diverged, batch.divergence_rate) == (6, 0, 0.0)
    assert (renorm.diverged, renorm.divergence_rate) == (1, pytest.approx(1 / 6))
    assert (none.diverged, none.divergence_rate, none.reached) == (6, 1.0, 0)


def test_time_to_the_target_counts_a_diverged_seed_as_never(tmp_path):
    learning_rates(tmp_path, "batch", {0.1: [0.95, 0.95, 0.95]})
    learning_rates(tmp_path, "renorm", {0.1: [0.95, None, 0.95, None]})
    stability = {s.contender: s for s in compare(tmp_path).evidence.stability}
    batch, renorm = stability["batch"], stability["renorm"]
    assert (batch.steps, batch.seconds, batch.reached, batch.ended) == (20, 10.0, 3, 3)
    assert (renorm.steps, renorm.seconds, renorm.reached, renorm.ended) == (None, None, 2, 4)


def test_of_a_loss_the_largest_stable_rate_keeps_it_within_twice_the_lowest(tmp_path):
    for rate, loss in ((0.1, 1.0), (0.4, 1.9), (1.6, 2.1)):
        write_job(tmp_path, settings={"optimizer.lr": rate}, result={"test/loss": loss})
    (stability,) = compare(tmp_path, metric="test/loss", by=["norm"]).evidence.stability
    assert (stability.largest_stable_lr, stability.largest_lr) == (0.4, 1.6)


def test_crashes_and_copies_are_no_divergence(tmp_path):
    scored(tmp_path, "batch", [0.9, 0.92])
    shutil.copytree(next(tmp_path.iterdir()), tmp_path / "a copy")
    write_job(tmp_path, norm="batch", seed=2, state="failed")
    (stability,) = compare(tmp_path).evidence.stability
    assert (stability.runs, stability.failed, stability.diverged, stability.divergence_rate) == (3, 1, 0, 0.0)


def test_roughness_is_over_all_settings_and_the_gap_at_the_chosen_one(tmp_path):
    for lr, quality in ((0.1, 0.97), (3.0, 0.5)):
        place = {"optimizer.lr": lr}
        write_sweep(tmp_path, ("batch", "group"), (0, 1, 2), settings=place, quality=quality)
    comparison = compare(tmp_path)
    for stability in comparison.evidence.stability:
        runs = comparison.runs[comparison.runs["norm"] == stability.contender]
        assert (stability.roughness.n, stability.gap.n, stability.norm_gap.n) == (6, 3, 0)
        assert stability.roughness.mean == pytest.approx(statistics.fmean(runs["roughness"]))
        assert stability.roughness.worst == runs["roughness"].max()
        assert stability.gap.mean == pytest.approx(
            statistics.fmean(runs["train_eval_gap"][runs["lr"] == 0.1])
        )


def test_the_norms_own_gap_is_on_the_page_where_it_was_measured(tmp_path):
    scored(tmp_path, "group", [0.9, 0.9])
    assert ">norm gap</th>" not in compare(tmp_path).page.read_text()
    row = {"attempt": 1, "step": 9, "epoch": 0, "time": 0, "val/accuracy": 0.9}
    for seed, gap in enumerate((0.5, 0.7)):
        write_metrics(write_job(tmp_path, seed=seed), [row | {"norm/max_train_eval_gap": gap}])
    page = compare(tmp_path).page.read_text().replace("\xa0", " ")
    assert ">norm gap</th>" in page
    assert ">0.600 ± 1.271</td>" in page


points = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=12)


@settings(deadline=None)
@given(points)
def test_a_point_is_on_the_front_if_and_only_if_no_other_dominates_it(drawn):
    loss, cost = (np.array(column, dtype=float) for column in zip(*drawn, strict=True))
    on_front = undominated(loss, cost)
    assert on_front.any()
    for (x, y), kept in zip(drawn, on_front, strict=True):
        dominated = any(a <= x and b <= y and (a, b) != (x, y) for a, b in drawn)
        assert kept == (not dominated)


def test_fronts_are_within_a_condition_for_each_cost_that_was_measured(tmp_path):
    costs = {"batch": (0.95, 10.0, 900), "group": (0.94, 20.0, 800), "layer": (0.90, 30.0, 950)}
    for batch_size in (4, 32):
        for norm, (accuracy, seconds, memory) in costs.items():
            job = write_job(tmp_path, norm=norm, settings={"data.batch_size": batch_size})
            accuracy -= batch_size / 1000
            write_result(job, {"test/accuracy": accuracy, "test/loss": accuracy}, seconds=seconds)
            result = json.loads((job / "result.json").read_text()) | (
                {"peak_memory": memory} if batch_size == 4 else {}
            )
            write_json(job / "result.json", result)
    fronts = {front.cost: front for front in compare(tmp_path).evidence.fronts}
    assert set(fronts) == {"seconds_per_step", "seconds", "peak_memory"}
    assert len(fronts["seconds_per_step"].points) == 6
    seconds, memory = fronts["seconds"].points, fronts["peak_memory"].points
    assert seconds[seconds["on_front"]]["contender"].tolist() == ["batch", "batch"]
    assert memory["condition"].unique().tolist() == ["batch size = 4"]
    assert memory[memory["on_front"]]["contender"].tolist() == ["batch", "group"]
    lower = {front.cost: front for front in compare(tmp_path, metric="test/loss").evidence.fronts}[
        "peak_memory"
    ]
    assert lower.quality == "test/loss"
    assert set(lower.points[lower.points["on_front"]]["contender"]) == {"group", "layer"}


def test_the_tests_are_imported_only_when_they_are_made():
    code = (
        "import sys, bnlight.compare; print([m for m in ('statsmodels', 'scipy.stats') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
