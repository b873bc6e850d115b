"""Two sweeps against each other: the same contender under the same condition, over common seeds."""

import numpy as np
import pytest
from scipy import stats
from test_compare_builder import scored, write_job

from bnlight.compare import compare

OLD = {"batch": [0.80, 0.81, 0.83, 0.80, 0.82], "group": [0.70, 0.72, 0.71, 0.74, 0.70]}
NEW = {"batch": [0.86, 0.88, 0.88, 0.87, 0.88], "group": [0.71, 0.70, 0.73, 0.72, 0.71]}


def write(root, results, **settings):
    for norm, values in results.items():
        scored(
            root, norm, values, settings={key.replace("__", "."): value for key, value in settings.items()}
        )
    return root


def holm(p):
    """Holm's step-down correction, written out."""
    order = np.argsort(p)
    raised = [min(1.0, (len(p) - rank) * p[index]) for rank, index in enumerate(order)]
    result = np.empty(len(p))
    result[order] = np.maximum.accumulate(raised)
    return result


def test_differences_are_paired_tested_and_corrected(tmp_path):
    new, old = write(tmp_path / "new", NEW), write(tmp_path / "old", OLD)
    comparison = compare(new, against=old)
    against = comparison.against
    tests = {norm: stats.ttest_rel(NEW[norm], OLD[norm]) for norm in NEW}
    corrected = dict(zip(tests, holm([test.pvalue for test in tests.values()]), strict=True))
    assert {one.contender for one in against.differences} == {"batch", "group"}
    for one in against.differences:
        norm, interval = one.contender, tests[one.contender].confidence_interval(0.95)
        assert one.n == 5
        assert one.difference == pytest.approx(np.mean(NEW[norm]) - np.mean(OLD[norm]))
        assert (one.low, one.high) == pytest.approx((interval.low, interval.high))
        assert (one.p, one.p_holm) == pytest.approx((tests[norm].pvalue, corrected[norm]))
        assert one.told_apart == (corrected[norm] <= 0.05)
    batch, group = against.differences
    assert (batch.better, batch.told_apart, group.told_apart) == (True, True, False)
    assert batch.text == (
        f"batch: better here, {batch.here} here, {batch.there} there (5 common seeds: difference 0.0620, 95 % interval "
        f"{batch.low:.4f} to {batch.high:.4f}, p = {corrected['batch']:.2g} after Holm)."
    )
    assert against.verdict == (
        f"Against {old} by test accuracy, 2 contenders are in both: 1 better here, 1 not told apart."
    )
    assert against.verdict in str(comparison).replace("\n", " ")


def test_less_is_better_of_a_loss(tmp_path):
    new, old = write(tmp_path / "new", NEW), write(tmp_path / "old", OLD)
    batch = compare(new, against=old, metric="test/loss").against.differences[0]
    assert (batch.better, batch.difference) == (True, pytest.approx(-0.062))


def test_only_common_seeds_are_paired(tmp_path):
    new, old = (
        write(tmp_path / "new", {"batch": NEW["batch"]}),
        write(tmp_path / "old", {"batch": OLD["batch"][:3]}),
    )
    (one,) = compare(new, against=old).against.differences
    assert (one.n, one.difference) == (
        3,
        pytest.approx(np.mean(np.subtract(NEW["batch"][:3], OLD["batch"][:3]))),
    )


def test_what_only_one_has_is_named_and_what_lost_its_runs_too(tmp_path):
    new = write(tmp_path / "new", NEW | {"layer": [0.5, 0.5]})
    old = write(tmp_path / "old", OLD | {"rms": [0.5, 0.5]})
    for root in (new, old):
        write_job(root, norm="tanh", state="diverged")
    comparison = compare(new, against=old)
    assert (comparison.against.only_here, comparison.against.only_there) == (["layer"], ["rms"])
    text = str(comparison)
    assert "  - only here: layer\n" in text
    assert f"only in {old}: rms" in text.replace("\n    ", " ")
    assert "  - tanh: no result here nor there.\n" in text


def test_a_condition_that_varies_in_one_sweep_only_meets_its_value_in_the_other(tmp_path):
    new = tmp_path / "new"
    for size in (4, 32):
        write(new, NEW, data__batch_size=size)
    comparison = compare(new, against=write(tmp_path / "old", OLD, data__batch_size=32))
    assert [one.condition for one in comparison.against.differences] == ["batch size = 32"] * 2
    assert comparison.against.only_here == ["batch at batch size = 4", "group at batch size = 4"]


def test_a_setting_that_each_holds_at_its_own_value_is_named(tmp_path):
    new = write(tmp_path / "new", NEW, optimizer__momentum=0.8)
    against = compare(new, against=write(tmp_path / "old", OLD)).against
    assert against.settings == ["optimizer.momentum: 0.8 here, 0.9 there"]
    assert [one.n for one in against.differences] == [5, 5]


def test_each_side_is_tuned_for_itself(tmp_path):
    new, old = tmp_path / "new", tmp_path / "old"
    for root, best in ((new, 0.1), (old, 0.01)):
        for rate in (0.1, 0.01):
            validation = 0.9 if rate == best else 0.5
            scored(root, "batch", [rate, rate + 0.01], {"optimizer.lr": rate}, validation=validation)
            scored(root, "group", [0.5, 0.5], {"optimizer.lr": rate}, validation=validation)
    batch = next(one for one in compare(new, against=old).against.differences if one.contender == "batch")
    assert batch.difference == pytest.approx(0.09)
    untuned = compare(new, against=old, tune=[]).against.differences
    assert {one.condition for one in untuned} == {"lr = 0.01", "lr = 0.1"}


def test_what_is_averaged_over_counts_once_per_seed(tmp_path):
    for size in (4, 32):
        for name, results in (("new", NEW), ("old", OLD)):
            write(tmp_path / name, results, data__batch_size=size)
    differences = compare(tmp_path / "new", against=tmp_path / "old", by=["norm"]).against.differences
    assert [one.n for one in differences] == [5, 5]


def test_nothing_in_common_is_said(tmp_path):
    new, old = write(tmp_path / "new", {"batch": [0.9, 0.9]}), write(tmp_path / "old", {"group": [0.9, 0.9]})
    assert compare(new, against=old).against.verdict.startswith("Nothing is in both")


def test_the_other_sweep_is_left_as_it_was(tmp_path):
    new, old = write(tmp_path / "new", NEW), write(tmp_path / "old", OLD)
    before = {path.name for path in old.iterdir()}
    compare(new, against=old)
    assert {path.name for path in old.iterdir()} == before
    with pytest.raises(FileNotFoundError, match="nowhere"):
        compare(new, against=tmp_path / "nowhere")
