"""What is grouped, tuned, averaged and left out, and that no test result ever has a say in it."""

import math
import statistics

import numpy as np
import pytest
from scipy import stats
from test_compare_builder import scored, write_job, write_metrics

from bnlight.compare import compare
from bnlight.compare.axes import shown
from bnlight.compare.derive import Monitor
from bnlight.compare.where import parse, resolve

TRIED = (0.01, 0.1)


def grid(root, sizes=(4, 32), seeds=5):
    """Two norms at two batch sizes and two learning rates; returns the test accuracies by (norm, size, rate)."""
    rng = np.random.default_rng(0)
    found = {}
    for norm, base in (("batch", 0.8), ("renorm", 0.9)):
        for size in sizes:
            for rate in TRIED:
                values = (base + rate / 10 + size / 1000 + rng.normal(0, 0.002, seeds)).tolist()
                found[norm, size, rate] = values
                scored(
                    root,
                    norm,
                    values,
                    {"data.batch_size": size, "optimizer.lr": rate},
                    validation=base + rate,
                )
    return found


def chosen(comparison):
    return {(c.condition, c.contender): c for c in comparison.cells if c.chosen}


def test_each_norm_is_judged_at_the_learning_rate_its_validation_prefers_never_the_test(tmp_path):
    scored(tmp_path, "batch", [0.80, 0.82], {"optimizer.lr": 0.1}, validation=0.95)
    scored(tmp_path, "batch", [0.99, 0.99], {"optimizer.lr": 1.0}, validation=0.90)
    scored(tmp_path, "layer", [0.70, 0.72], {"optimizer.lr": 0.1}, validation=0.50)
    scored(tmp_path, "layer", [0.90, 0.92], {"optimizer.lr": 0.01}, validation=0.93)
    comparison = compare(tmp_path)
    chosen = {cell.contender: cell.settings["optimizer.lr"] for cell in comparison.cells if cell.chosen}
    assert chosen == {"batch": 0.1, "layer": 0.01}
    assert comparison.verdict.startswith(
        "With these 2 seeds, layer has the highest mean test accuracy, 0.9100"
    )
    assert comparison.verdict.endswith("Each at its own best lr.")
    assert comparison.tuned_by == "best_val/accuracy"
    how = "its own best lr (marked *), chosen by best validation accuracy, never by a test result"
    assert any(how in c for c in comparison.caveats)
    at = "The best lr lies at the edge of those tried for layer (lowest), batch (lowest): try beyond it."
    assert at in comparison.caveats
    assert "*" in str(comparison)


def test_a_setting_that_diverged_is_not_the_one_a_norm_is_judged_by(tmp_path):
    scored(tmp_path, "batch", [0.9, 0.9], {"optimizer.lr": 0.1}, validation=0.9)
    scored(tmp_path, "batch", [0.99], {"optimizer.lr": 1.0}, validation=0.99)
    write_job(tmp_path, norm="batch", seed=1, state="diverged", settings={"optimizer.lr": 1.0})
    scored(tmp_path, "group", [0.8, 0.8])
    chosen = {c.contender: c.settings["optimizer.lr"] for c in compare(tmp_path).cells if c.chosen}
    assert chosen["batch"] == 0.1


def test_picking_by_the_test_would_choose_otherwise_and_is_not_what_happens(tmp_path):
    good, lucky = [0.80, 0.81, 0.82], [0.90, 0.91, 0.92]
    scored(tmp_path, "batch", good, {"optimizer.lr": 0.1}, validation=0.85)
    scored(tmp_path, "batch", lucky, {"optimizer.lr": 1.0}, validation=0.75)
    scored(tmp_path, "layer", [0.83, 0.84, 0.86], {"optimizer.lr": 0.1}, validation=0.80)
    by_test = max(("0.1", good), ("1.0", lucky), key=lambda item: statistics.fmean(item[1]))[0]
    for tune in (None, ["lr"], ["optimizer.lr"]):
        comparison = compare(tmp_path, tune=tune)
        batch = chosen(comparison)["", "batch"]
        assert (by_test, batch.settings["optimizer.lr"]) == ("1.0", 0.1)
        assert batch.metric.mean == pytest.approx(statistics.fmean(good))
        assert comparison.findings[0].best == "layer"  # by the test's choice it would be batch


def test_jobs_that_monitor_a_test_metric_do_not_make_it_the_judge(tmp_path):
    settings = {"monitor.metric": "test/accuracy", "monitor.mode": "max"}
    scored(tmp_path, "batch", [0.8, 0.8], settings | {"optimizer.lr": 0.1}, validation=0.9)
    scored(tmp_path, "batch", [0.9, 0.9], settings | {"optimizer.lr": 1.0}, validation=0.7)
    comparison = compare(tmp_path, by=["norm"])
    assert comparison.tuned_by == "best_val/accuracy"
    assert chosen(comparison)["", "batch"].settings["optimizer.lr"] == 0.1


def test_without_a_validation_result_nothing_is_tuned(tmp_path):
    for norm in ("batch", "group"):
        for rate in TRIED:
            for seed in (0, 1):
                job = write_job(
                    tmp_path, norm=norm, seed=seed, settings={"optimizer.lr": rate}, result={"test/mse": rate}
                )
                (job / "metrics.csv").unlink()
    comparison = compare(tmp_path)
    assert (comparison.tuned_by, comparison.axes.conditions) == (None, ["optimizer.lr"])
    assert "All at shared settings." in comparison.verdict
    assert any("a test result must not choose" in caveat for caveat in comparison.caveats)
    with pytest.raises(ValueError, match=r"nothing to tune optimizer\.lr by.*--tune none"):
        compare(tmp_path, tune=["lr"])


def test_settings_are_compared_on_the_seeds_they_share(tmp_path):
    # Over all its seeds 0.1 has the better mean (0.85 against 0.80); on seeds 0 and 1, which both have, it is worse.
    for rate, values in ((0.1, [0.7, 0.7, 1.0, 1.0]), (0.01, [0.8, 0.8])):
        for seed, value in enumerate(values):
            job = write_job(
                tmp_path,
                norm="batch",
                seed=seed,
                settings={"optimizer.lr": rate},
                result={"test/accuracy": 0.5},
            )
            write_metrics(job, [{"attempt": 1, "step": 9, "epoch": 0, "time": 0, "val/accuracy": value}])
    scored(tmp_path, "group", [0.4, 0.4])
    comparison = compare(tmp_path)
    batch = chosen(comparison)["", "batch"]
    assert (batch.settings["optimizer.lr"], batch.chosen_on) == (0.01, ("0", "1"))
    assert "batch: its settings were compared on the seeds they share (0, 1)." in comparison.caveats


def test_a_setting_that_diverged_takes_no_seeds_from_the_choice_between_the_others(tmp_path):
    # On seed 0, all that 1.0 has finished, 0.01 is better; over all seeds 0.1 is.
    for rate, values in ((0.1, [0.7, 0.9, 0.9]), (0.01, [0.8, 0.8, 0.8]), (1.0, [0.99])):
        for seed, value in enumerate(values):
            job = write_job(
                tmp_path, seed=seed, settings={"optimizer.lr": rate}, result={"test/accuracy": 0.5}
            )
            write_metrics(job, [{"attempt": 1, "step": 9, "epoch": 0, "time": 0, "val/accuracy": value}])
    for seed in (1, 2):
        write_job(tmp_path, seed=seed, state="diverged", settings={"optimizer.lr": 1.0})
    scored(tmp_path, "group", [0.4, 0.4, 0.4])
    comparison = compare(tmp_path)
    batch = chosen(comparison)["", "batch"]
    assert (batch.settings["optimizer.lr"], batch.chosen_on) == (0.1, None)
    assert any("among the settings with the fewest diverged runs" in text for text in comparison.caveats)
    assert not any(
        "finished on the same seeds" in text for text in comparison.caveats
    )  # the chosen ones have


def test_only_numbers_have_an_edge_to_try_beyond(tmp_path):
    for scheduler in ("cosine", "none"):
        for norm in ("batch", "group"):
            scored(tmp_path, norm, [0.8, 0.81], choices={"scheduler": scheduler})
    comparison = compare(tmp_path)
    assert comparison.axes.tuned == ["scheduler"]
    assert not any("edge of those tried" in text for text in comparison.caveats)


def test_what_chose_a_setting_and_is_reported_too_is_said_to_flatter(tmp_path):
    grid(tmp_path)
    flatter = "What a setting was chosen by is what is reported of it too"
    for metric, tune, said in (
        ("best_val/accuracy", None, True),
        ("best_val/accuracy", [], False),
        ("test/accuracy", None, False),
    ):
        caveats = compare(tmp_path, metric=metric, tune=tune).caveats
        assert any(text.startswith(flatter) for text in caveats) == said


def test_who_had_fewer_settings_to_choose_from_is_named(tmp_path):
    for rate in TRIED:
        scored(tmp_path, "batch", [0.8, 0.81], {"optimizer.lr": rate})
        write_job(tmp_path, norm="layer", state="failed", settings={"optimizer.lr": rate})
    scored(tmp_path, "group", [0.8, 0.81], {"optimizer.lr": 0.1})
    fewer = "Fewer settings were tried of group than of others: a best of more is better."
    assert fewer in compare(tmp_path).caveats
    assert fewer not in compare(tmp_path, where="lr=0.1").caveats
    write_job(tmp_path, norm="group", state="diverged", settings={"optimizer.lr": 0.01})
    assert fewer not in compare(tmp_path).caveats  # that one was tried


def test_where_every_rate_diverges_none_is_called_the_best(tmp_path):
    for rate in TRIED:
        for seed in (0, 1):
            write_job(tmp_path, seed=seed, state="diverged", settings={"optimizer.lr": rate})
    scored(tmp_path, "group", [0.7, 0.7], {"optimizer.lr": 0.1})
    assert not any("edge of those tried" in text for text in compare(tmp_path).caveats)
    caveats = compare(tmp_path, where="norm=batch").caveats
    assert not any("ran more than once" in text for text in caveats)


def test_a_setting_whose_runs_all_failed_is_never_chosen(tmp_path):
    scored(tmp_path, "batch", [0.8, 0.8], {"optimizer.lr": 0.1})
    write_job(tmp_path, norm="batch", seed=2, state="diverged", settings={"optimizer.lr": 0.1})
    write_job(tmp_path, norm="batch", seed=0, state="failed", settings={"optimizer.lr": 1.0})
    scored(tmp_path, "group", [0.7, 0.7])
    assert chosen(compare(tmp_path))["", "batch"].settings["optimizer.lr"] == 0.1


def test_shared_settings_are_conditions_and_labelled(tmp_path):
    values = grid(tmp_path)
    comparison = compare(tmp_path, tune=[])
    assert comparison.axes.conditions == ["data.batch_size", "optimizer.lr"]
    assert comparison.axes.tuned == []
    assert len(comparison.findings) == 4
    assert comparison.verdict.endswith("All at shared settings.")
    assert "\nAll at shared settings.\n" in str(comparison)
    assert any("shared learning rates, untuned" in caveat for caveat in comparison.caveats)
    for cell in comparison.cells:
        key = cell.contender, cell.settings["data.batch_size"], cell.settings["optimizer.lr"]
        assert cell.metric.mean == pytest.approx(statistics.fmean(values[key]))


def test_tuned_is_the_default_and_labelled(tmp_path):
    grid(tmp_path)
    comparison = compare(tmp_path)
    assert comparison.axes.tuned == ["optimizer.lr"]
    assert comparison.verdict.endswith("Each at its own best lr.")
    assert "\nEach at its own best lr.\n" in str(comparison)
    assert {cell.settings["optimizer.lr"] for cell in comparison.cells if cell.chosen} == {0.1}


def test_options_of_a_norm_are_contenders_where_nothing_is_tuned(tmp_path):
    scored(tmp_path, "batch", [0.9, 0.9])
    for groups in (1, 4):
        scored(tmp_path, "group", [0.8, 0.8], settings={"norm.num_groups": groups})
    comparison = compare(tmp_path, tune=[])
    assert {cell.contender for cell in comparison.cells} == {
        "batch",
        "group + num groups=1",
        "group + num groups=4",
    }


def test_what_is_not_grouped_by_is_averaged_within_each_seed(tmp_path):
    values = grid(tmp_path)
    comparison = compare(tmp_path, by=["norm"], tune=["lr"])
    assert comparison.axes.averaged == ["data.batch_size"]
    best = {
        norm: np.mean([values[norm, size, 0.1] for size in (4, 32)], axis=0) for norm in ("batch", "renorm")
    }
    for (_, norm), cell in chosen(comparison).items():
        assert (len(cell.done), cell.metric.n) == (10, 5)
        assert cell.metric.mean == pytest.approx(best[norm].mean())
        assert cell.metric.std == pytest.approx(best[norm].std(ddof=1))
    pair, test = comparison.evidence.pairs[0], stats.ttest_rel(best["renorm"], best["batch"])
    assert (pair.n, pair.p) == (5, pytest.approx(test.pvalue))
    assert "batch size varies too (4, 32) and is averaged over within each seed." in comparison.caveats
    assert not any("ran more than once" in caveat for caveat in comparison.caveats)


def test_short_names_give_conditions_in_the_order_asked_for(tmp_path):
    grid(tmp_path)
    assert compare(tmp_path, by=["lr", "batch_size"]).axes.conditions == ["optimizer.lr", "data.batch_size"]
    assert compare(tmp_path, by=["batch size"]).axes.conditions == ["data.batch_size"]
    assert compare(tmp_path, by="batch_size").axes.tuned == ["optimizer.lr"]


def test_settings_without_a_norm_among_them_are_what_is_compared(tmp_path):
    for size in (4, 32):
        for rate in TRIED:
            scored(
                tmp_path,
                "batch",
                [0.8 + rate, 0.81 + rate, 0.8 + rate],
                {"data.batch_size": size, "optimizer.lr": rate},
            )
    assert compare(tmp_path).axes.contenders == ["data.batch_size", "optimizer.lr"]
    comparison = compare(tmp_path, by=["batch_size"])
    assert (comparison.axes.contenders, comparison.axes.tuned) == (["data.batch_size"], ["optimizer.lr"])
    assert {cell.contender for cell in comparison.cells} == {"batch size=4", "batch size=32"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"by": ["batchsize"]},
            r"no setting 'batchsize'. Did you mean data.batch_size\? What varies.*: norm, data.batch_size",
        ),
        (
            {"tune": ["nothing_like_it"]},
            r"no setting 'nothing_like_it'. What varies between them: norm, data.batch_size",
        ),
        ({"by": ["lr"], "tune": ["lr"]}, "optimizer.lr: asked for in both by and tune"),
        ({"by": ["seed"]}, "seed: expected settings of what a run computes"),
        ({"where": "norm"}, "'norm' is no filter: expected KEY=VALUE"),
        ({"where": "norm="}, "is no filter"),
        ({"where": "seed<three"}, "< takes one number, not 'three'"),
        ({"where": "seed<=1,2"}, "<= takes one number"),
        ({"where": "norm=layer"}, "no run is left with norm=layer; norm is one of: batch, renorm"),
        ({"where": ["norm=batch", "norm=renorm"]}, "no run is left with norm=renorm; norm is one of: batch"),
        ({"where": "test/accuracy>0.5"}, "'test/accuracy' is a result: runs are chosen by their settings"),
        ({"where": "epochs=10"}, "'epochs' is a result"),
        ({"where": "colour=red"}, "no setting 'colour'"),
    ],
)
def test_what_cannot_be_asked_is_an_error_that_says_why(tmp_path, options, message):
    grid(tmp_path, seeds=1)
    with pytest.raises(ValueError, match=message):
        compare(tmp_path, **options)


@pytest.mark.parametrize(
    ("where", "kept"),
    [
        ("norm=batch", lambda r: r["norm"] == "batch"),
        ("norm=batch,renorm", lambda r: True),
        ("norm==RENORM", lambda r: r["norm"] == "renorm"),
        ("seed!=3", lambda r: r["seed"] != 3),
        ("seed!=3,4", lambda r: r["seed"] not in (3, 4)),
        ("data.batch_size<=16", lambda r: r["batch_size"] <= 16),
        ("batch_size > 4", lambda r: r["batch_size"] > 4),
        ("batch_size=32.0", lambda r: r["batch_size"] == 32),
        ("lr=1e-1", lambda r: r["lr"] == 0.1),
        ("state=done", lambda r: r["state"] == "done"),
        (
            ["norm=batch", "seed<2", "lr<0.05"],
            lambda r: r["norm"] == "batch" and r["seed"] < 2 and r["lr"] < 0.05,
        ),
    ],
)
def test_filters_keep_what_they_say(tmp_path, where, kept):
    grid(tmp_path)
    write_job(tmp_path, norm="batch", seed=9, state="failed")
    every = compare(tmp_path).runs
    comparison = compare(tmp_path, where=where)
    assert set(comparison.runs.index) == {row["directory"] for row in every.to_dict("records") if kept(row)}
    assert set(comparison.history["directory"]) <= set(comparison.runs.index)


def test_runs_left_out_are_counted_with_what_became_of_them(tmp_path):
    grid(tmp_path)
    write_job(tmp_path, norm="batch", seed=9, state="failed")
    comparison = compare(tmp_path, where="state=done")
    assert comparison.caveats[0] == "Only runs with state=done: 40 of 41 (left out: 1 failed)."


def test_a_missing_setting_is_null(tmp_path):
    scored(tmp_path, "batch", [0.9])
    scored(tmp_path, "group", [0.9], settings={"norm.num_groups": 4})
    assert set(compare(tmp_path, where="num_groups=null").runs["norm"]) == {"batch"}
    assert set(compare(tmp_path, where="num_groups!=null").runs["norm"]) == {"group"}


def test_a_setting_that_is_null_is_shown_so_and_told_from_one_that_is_absent(tmp_path):
    for value in (8, None):
        scored(tmp_path, "batch", [0.9, 0.91], settings={"norm.virtual_batch_size": value})
    scored(tmp_path, "layer", [0.9, 0.92])
    key = "norm.virtual_batch_size"
    found = compare(tmp_path, by=["norm", key])
    assert {(cell.settings["norm"], shown(cell.settings[key])) for cell in found.cells} == {
        ("batch", "8"), ("batch", "null"), ("layer", "-"),
    }  # fmt: skip
    assert "null" in str(found)
    for where, norms in (
        (f"{key}=null", ["batch", "layer"]),
        (f"{key}=-", ["layer"]),
        (f"{key}!=null", ["batch"]),
    ):
        assert sorted(set(compare(tmp_path, where=where).runs["norm"])) == norms
    assert compare(tmp_path).monitor == Monitor()


def test_a_filter_prints_as_it_was_written():
    for text in ("norm=batch,renorm", "seed!=3", "data.batch_size<=16"):
        assert str(parse(text)) == text


def test_a_short_name_with_two_meanings_is_refused_unless_only_one_varies():
    keys = ["model.width", "data.width", "norm"]
    with pytest.raises(
        ValueError, match=r"'width' could be any of data.width, model.width: write one of them in full"
    ):
        resolve("width", keys)
    assert resolve("width", keys, varying=["data.width"]) == "data.width"


def test_seeds_that_ran_twice_count_once(tmp_path):
    for split in (0, 0.5):  # a key that does not end in seed and was not typed: the same settings twice
        scored(tmp_path / str(split), "batch", [0.8 + split / 10, 0.9 + split / 10])
    comparison = compare(tmp_path)
    (cell,) = comparison.cells
    assert (len(cell.done), cell.metric.n) == (4, 2)
    assert cell.metric.mean == pytest.approx(0.875)
    assert cell.metric.std == pytest.approx(0.1 / math.sqrt(2))
    assert any(caveat.startswith("Some seeds ran more than once") for caveat in comparison.caveats)
