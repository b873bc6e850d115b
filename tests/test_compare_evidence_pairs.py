"""Paired tests over seeds: against scipy, statsmodels, brute force and simulation."""

import itertools
import math
import shutil
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ttest_1samp, ttest_rel
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower
from statsmodels.stats.weightstats import DescrStatsW
from test_compare_builder import scored, write_job, write_metrics, write_result

from bnlight.compare import compare
from bnlight.compare.evidence.pairs import corrected, holm, more_seeds, p_value, paired

FIVE = {"renorm": [0.95, 0.96, 0.97, 0.955, 0.965], "batch": [0.93, 0.951, 0.94, 0.95, 0.92]}


def pairs_of(root, **options):
    return compare(root, **options).evidence.pairs


def only_pair(root, **options):
    (pair,) = pairs_of(root, **options)
    return pair


def test_a_pair_has_the_paired_t_test_over_common_seeds(tmp_path):
    for norm, results in FIVE.items():
        scored(tmp_path, norm, results)
    pair = only_pair(tmp_path)
    differences = np.subtract(FIVE["renorm"], FIVE["batch"])
    assert (pair.better, pair.worse, pair.n, pair.leading) == ("renorm", "batch", 5, True)
    assert pair.difference == pytest.approx(statistics.fmean(differences), rel=1e-12)
    assert pair.p == pair.p_holm == pytest.approx(ttest_rel(FIVE["renorm"], FIVE["batch"]).pvalue, rel=1e-9)
    assert (pair.low, pair.high) == pytest.approx(DescrStatsW(differences).tconfint_mean(), rel=1e-9)
    assert pair.told_apart
    assert pair.more_seeds is None
    assert pair.text.startswith(
        "With 5 common seeds, renorm is better than batch (difference 0.0218, 95 % interval "
    )


def test_the_effect_is_hedges_g_of_the_differences():
    pair = paired("", "a", "b", np.array([1.0, 2.0, 3.0, 4.0, 5.0]))
    correction = math.gamma(2) / (math.sqrt(2) * math.gamma(1.5))  # 0.7979, near 1 - 3 / (4 * 4 - 1) = 0.8
    assert pair.effect == pytest.approx(correction * 3 / math.sqrt(2.5), rel=1e-12)


@settings(deadline=None)
@given(st.lists(st.floats(-1, 1), min_size=2, max_size=8))
def test_the_permutation_p_is_that_of_every_sign_flip(differences):
    sums = [abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
            for signs in itertools.product((1, -1), repeat=len(differences))]  # fmt: skip
    as_far = sum(total >= abs(sum(differences)) * (1 - 1e-12) - 1e-300 for total in sums)
    got = paired("", "a", "b", np.array(differences)).p_permutation
    assert (
        got == pytest.approx(as_far / len(sums)) or min(abs(t - abs(sum(differences))) for t in sums) < 1e-12
    )


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_is_statsmodels_holm_and_a_missing_p_is_no_test(values):
    expected = multipletests(values, method="holm")[1]
    assert holm(values) == pytest.approx(expected)
    assert holm([math.nan, *values])[1:] == pytest.approx(expected)
    assert (holm(values) >= values).all()


@settings(deadline=None)
@given(st.lists(st.lists(st.floats(-1, 1, width=32), min_size=0, max_size=6), min_size=1, max_size=6))
def test_a_pair_is_told_apart_by_its_corrected_p_or_asks_for_more_seeds(samples):
    for pair in corrected([paired("", "a", "b", np.array(sample)) for sample in samples]):
        assert pair.told_apart == (pair.p_holm <= 0.05)
        assert math.isnan(pair.p_holm) == (pair.n < 2)
        assert pair.p_holm >= pair.p or pair.n < 2
        assert pair.more_seeds is None or (1 <= pair.more_seeds <= 1000 and not pair.told_apart)


def test_each_condition_is_a_family_of_its_own(tmp_path):
    rng = np.random.default_rng(0)
    for batch_size in (4, 32):
        for norm in ("batch", "group", "layer"):
            results = [round(float(value), 6) for value in rng.normal(0.9, 0.01, 4)]
            scored(tmp_path, norm, results, settings={"data.batch_size": batch_size})
    pairs = pairs_of(tmp_path)
    assert [pair.condition for pair in pairs] == ["batch size = 4"] * 3 + ["batch size = 32"] * 3
    for family in (pairs[:3], pairs[3:]):
        assert [pair.p_holm for pair in family] == pytest.approx(holm([pair.p for pair in family]))
        assert [pair.leading for pair in family] == [True, True, False]


@pytest.mark.parametrize(("effect", "n", "alpha"), [(0.9, 4, 0.05), (0.6, 5, 0.05), (1.2, 3, 0.05 / 6)])
def test_with_so_many_more_seeds_the_power_is_about_what_was_claimed(effect, n, alpha):
    seeds = n + more_seeds([effect], [n], alpha)[0]
    assert seeds == math.ceil(TTestPower().solve_power(effect, power=0.8, alpha=alpha))
    draws = np.random.default_rng(1).normal(effect, 1.0, (20_000, seeds))
    found = float((ttest_1samp(draws, 0.0, axis=1).pvalue < alpha).mean())
    assert 0.79 < found < 0.86  # a whole seed more than needed, and three standard errors of 0.003


def test_more_seeds_are_counted_at_the_level_that_holm_asks_of_the_pairs_that_are_left():
    samples = ([1.0, 1.1, 0.9, 1.05], [1.0, 3.0, -0.5, 2.0], [2.0, 0.5, -1.0, 2.5])
    apart, *left = corrected([paired("", "a", "b", np.array(sample)) for sample in samples])
    assert (apart.told_apart, apart.more_seeds) == (True, None)
    for pair in left:
        needed = math.ceil(TTestPower().solve_power(pair.effect, power=0.8, alpha=0.05 / 2)) - 4
        assert (pair.told_apart, pair.more_seeds) == (False, needed)


def test_a_difference_near_zero_asks_for_no_number_of_seeds(tmp_path):
    scored(tmp_path, "batch", [0.9, 0.92, 0.91, 0.93])
    scored(tmp_path, "group", [0.9201, 0.9001, 0.9301, 0.9101])
    pair = only_pair(tmp_path)
    assert pair.more_seeds is None
    assert not pair.told_apart
    assert pair.text.endswith("so small a difference needs over 1000 more seeds.")
    assert more_seeds([1e-6, 50.0, 1e12, math.nan], [5, 5, 3, 2]) == [None, 1, 1, None]


def test_what_cannot_be_told_apart_says_how_many_seeds_it_needs(tmp_path):
    scored(tmp_path, "batch", [0.90, 0.92, 0.91, 0.93])
    scored(tmp_path, "group", [0.91, 0.94, 0.905, 0.945])
    pair = only_pair(tmp_path)
    needed = math.ceil(TTestPower().solve_power(pair.effect, power=0.8, alpha=0.05)) - 4
    assert pair.more_seeds == needed
    assert pair.text.startswith(
        "With 4 common seeds, group and batch cannot be told apart (difference 0.0100, 95 % interval -0.0072 to 0.0272"
    )
    assert pair.text.endswith(f"it needs about {needed} more seeds.")


def test_less_is_better_for_a_loss(tmp_path):
    for norm, results in FIVE.items():
        scored(tmp_path, norm, results)
    pair = only_pair(tmp_path, metric="test/loss")
    assert (pair.better, pair.worse) == ("renorm", "batch")
    assert pair.difference == pytest.approx(0.0218)


def test_who_is_better_is_told_by_the_common_seeds(tmp_path):
    scored(tmp_path, "batch", [0.90, 0.91, 0.99])  # the better mean, by a seed that the other has not run
    scored(tmp_path, "group", [0.92, 0.92])
    pair = only_pair(tmp_path)
    assert (pair.better, pair.worse, pair.n, pair.leading) == ("group", "batch", 2, True)
    assert pair.difference == pytest.approx(0.015)


def test_equal_results_are_exactly_equal_and_equal_differences_have_no_spread_to_test_by(tmp_path):
    scored(tmp_path, "batch", [0.5, 0.75, 0.625])
    scored(tmp_path, "group", [0.5, 0.75, 0.625])
    scored(tmp_path, "renorm", [0.625, 0.875, 0.75])
    pairs = {(pair.better, pair.worse): pair for pair in pairs_of(tmp_path)}
    same, apart = pairs["batch", "group"], pairs["renorm", "batch"]
    assert (same.difference, same.low, same.high, same.p, same.told_apart) == (0, 0, 0, 1, False)
    assert same.text == "batch and group are exactly equal on all 3 common seeds."
    assert (apart.difference, apart.low, apart.high) == (0.125, 0.125, 0.125)
    assert (apart.p, apart.p_permutation, apart.told_apart) == (0.25, 0.25, False)
    assert apart.text == (
        "With 3 common seeds, renorm and batch cannot be told apart (difference 0.1250, the same on every seed, p = "
        "0.75 after Holm): 3 seeds are too few to say how many more it needs."
    )


def test_eight_equal_differences_are_enough(tmp_path):
    scored(tmp_path, "batch", [seed / 16 for seed in range(8)])
    scored(tmp_path, "group", [seed / 16 + 0.25 for seed in range(8)])
    pair = only_pair(tmp_path)
    assert pair.p == 2 / 2**8
    assert pair.told_apart


@pytest.mark.parametrize("n", [10, 11])
def test_equal_differences_have_the_p_of_the_sign_flips_at_every_number_of_seeds(n):
    assert paired("", "a", "b", np.full(n, 0.25)).p == 2 / 2**n
    assert paired("", "a", "b", np.zeros(n)).p == 1


def test_one_common_seed_says_nothing_of_the_spread_and_none_nothing_at_all(tmp_path):
    scored(tmp_path, "batch", [0.9, 0.92])
    scored(tmp_path, "group", [0.95])
    result = {"test/accuracy": 0.8}
    write_job(tmp_path, norm="layer", seed=7, result=result)
    pairs = {frozenset((pair.better, pair.worse)): pair for pair in pairs_of(tmp_path)}
    one, none = pairs[frozenset(("batch", "group"))], pairs[frozenset(("batch", "layer"))]
    assert (one.n, one.difference) == (1, pytest.approx(0.05))
    assert all(map(math.isnan, (one.low, one.high, one.p, one.p_holm, one.effect)))
    assert "one seed in common (group better by 0.0500)" in one.text
    assert (none.n, none.told_apart, none.more_seeds) == (0, False, None)
    assert math.isnan(none.difference)
    assert "no finished seed in common" in none.text


def test_of_two_that_are_equal_on_one_common_seed_none_is_called_better(tmp_path):
    scored(tmp_path, "batch", [0.9])
    scored(tmp_path, "group", [0.9])
    assert "one seed in common (equal there)" in only_pair(tmp_path).text


def test_two_seeds_have_an_interval_but_no_effect(tmp_path):
    scored(tmp_path, "batch", [0.9, 0.92])
    scored(tmp_path, "group", [0.91, 0.95])
    pair = only_pair(tmp_path)
    assert pair.low < 0 < pair.high
    assert math.isnan(pair.effect)
    assert pair.text.endswith("2 seeds are too few to say how many more it needs.")


def test_runs_that_a_contender_lost_are_named(tmp_path):
    scored(tmp_path, "batch", [0.9, 0.92, 0.91, 0.93, 0.9])
    scored(tmp_path, "renorm", [0.94, 0.96, 0.93])
    shutil.copytree(next(tmp_path.glob("renorm*")), tmp_path / "a copy")
    for seed, state in ((3, "diverged"), (4, "failed")):
        write_job(tmp_path, norm="renorm", seed=seed, state=state)
    pair = only_pair(tmp_path)
    assert pair.n == 3
    assert pair.text.endswith(" renorm lost 2 of 5 runs (1 diverged, 1 failed): no number here shows that.")


def test_a_result_that_is_no_number_is_in_no_pair(tmp_path):
    scored(tmp_path, "batch", [0.9, 0.92, 0.91])
    scored(tmp_path, "group", [0.95, 0.97])
    write_result(write_job(tmp_path, norm="group", seed=2), {"test/accuracy": None})
    assert only_pair(tmp_path).n == 2


def test_another_split_of_the_data_is_another_repeat(tmp_path):
    for norm, gain in (("batch", 0.0), ("group", 0.01)):
        for split in (0, 1):
            for seed in (0, 1):
                result = {"test/accuracy": 0.9 + 0.02 * split + 0.003 * seed + gain * (1 + seed)}
                split_seed = {"data.split_seed": split}
                job = write_job(tmp_path, norm=norm, seed=seed, settings=split_seed, result=result)
                write_metrics(job, [{"attempt": 1, "step": 9, "epoch": 0, "time": 0, "val/accuracy": 0.9}])
    assert only_pair(tmp_path).n == 4


def test_what_is_averaged_over_is_paired_before_it_is_averaged(tmp_path):
    for batch_size, results in ((4, [0.5, 0.51, 0.52]), (32, [0.9, 0.91, 0.93])):
        settings = {"data.batch_size": batch_size}
        scored(tmp_path, "batch", results, settings=settings)
        scored(
            tmp_path,
            "group",
            [result + 0.01 for result in results[: 3 if batch_size == 32 else 2]],
            settings=settings,
        )
    pair = only_pair(tmp_path, by=["norm"])
    assert (pair.better, pair.n) == ("group", 3)
    assert pair.difference == pytest.approx(0.01)


def test_runs_without_a_seed_and_sweeps_without_a_result_have_pairs_of_no_seed(tmp_path):
    for norm in ("batch", "group"):
        for repeat in (0, 1):
            result = {"test/accuracy": 0.9 + repeat / 100}
            write_job(tmp_path / "unseeded", norm=norm, seed=None, settings={"title": repeat}, result=result)
        write_job(tmp_path / "failed", norm=norm, state="failed")
    for name in ("unseeded", "failed"):
        for pair in pairs_of(tmp_path / name):
            assert pair.n == 0
            assert "no finished seed in common" in pair.text


def test_a_small_p_is_not_shown_as_zero():
    assert p_value(1e-9) == "p < 0.0001"
    assert p_value(0.0444) == "p = 0.044"
