"""The benchmark of a sweep runs every way for real."""

from __future__ import annotations

from pathlib import Path

import pytest

from bnlight.bench.sweep import growth, run
from bnlight.cli import main


@pytest.mark.parametrize("way", ["lightning", "hydra + wandb", "bnlight + wandb"])
def test_each_way_trains_its_jobs(way: str, project: Path) -> None:
    times = run(way, 3, project / "out")
    assert len(times) == 2
    assert all(0 < seconds < 60 for seconds in times)
    runs = [*project.glob("out/**/offline-run-*")]
    assert len({path.resolve() for path in runs if not path.is_symlink()}) == (3 if "wandb" in way else 0)


def test_a_directory_of_copies_is_listed_and_compared(project: Path) -> None:
    assert set(growth(5)) == {"job", "status", "compare"}


def test_options_that_measure_nothing_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "sweep", "--jobs", "1"])
    assert "--jobs is at least 3" in capsys.readouterr().err
