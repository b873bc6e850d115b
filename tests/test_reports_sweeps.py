"""What users have reported of sweeps elsewhere, tried here; docs/tested-against.md lists the reports."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import SMALL

from bnlight.cli import main

MINE = """
from bnlight.models import MLP

class Net(MLP):
    def __init__(self, norm, note, **arguments):
        super().__init__(norm=norm, **arguments)
"""


def configs(root: str = "outputs/train") -> list[dict[str, Any]]:
    """Of each job, as anybody's YAML reader has it."""
    return [yaml.safe_load(path.read_text()) for path in sorted(Path(root).glob("*/config.yaml"))]


def test_a_small_rate_is_a_number_for_every_reader_and_the_same_job_however_it_is_written(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """hydra-ecosystem/hydra#1000: 1e-05 is not parsed as a float."""
    assert main(["train", *SMALL, "optimizer.lr=1e-05"]) == 0
    assert main(["train", *SMALL, "optimizer.lr=0.00001"]) == 0
    assert main(["train", "-m", *SMALL, "optimizer.lr=1.0e-5,0.00001"]) == 0
    assert "done before, skipped" in capsys.readouterr().out
    (config,) = configs()
    assert config["optimizer"]["lr"] == 1e-5
    with Path("outputs/train/results.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert float(row["lr"]) == 1e-5


def test_lists_are_swept_as_lists_and_told_apart(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """hydra-ecosystem/hydra#96: a sweep over lists is split at every comma."""
    small = [argument for argument in SMALL if not argument.startswith("model")]
    widths = ["model=cnn", "model.widths=[4,8],[8,4]", "data.batch_size=256"]
    assert main(["train", "-m", *small, *widths]) == 0
    assert sorted(config["model"]["widths"] for config in configs()) == [[4, 8], [8, 4]]
    assert "widths=[" in capsys.readouterr().out  # in the verdict


def test_a_value_that_refers_to_a_swept_one_follows_it(project: Path) -> None:
    """hydra-ecosystem/hydra#725: param2=${param1} of a sweep over param1 made 3 x 3 jobs instead of 3."""
    assert main(["train", "-m", *SMALL, "seed=5,6", "data.split_seed=${seed}"]) == 0
    assert sorted((config["seed"], config["data"]["split_seed"]) for config in configs()) == [(5, 5), (6, 6)]


def test_a_verbose_sweep_is_a_sweep(project: Path) -> None:
    """hydra-ecosystem/hydra#1897: multirun does not work with hydra.verbose=True."""
    assert main(["train", "-m", *SMALL, "seed=5,6", "hydra.verbose=true"]) == 0
    assert sorted(config["seed"] for config in configs()) == [5, 6]


def test_a_quoted_comma_is_part_of_its_value(project: Path) -> None:
    """hydra-ecosystem/hydra#573: a value with a comma cannot be passed to a multirun."""
    (project / "mine.py").write_text(MINE)
    own = ["model=custom", "model._target_=mine.Net", "+model.width=16", "+model.depth=1"]
    small = [argument for argument in SMALL if not argument.startswith("model")]
    assert main(["train", "-m", *small, *own, "+model.note='a, b','c=d/e'"]) == 0
    assert sorted(config["model"]["note"] for config in configs()) == ["a, b", "c=d/e"]
    assert len([*Path("outputs/train").glob("*/result.json")]) == 2
