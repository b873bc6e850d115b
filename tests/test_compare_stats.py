"""The statistics: recomputed by hand, from the raw files."""

import csv
import json
import math
import statistics
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy import stats
from test_compare_builder import scored, write_job, write_json, write_metrics, write_result, write_sweep

from bnlight.compare import compare, estimate
from bnlight.compare.stats import estimates

T_975 = {
    1: 12.7062047364,
    2: 4.3026527297,
    3: 3.1824463053,
    9: 2.2621571628,
}  # a printed table of Student's t


def by_contender(comparison):
    return {cell.contender: cell for cell in comparison.cells}


@pytest.mark.parametrize("values", [[0.5, 0.75], [0.9, 0.92, 0.97], [1.0, 2.0, 4.0, 8.0], list(range(10))])
def test_an_interval_is_t_times_s_over_the_root_of_n(values):
    n, got = len(values), estimate(values)
    assert got.n == n
    assert got.mean == pytest.approx(statistics.fmean(values), rel=1e-12)
    assert got.std == pytest.approx(statistics.stdev(values), rel=1e-12)
    assert got.half_width == pytest.approx(T_975[n - 1] * statistics.stdev(values) / math.sqrt(n), rel=1e-9)


def test_one_value_has_no_interval_and_none_has_nothing():
    one, none = estimate([0.5]), estimate([math.nan, math.inf])
    assert (one.n, one.mean, one.half_width, str(one)) == (1, 0.5, None, "0.5000")
    assert (none.n, none.half_width, str(none)) == (0, None, "-")
    assert math.isnan(one.std)


def test_median_and_worst_are_those_of_the_values():
    values = [0.3, 0.9, 0.5, 0.8]
    assert (estimate(values).median, estimate(values).worst) == (pytest.approx(0.65), 0.3)
    assert estimate(values, lower=True).worst == 0.9


def test_the_bootstrap_is_scipys_and_does_not_depend_on_the_company():
    rng = np.random.default_rng(1)
    samples = [rng.normal(size=size) for size in (5, 2, 5, 9, 5)]
    for sample, got in zip(samples, estimates(samples), strict=True):
        alone = stats.bootstrap(
            (sample,), np.mean, n_resamples=2000, method="percentile", random_state=np.random.default_rng(0)
        ).confidence_interval
        assert got.boot == pytest.approx((alone.low, alone.high), rel=1e-12)
        assert (got.n, got.mean, got.half_width) == (
            len(sample),
            estimate(sample).mean,
            estimate(sample).half_width,
        )


def test_one_value_has_no_bootstrap_and_equal_values_have_a_point():
    one, same = estimates([[0.5], [0.5, 0.5, 0.5]])
    assert one.boot is None
    assert same.boot == (0.5, 0.5)


def test_the_bootstrap_covers_the_mean_about_as_often_as_it_says():
    samples = np.random.default_rng(2).normal(size=(400, 20))
    inside = [low <= 0 <= high for low, high in (found.boot for found in estimates(list(samples)))]
    assert 0.89 <= np.mean(inside) <= 0.96  # of 20 normal values, the percentile interval holds about 93 %


def test_seeds_may_be_words_and_numbers(tmp_path):
    for seed in (10, 9, "a"):
        write_job(tmp_path, seed=seed)
    assert [cell.seeds for cell in compare(tmp_path).cells] == [[9, 10, "a"]]


def test_missing_values_are_left_out_of_the_mean_and_of_n():
    assert estimate([0.5, math.nan, 0.7]) == estimate([0.5, 0.7])


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([0.9712, 0.9712], "0.9712 ± 0.0000"),
        ([12.5, 12.5], "12.50 ± 0.00"),
        ([123456.0], "123456"),
        ([0.0000123], "0.0000123"),
    ],
)
def test_numbers_are_shown_with_four_digits(values, text):
    assert str(estimate(values)) == text


def test_the_table_agrees_with_the_raw_files(tmp_path):
    write_sweep(tmp_path / "norms", seeds=(0, 1, 2))
    comparison = compare(tmp_path / "norms", target=0.93)
    raw = {}
    for config in (tmp_path / "norms").glob("*/config.yaml"):
        with (config.parent / "metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        seconds = [float(r["train/seconds_per_step"]) for r in rows if r["train/seconds_per_step"]]
        raw.setdefault(yaml.safe_load(config.read_text())["job"]["choices"]["norm"], []).append({
            "test": json.loads((config.parent / "result.json").read_text())["metrics"]["test/accuracy"],
            "loss": min(float(r["val/loss"]) for r in rows if r["val/loss"]),
            "steps": [int(r["step"]) for r in rows if float(r["val/accuracy"] or 0) >= 0.93][:1],
            "seconds": statistics.median(seconds[1:]),
        })  # fmt: skip
    assert len(comparison.cells) == len(raw) == 6
    for cell in comparison.cells:
        runs = raw[cell.contender]
        tests = [run["test"] for run in runs]
        half = T_975[2] * statistics.stdev(tests) / math.sqrt(3)
        assert cell.metric.mean == pytest.approx(statistics.fmean(tests), rel=1e-12)
        assert cell.metric.half_width == pytest.approx(half, rel=1e-9)
        assert cell.best_loss.mean == pytest.approx(statistics.fmean(r["loss"] for r in runs), rel=1e-12)
        assert cell.seconds.mean == pytest.approx(statistics.fmean(r["seconds"] for r in runs), rel=1e-12)
        reached = [r["steps"][0] for r in runs if r["steps"]]
        assert cell.reached == len(reached)
        median = statistics.median([*reached, *[math.inf] * (3 - len(reached))])
        assert cell.steps == (median if math.isfinite(median) else None)
    means = [cell.metric.mean for cell in comparison.cells]
    assert means == sorted(means, reverse=True)
    table = comparison.table.set_index("norm")
    assert table["test/accuracy mean"].to_dict() == {c.contender: c.metric.mean for c in comparison.cells}


def test_runs_that_are_not_done_are_counted_but_in_no_mean(tmp_path):
    scored(tmp_path, "batch", [0.9, 0.92])
    scored(tmp_path, "renorm", [0.95, 0.95])
    for seed, state in enumerate(("diverged", "failed", "failed", "interrupted", "preempted"), start=2):
        job = write_job(tmp_path, norm="batch", seed=seed, state=state)
        write_result(job, {"test/accuracy": 0.1})
    batch = by_contender(compare(tmp_path))["batch"]
    assert (batch.metric.n, batch.metric.mean) == (2, pytest.approx(0.91))
    assert batch.states == {"diverged": 1, "failed": 2, "interrupted": 1, "preempted": 1}


def test_a_norm_without_any_finished_run_still_has_its_row(tmp_path):
    scored(tmp_path, "batch", [0.9, 0.92])
    write_job(tmp_path, norm="tanh", state="failed", traceback="boom")
    cells = compare(tmp_path).cells
    assert [cell.contender for cell in cells] == ["batch", "tanh"]
    assert (cells[1].metric.n, cells[1].states) == (0, {"failed": 1})


def test_steps_to_the_target_is_a_median_in_which_never_is_later_than_all(tmp_path):
    for seed, step in enumerate((10, 30, None)):
        rows = [
            {"attempt": 1, "step": step or 5, "epoch": 0, "time": 0, "val/accuracy": 0.95 if step else 0.5}
        ]
        write_metrics(write_job(tmp_path, norm="batch", seed=seed), rows)
        write_metrics(
            write_job(tmp_path, norm="none", seed=seed),
            rows if seed != 1 else [rows[0] | {"val/accuracy": 0}],
        )
    cells = by_contender(compare(tmp_path))
    assert (cells["batch"].steps, cells["batch"].reached) == (30, 2)
    assert (cells["none"].steps, cells["none"].reached) == (None, 1)


def test_a_diverged_run_counts_in_the_steps_to_the_target(tmp_path):
    for seed, accuracy in enumerate((0.95, 0.5, 0.5)):
        job = write_job(tmp_path, norm="batch", seed=seed, state="diverged" if seed else "done")
        write_metrics(job, [{"attempt": 1, "step": 10, "epoch": 0, "time": 0, "val/accuracy": accuracy}])
    write_job(tmp_path, norm="batch", seed=3, state="failed")
    comparison = compare(tmp_path)
    (cell,), (stability,) = comparison.cells, comparison.evidence.stability
    assert (cell.steps, cell.reached, cell.ended) == (None, 1, 3)
    assert (stability.steps, stability.reached, stability.ended) == (None, 1, 3)
    assert "- (1/3)" in str(comparison)
    assert "- (1/3)" in comparison.page.read_text()


def test_every_varying_key_but_the_seed_makes_its_own_row(tmp_path):
    for batch_size in (4, 32):
        write_sweep(tmp_path, ("batch", "group"), (0, 1), settings={"data.batch_size": batch_size})
    comparison = compare(tmp_path)
    assert comparison.axes.keys == ["data.batch_size", "norm"]
    assert [(c.settings["data.batch_size"], len(c.runs)) for c in comparison.cells] == [(4, 2)] * 2 + [
        (32, 2)
    ] * 2
    assert [finding.condition for finding in comparison.findings] == ["batch size = 4", "batch size = 32"]


def test_what_follows_from_the_norm_or_from_the_seed_is_no_key(tmp_path):
    for seed in (0, 1):
        for norm, options in (("group", {"num_groups": 8}), ("renorm", {"r_max": 3.0})):
            job = write_job(tmp_path, norm=norm, seed=seed, norm_options=options)
            config = yaml.safe_load((job / "config.yaml").read_text())
            config |= {"callbacks": {"schedule": options}, "title": f"run {seed}", "folder": job.name}
            config["data"]["split_seed"] = seed
            (job / "config.yaml").write_text(yaml.safe_dump(config))
    comparison = compare(tmp_path)
    assert comparison.axes.keys == ["norm"]
    assert [len(cell.runs) for cell in comparison.cells] == [2, 2]


def test_an_option_of_the_norm_that_varies_within_a_norm_is_a_key(tmp_path):
    scored(tmp_path, "batch", [0.9, 0.9])
    for groups in (1, 4):
        scored(tmp_path, "group", [0.8, 0.8], settings={"norm.num_groups": groups})
    assert compare(tmp_path).axes.keys == ["norm", "norm.num_groups"]


def test_a_key_that_another_key_determines_is_shown_once(tmp_path):
    for rate in (0.1, 0.2):
        for job in write_sweep(tmp_path, ("batch",), (0, 1), settings={"optimizer.lr": rate}):
            config = yaml.safe_load((job / "config.yaml").read_text())
            config["scheduler"] = {"max_lr": rate}
            (job / "config.yaml").write_text(yaml.safe_dump(config))
    assert compare(tmp_path).axes.keys == ["optimizer.lr"]


def test_sync_and_weight_are_contenders_beside_the_norm(tmp_path):
    scored(tmp_path, "batch", [0.9, 0.9], choices={"sync": "none"})
    scored(tmp_path, "batch", [0.9, 0.9], choices={"sync": "world"})
    scored(tmp_path, "group", [0.9, 0.9], choices={"weight": "weight_standardization"})
    names = {cell.contender for cell in compare(tmp_path).cells}
    assert names == {"batch", "batch + sync=world", "group + weight=weight_standardization"}


def test_a_custom_norm_is_called_after_its_class(tmp_path):
    for name in ("mine.Cosine", "mine.Sine"):
        options = {"_target_": name}
        write_job(tmp_path, norm="custom", norm_options=options, settings={"norm._target_": name})
    assert {cell.contender for cell in compare(tmp_path).cells} == {"Cosine", "Sine"}


def test_one_learning_rate_for_all_norms_is_pointed_out(tmp_path):
    write_sweep(tmp_path, ("batch", "layer"), (0, 1))
    assert any("share one learning rate (0.1)" in c for c in compare(tmp_path).caveats)


def test_what_paired_tests_cannot_tell_apart_is_not_a_win(tmp_path):
    scored(tmp_path, "batch", [0.90, 0.94, 0.92])
    scored(tmp_path, "renorm", [0.93, 0.93, 0.93])
    scored(tmp_path, "none", [0.50, 0.50, 0.51])
    comparison = compare(tmp_path)
    pairs = {frozenset((pair.better, pair.worse)): pair for pair in comparison.evidence.pairs}
    test = stats.ttest_rel([0.93, 0.93, 0.93], [0.90, 0.94, 0.92])
    low, high = test.confidence_interval(0.95)
    # Holm over the three pairs: this p is the largest, so it stays as it is.
    assert pairs[frozenset(("renorm", "batch"))].p_holm == pytest.approx(test.pvalue)
    more = pairs[frozenset(("renorm", "batch"))].more_seeds
    assert comparison.verdict == (
        "With these 3 seeds, renorm has the highest mean test accuracy, 0.9300 ± 0.0000, but cannot be told apart from "
        f"batch (difference 0.0100, 95 % interval {low:.4f} to {high:.4f}, p = {test.pvalue:.2g} after Holm; about "
        f"{more} more seeds would be needed). It is better than none. All at shared settings."
    )
    assert not comparison.findings[0].clear


def test_a_paired_difference_is_a_clear_lead(tmp_path):
    batch, renorm = [0.900, 0.901, 0.903], [0.950, 0.952, 0.951]
    scored(tmp_path, "batch", batch)
    scored(tmp_path, "renorm", renorm)
    comparison = compare(tmp_path)
    test = stats.ttest_rel(renorm, batch)
    low, high = test.confidence_interval(0.95)
    assert comparison.findings[0].clear
    assert comparison.verdict == (
        "With these 3 seeds, renorm is better than batch: test accuracy 0.9510 ± 0.0025 (difference 0.0497, 95 % "
        f"interval {low:.4f} to {high:.4f}, p = {test.pvalue:.2g} after Holm). All at shared settings."
    )


def test_of_several_that_are_beaten_the_nearest_is_told_with_its_numbers(tmp_path):
    for norm, base in (("batch", 0.9), ("group", 0.8), ("layer", 0.6)):
        scored(tmp_path, norm, [base + step * base for step in (0.0, 0.004, 0.001, 0.002)])
    (finding,) = compare(tmp_path).findings
    assert (finding.clear, finding.rivals) == (True, 2)
    assert "batch is better than both others: test accuracy 0.9016 ± 0.0024" in finding.text
    assert "(the nearest, group: difference 0.1002, 95 % interval " in finding.text


def test_the_verdict_counts_the_settings_at_which_the_best_is_told_from_all(tmp_path):
    for size, group in ((4, [0.5, 0.51, 0.5]), (32, [0.89, 0.95, 0.85])):
        scored(tmp_path, "batch", [0.90, 0.92, 0.91], settings={"data.batch_size": size})
        scored(tmp_path, "group", group, settings={"data.batch_size": size})
    assert compare(tmp_path).verdict.startswith(
        "batch has the highest mean test accuracy at both settings of batch size; these seeds tell the best from all "
        "others at 1 of the 2 settings."
    )


def test_overlapping_means_with_a_steady_difference_are_told_apart(tmp_path):
    batch = [0.90, 0.92, 0.94, 0.96, 0.98]
    scored(tmp_path, "batch", batch)
    scored(tmp_path, "renorm", [value + 0.01 + 0.0001 * seed for seed, value in enumerate(batch)])
    comparison = compare(tmp_path)
    renorm, other = comparison.cells
    assert renorm.metric.low < other.metric.high
    assert comparison.findings[0].clear


def test_a_contender_that_lost_runs_says_so_in_the_verdict(tmp_path):
    scored(tmp_path, "batch", [0.900, 0.901, 0.903])
    scored(tmp_path, "renorm", [0.950, 0.952, 0.951])
    write_job(tmp_path, norm="renorm", seed=3, state="diverged")
    write_job(tmp_path, norm="tanh", seed=0, state="failed")
    verdict = compare(tmp_path).verdict
    assert "renorm (1 diverged) is better than batch" in verdict
    assert "tanh (1 failed) has no result." in verdict


def test_who_leads_by_seeds_of_its_own_and_loses_on_the_common_ones_is_called_worse(tmp_path):
    scored(tmp_path, "batch", [0.90, 0.91, 0.92, 0.99, 0.99, 0.99])
    scored(tmp_path, "group", [0.92, 0.931, 0.94])
    scored(tmp_path, "layer", [0.70, 0.71, 0.75])
    scored(tmp_path, "rms", [0.89, 0.93, 0.90])
    (finding,) = compare(tmp_path).findings
    assert (finding.best, finding.clear) == ("batch", False)
    assert finding.text.startswith(
        "With these seeds, batch has the highest mean test accuracy, 0.9500 ± 0.0465, but is worse than group (group "
        "ahead on the common seeds: difference 0.0203, 95 % interval 0.0189 to 0.0218, p = "
    )
    assert " after Holm) and cannot be told apart from rms (difference 0.0033, 95 % interval " in finding.text
    assert finding.text.endswith(" It is better than layer.")


def test_one_seed_is_said_to_prove_nothing(tmp_path):
    scored(tmp_path, "batch", [0.9])
    scored(tmp_path, "renorm", [0.99])
    comparison = compare(tmp_path)
    assert "0.9900 (n = 1 seed), but one seed gives no interval" in comparison.verdict
    assert not comparison.findings[0].clear
    assert not any("Student" in c for c in comparison.caveats)


def test_a_rival_with_one_seed_cannot_be_beaten_clearly(tmp_path):
    scored(tmp_path, "renorm", [0.950, 0.951, 0.952])
    scored(tmp_path, "batch", [0.5])
    assert "cannot be told apart from batch (only 1 seed in common)" in compare(tmp_path).verdict


def test_lower_is_better_for_a_loss(tmp_path):
    scored(tmp_path, "batch", [0.900, 0.901, 0.902])
    scored(tmp_path, "renorm", [0.950, 0.951, 0.952])
    comparison = compare(tmp_path, metric="test/loss")
    assert "renorm has the lowest mean test loss, 0.0490" in comparison.verdict
    assert [cell.metric.worst for cell in comparison.cells] == pytest.approx([0.05, 0.1])


def test_the_verdict_over_batch_sizes_names_the_winner_of_each(tmp_path):
    for batch_size, batch, group in ((2, 0.5, 0.9), (8, 0.7, 0.9), (32, 0.95, 0.9)):
        for norm, mean in (("batch", batch), ("group", group)):
            values = [mean, mean + 0.001, mean + (0.002 if norm == "batch" else 0.003)]
            scored(tmp_path, norm, values, settings={"data.batch_size": batch_size})
    comparison = compare(tmp_path)
    assert comparison.verdict == (
        "No single winner over batch size: group has the highest mean test accuracy at 2 and 8, batch at 32; "
        "these seeds tell the best from all others everywhere. All at shared settings."
    )


def test_settings_of_several_keys_are_counted_in_the_verdict(tmp_path):
    for size, dropout, best in ((4, 0.0, "batch"), (4, 0.5, "batch"), (32, 0.0, "group"), (32, 0.5, "batch")):
        for norm in ("batch", "group"):
            settings = {"data.batch_size": size, "model.dropout": dropout}
            scored(tmp_path, norm, [0.9 if norm == best else 0.8] * 2, settings=settings)
    assert compare(tmp_path).verdict.startswith(
        "No single winner over dropout and batch size: batch has the highest mean test accuracy at 3 settings, group "
        "at 1 setting; "
    )


def test_a_contender_alone_under_every_condition_wins_nothing(tmp_path):
    for size in (4, 32):
        scored(tmp_path, "batch", [0.9, 0.91], settings={"data.batch_size": size})
        write_job(tmp_path, norm="group", state="running", settings={"data.batch_size": size})
    write_job(tmp_path, norm="batch", state="running", settings={"data.batch_size": 64})
    assert compare(tmp_path).verdict == (
        "batch stands alone at both settings of batch size: there is nothing to compare it with. 1 other has no result "
        "yet. All at shared settings."
    )


def test_what_never_finished_anywhere_is_said_plainly(tmp_path):
    write_job(tmp_path, norm="batch", state="failed", traceback="boom")
    write_job(tmp_path, norm="renorm", state="running")
    assert compare(tmp_path).verdict == "No run has finished with a test accuracy yet."


def test_without_a_test_accuracy_the_runs_are_ranked_by_what_they_have(tmp_path):
    for norm, value in (("batch", 3.0), ("renorm", 2.0)):
        job = write_job(tmp_path, norm=norm, result={"test/mse": value})
        (job / "metrics.csv").unlink()
    comparison = compare(tmp_path)
    assert comparison.metric == "test/mse"
    assert [cell.contender for cell in comparison.cells] == ["renorm", "batch"]


def test_a_score_of_the_test_goes_before_a_validation_accuracy_and_a_loss_of_the_test_after_it(tmp_path):
    for name, result in (("score", {"test/f1": 0.5, "test/loss": 1.0}), ("loss", {"test/loss": 1.0})):
        write_job(tmp_path / name, result=result)
    assert compare(tmp_path / "score").metric == "test/f1"
    assert compare(tmp_path / "loss").metric == "best_val/accuracy"


def test_an_unknown_metric_is_an_error_that_lists_the_known_ones(tmp_path):
    write_job(tmp_path)
    with pytest.raises(ValueError, match=r"test/f1.*there are: .*test/accuracy"):
        compare(tmp_path, metric="test/f1")


def test_different_seeds_hardware_and_versions_are_pointed_out(tmp_path):
    scored(tmp_path, "batch", [0.9, 0.9])
    scored(tmp_path, "renorm", [0.9, 0.9, 0.9])
    assert not any("hardware" in c for c in compare(tmp_path).caveats)
    first = sorted(Path(tmp_path).glob("batch*"))[0]
    result = json.loads((first / "result.json").read_text())
    write_json(first / "result.json", result | {"hardware": {"gpu": "H200"}, "versions": {"torch": "2.6"}})
    text = " ".join(compare(tmp_path).caveats)
    assert "same seeds: most on 0, 1; renorm on 0, 1, 2." in text
    assert "2 kinds of hardware" in text
    assert "2 sets of software versions" in text
