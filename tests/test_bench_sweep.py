"""The benchmark of a sweep runs every way for real."""

from __future__ import annotations

from pathlib import Path

import pytest

from bnlight.bench import clock
from bnlight.bench.sweep import growth, run
from bnlight.cli import main


@pytest.mark.parametrize("way", ["Hydra alone", "Hydra + Lightning + W&B", "bnlight + W&B"])
def test_each_way_trains_its_jobs(way: str, project: Path) -> None:
    costs = run(way, 4, project / "out")
    assert len(costs) == 2, "the first and the last do not count"
    assert all(0 < cpu < 60 and 0 < seconds < 60 for seconds, cpu in costs)
    runs = [*project.glob("out/**/offline-run-*")]
    assert len({path.resolve() for path in runs if not path.is_symlink()}) == (4 if "W&B" in way else 0)


def test_what_a_job_costs_is_its_turn_less_its_typical_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    at = [clock.Moment(0.0, 0.0), clock.Moment(9.0, 9.0), clock.Moment(19.0, 15.0), clock.Moment(30.0, 30.0)]
    step, slow = clock.Moment(2.0, 1.0), clock.Moment(5.0, 3.0)
    monkeypatch.setattr(clock, "_begun", at)
    monkeypatch.setattr(clock, "_steps", [[step], [slow, step, step], [], [step]])
    assert clock.overheads() == [(10.0 - 3 * 2.0, 6.0 - 3 * 1.0), (11.0, 15.0)]


def test_a_directory_of_copies_is_listed_and_compared(project: Path) -> None:
    assert set(growth(5)) == {"job", "status", "compare"}


def test_options_that_measure_nothing_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "sweep", "--jobs", "1"])
    assert "--jobs is at least 3" in capsys.readouterr().err
