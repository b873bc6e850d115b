"""The sentences on ranks, stability and cost: they say what the evidence holds, and nothing where it holds nothing."""

from test_compare_builder import scored, write_job, write_metrics, write_result

from bnlight.compare import compare
from bnlight.compare.beyond import beyond
from bnlight.compare.formats import as_markdown


def test_ranks_are_told_with_what_separates_them(tmp_path):
    for norm, base in (("batch", 0.9), ("group", 0.8), ("layer", 0.7), ("none", 0.6)):
        scored(tmp_path, norm, [base + seed / 100 for seed in range(6)])
    comparison = compare(tmp_path)
    said = (
        "Mean ranks over 6 blocks, each a seed at one setting: batch 1.00, group 2.00, layer 3.00, none 4.00; "
        "those closer than 1.91 are not told apart (Nemenyi; Friedman's p = 0.00044)."
    )
    assert beyond(comparison) == [said]  # one learning rate, no time measured
    assert said in " ".join(str(comparison).split())
    assert f"- {said}" in as_markdown(comparison)


def test_ranks_that_friedman_does_not_separate_are_not_told_apart(tmp_path):
    for norm, values in (("batch", [0.9, 0.8]), ("group", [0.8, 0.9]), ("layer", [0.7, 0.95])):
        scored(tmp_path, norm, values)
    (said,) = beyond(compare(tmp_path))
    assert "batch 2.00, group 2.00, layer 2.00; they are not told apart (Friedman's p = 1)." in said


def test_the_largest_stable_rate_and_who_is_not_beaten_are_told_for_each_condition(tmp_path):
    for size in (4, 32):
        for norm, seconds, quality in (("batch", 0.5, 0.9), ("group", 0.25, 0.8), ("layer", 1.0, 0.7)):
            for rate in (0.1, 1.0):
                bad = norm == "batch" and rate == 1.0
                settings = {"optimizer.lr": rate, "data.batch_size": size}
                job = write_job(tmp_path, norm=norm, state="diverged" if bad else "done", settings=settings)
                row = {"attempt": 1, "step": 9, "epoch": 0, "time": 0, "val/accuracy": quality}
                write_metrics(job, [row | {"train/seconds_per_step": seconds}])
                if not bad:
                    write_result(job, {"test/accuracy": quality})
    stable = "largest stable lr: batch 0.1, group 1 (largest tried), layer 1 (largest tried)"
    front = "nobody is both better in test accuracy and faster per step than batch or group."
    assert beyond(compare(tmp_path))[-2:] == [f"At batch size = {n}, {stable}; {front}" for n in (4, 32)]
    one = beyond(compare(tmp_path, where="batch_size=4", tune=[]))
    assert not any("stable" in text for text in one)  # each rate is a condition of its own


def test_who_has_no_stable_rate_is_named_apart(tmp_path):
    for norm in ("layer", "none"):
        for rate in (0.1, 1.0):
            state = "diverged" if norm == "none" else "done"
            write_job(tmp_path, norm=norm, state=state, settings={"optimizer.lr": rate})
    assert beyond(compare(tmp_path)) == [
        "Largest stable lr: layer 1 (largest tried); no lr was stable for none."
    ]
