"""Sweeps over experiments: files that set several keys at once, `+experiment=a,b`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from test_compare_builder import scored, write_job

from bnlight.compare import compare
from bnlight.compare.page.data import axis


def write(root: Path, experiment: str, norm: str, seed: int, **optimizer: Any) -> None:
    """A job as Hydra composes it: only the experiment and the seed were typed."""
    job = write_job(root, norm=norm, seed=seed, settings={f"optimizer.{k}": v for k, v in optimizer.items()})
    config = yaml.safe_load((job / "config.yaml").read_text())
    config["job"]["choices"]["experiment"] = experiment
    config["job"]["overrides"] = [f"+experiment={experiment}", f"seed={seed}"]
    (job / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


def test_norms_that_experiments_choose_are_the_contenders_and_what_goes_with_them_is_said(
    tmp_path: Path,
) -> None:
    for seed in (0, 1, 2):
        write(tmp_path, "usual", "batch", seed, lr=0.1)
        write(tmp_path, "small", "group", seed, lr=0.02)
    found = compare(tmp_path)
    assert (found.axes.contenders, found.axes.conditions, found.axes.tuned) == (["norm"], [], [])
    assert {(cell.contender, cell.metric.n) for cell in found.cells} == {("batch", 3), ("group", 3)}
    (note,) = [note for note in found.caveats if "Not the norm alone differs" in note]
    assert (
        "optimizer.lr (0.1 with batch, 0.02 with group)" in note or "0.02 with group, 0.1 with batch" in note
    )


def test_experiments_of_one_norm_are_tuned_by_what_they_set(tmp_path: Path) -> None:
    for seed in (0, 1):
        write(tmp_path, "usual", "batch", seed, lr=0.1)
        write(tmp_path, "slow", "batch", seed, lr=0.02)
        write(tmp_path, "small", "group", seed, lr=0.02)
    found = compare(tmp_path)
    assert (found.axes.contenders, found.axes.conditions) == (["norm"], [])
    assert found.axes.tuned == ["optimizer.lr"]
    assert not [note for note in found.caveats if "Not the norm alone differs" in note]


def test_experiments_that_share_a_norm_stay_contenders(tmp_path: Path) -> None:
    for seed in (0, 1):
        write(tmp_path, "usual", "batch", seed, lr=0.1)
        write(tmp_path, "slow", "batch", seed, lr=0.02, momentum=0.5)
    assert "experiment" in compare(tmp_path).axes.contenders


def test_null_and_absent_alone_make_no_axis(tmp_path: Path) -> None:
    scored(tmp_path, "batch", [0.9], settings={"trainer.precision": None})
    scored(tmp_path, "group", [0.9])
    assert compare(tmp_path).axes.keys == ["norm"]


def test_a_numeric_setting_that_is_null_in_some_jobs_stays_a_numeric_axis(tmp_path: Path) -> None:
    for value in (2, 8, 32, None):
        scored(tmp_path, "batch", [0.9, 0.91], settings={"norm.virtual_batch_size": value})
    found = compare(tmp_path, by=["norm", "norm.virtual_batch_size"])
    drawn = axis(found, "norm.virtual_batch_size")
    assert (drawn["numeric"], drawn["levels"]) == (True, ["2", "8", "32", "null"])
