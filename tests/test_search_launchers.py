"""A search whose trials run elsewhere: in processes of this machine, of submitit, of SLURM, of ray."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import yaml
from conftest import SMALL
from search import acts, ours, rates, trials
from slurm import cluster, slurm

from bnlight.cli import main
from bnlight.run.launch import submit
from bnlight.run.status import read_status

pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="the extra optuna is not installed")
# Optuna 2's first import of SQLAlchemy, which a test may do before the command does
pytestmark = pytest.mark.filterwarnings("ignore:Deprecated API features detected")
assert ours  # fixtures
assert slurm
assert cluster

no_ray = pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="no ray here: pip install ray")
WAYS = [
    pytest.param("parallel", "n_jobs=2"),
    pytest.param("local", "array_parallelism=2", marks=pytest.mark.slow),  # as `slurm` does
    pytest.param("slurm", "cpus_per_task=1"),
    pytest.param("ray_local", "init.num_cpus=2", marks=no_ray),
]


@pytest.mark.parametrize(("launcher", "option"), WAYS)
def test_trials_have_their_values_wherever_they_run_and_broken_ones_end_nothing(
    ours: Path,
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    launcher: str,
    option: str,
) -> None:
    if launcher == "slurm":
        request.getfixturevalue("cluster")
        monkeypatch.setattr(submit, "SECONDS_BETWEEN_QUEUE_LOOKS", 1)
        monkeypatch.setattr(submit, "SECONDS_FOR_FILES", 2)
    acts(project, "fail", "diverge", "ok", "kill")
    command = ["sweep", "ours", f"hydra/launcher={launcher}", f"hydra.launcher.{option}"]
    command += ["hydra.sweeper.n_jobs=2"]
    assert main(command) == 1
    assert sorted(rates(ours).values()) == ["diverged", "done", "done", "done", "failed", "failed"]
    assert not (project / "acts").read_text()
    jobs = {}
    for path in ours.glob("*/config.yaml"):
        config = yaml.safe_load(path.read_text())
        jobs[config["optimizer"]["lr"]] = config["data"]["batch_size"], path.parent
    assert len(trials(ours)) == len(jobs) == 6
    for trial in trials(ours):
        batch_size, job = jobs.pop(trial.params["optimizer.lr"])
        assert trial.params["data.batch_size"] == batch_size
        state = read_status(job)["state"]
        assert trial.user_attrs.get("diverged", False) == (state == "diverged")
        if state == "done":
            assert trial.value == json.loads((job / "result.json").read_text())["metrics"]["val/accuracy"]
        elif state == "failed":
            assert trial.state.name == "FAIL"
    assert main(command) == 1
    assert len(trials(ours)) == len(rates(ours)) == 6


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["monitor.metric=null"], "a search needs a metric to judge its trials by"),
        (["norm=glob(nothing*)"], "the search has no values: norm=glob(nothing*) matches nothing"),
        (["seed=glob(*)"], "the search has no values: seed=glob(*) matches nothing"),
    ],
)
def test_a_search_that_cannot_be_is_refused_in_words(
    ours: Path, project: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert main(["sweep", "ours", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_a_search_over_what_matches_has_its_trials(project: Path) -> None:
    own = ["hydra/sweeper=search", "hydra/sweeper/sampler=random", "hydra.sweeper.n_trials=2"]
    assert main(["train", *SMALL, *own, "-m", "norm=glob(r*)", "hydra.sweep.dir=outputs/ours"]) == 0
    chosen = [trial.params["norm"] for trial in trials(project / "outputs" / "ours")]
    assert len(chosen) == 2
    assert {*chosen} <= {"renorm", "rms"}


def test_a_trial_without_the_metric_has_failed(
    ours: Path, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", "ours", "+trainer.max_steps=2", "hydra.sweeper.n_trials=1"]) == 1
    assert [trial.state.name for trial in trials(ours)] == ["FAIL"]
