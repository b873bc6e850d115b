"""A comparison follows what the jobs monitor, in its direction."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_compare_builder import write_job

from bnlight.compare import compare
from bnlight.compare.derive import Monitor


def sweep(root: Path, metric: str, mode: str, test: str | None, best: str = "group") -> Path:
    """Two norms, two seeds; `best` has the better values of a score whose name does not tell its direction."""
    for norm in ("batch", "group"):
        for seed in (0, 1):
            low = 1.0 + 0.01 * seed
            value = low if (norm == best) == (mode == "min") else low + 5
            result = {metric: value, "val/loss": 0.1} | ({test: value + 0.1} if test else {})
            settings = {"monitor.metric": metric, "monitor.mode": mode}
            job = write_job(root, norm=norm, seed=seed, settings=settings, result=result)
            (job / "metrics.csv").write_text(f"attempt,step,epoch,time,{metric}\n1,10,0,1.0,{value}\n")
    return root


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize(("metric", "test"), [("val/score", "test/score"), ("val_score", "test_score")])
def test_the_table_is_ranked_by_the_test_side_in_the_jobs_direction(
    tmp_path: Path, metric: str, test: str, mode: str
) -> None:
    found = compare(sweep(tmp_path, metric, mode, test))
    assert found.metric == test
    assert [cell.contender for cell in found.cells] == ["group", "batch"]
    assert f"group has the {'lowest' if mode == 'min' else 'highest'} mean test score" in found.verdict
    assert found.page.stat().st_size > 0


@pytest.mark.parametrize("mode", ["min", "max"])
def test_without_a_test_it_is_the_best_of_validation(tmp_path: Path, mode: str) -> None:
    found = compare(sweep(tmp_path, "val/score", mode, test=None))
    assert found.metric == "best_val/score"
    assert found.cells[0].contender == "group"
    assert f"{'lowest' if mode == 'min' else 'highest'} mean best validation score" in found.verdict


def test_a_setting_is_chosen_by_the_validation_side_of_what_is_asked_for(tmp_path: Path) -> None:
    for rate in (0.1, 1.0):
        settings = {"monitor.metric": "val/score", "monitor.mode": "max", "optimizer.lr": rate}
        result = {"test/score": rate, "test/loss": rate}
        job = write_job(tmp_path, settings=settings, result=result)
        (job / "metrics.csv").write_text(
            f"attempt,step,epoch,time,val/score,val/loss\n1,10,0,1.0,{rate},{rate}\n"
        )
    for metric, by, best in (("test/score", "best_val/score", 1.0), ("test/loss", "best_val/loss", 0.1)):
        found = compare(tmp_path, metric=metric, by=["norm"])
        assert found.tuned_by == by
        assert [cell.settings["optimizer.lr"] for cell in found.cells if cell.chosen] == [best]


def test_the_best_validation_value_is_in_that_direction_too(tmp_path: Path) -> None:
    job = write_job(
        tmp_path, settings={"monitor.metric": "val/score", "monitor.mode": "min"}, result={"val/score": 3.0}
    )
    (job / "metrics.csv").write_text("attempt,step,epoch,time,val/score\n1,10,0,1.0,2.0\n1,20,1,2.0,3.0\n")
    assert compare(tmp_path).runs["best_val/score"].tolist() == [2.0]


def test_names_still_tell_the_direction_of_what_is_not_monitored() -> None:
    monitor = Monitor("val/score", "min")
    assert monitor.lower("test/score")
    assert monitor.lower("best_val/score")
    assert monitor.lower("val/loss")
    assert not monitor.lower("test/accuracy")
    assert not Monitor().lower("test/accuracy")
    assert Monitor("val/loss", "max").lower("test/loss") is False


def test_parts_that_a_module_did_not_use_are_no_setting_and_no_caveat(tmp_path: Path) -> None:
    for norm in ("batch", "group"):
        job = write_job(tmp_path, norm=norm, choices={"module": "Regression"})
        content = json.loads((job / "result.json").read_text())
        (job / "result.json").write_text(
            json.dumps(content | {"unused": ["model", "optimizer", "scheduler"]})
        )
    found = compare(tmp_path)
    assert set(found.runs["model"]) == {"Regression"}
    assert not any("learning rate" in caveat for caveat in found.caveats)
    assert not [key for key in found.configs if key.startswith(("model.", "optimizer"))]


@pytest.mark.parametrize(
    ("metric", "mode", "target", "words"),
    [
        ("val/score", "max", 5.5, "score of 5.5"),
        ("val/mae", "min", 1.5, "mae of 1.5 or less"),
        ("val_acc", "max", 5.5, "acc of 5.5"),
    ],
)
def test_a_target_is_one_of_what_the_jobs_monitor(
    tmp_path: Path, metric: str, mode: str, target: float, words: str
) -> None:
    found = compare(sweep(tmp_path, metric, mode, None), target=target)
    assert {cell.contender: cell.reached for cell in found.cells} == {"group": 2, "batch": 0}
    assert found.aim.endswith(words)
    assert words in found.page.read_text()
    assert f"{metric} {target:g}" in str(found)
    assert not any("has reached" in caveat for caveat in found.caveats)
    missed = compare(tmp_path, target=-1 if mode == "min" else 99)
    assert f"No finished run has reached a {missed.aim}." in missed.caveats


@pytest.mark.parametrize("mode", ["min", "max"])
def test_without_a_target_only_an_accuracy_is_held_against_ninety_per_cent(tmp_path: Path, mode: str) -> None:
    found = compare(sweep(tmp_path, "val/score", mode, None))
    assert found.aimed_at is None
    assert "steps to" not in str(found)


def test_a_target_of_an_accuracy_by_another_name_than_the_monitored(tmp_path: Path) -> None:
    job = write_job(tmp_path, result={"val_acc": 0.5})
    (job / "metrics.csv").write_text("attempt,step,epoch,time,val_acc\n1,10,0,1.0,0.5\n")
    assert compare(tmp_path, target=0.4).cells[0].steps == 10


def test_a_target_of_what_nobody_has_logged_says_what_there_is(tmp_path: Path) -> None:
    job = write_job(tmp_path, result={"val_f1": 0.5})
    (job / "metrics.csv").write_text("attempt,step,epoch,time,val_f1\n1,10,0,1.0,0.5\n")
    caveats = compare(tmp_path, target=0.4).caveats
    said = "No run has logged val/accuracy, which a target is held against; there is: val_f1."
    assert said in caveats
