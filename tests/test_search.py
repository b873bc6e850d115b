"""A search: its study survives failures, kills and restarts; random; lists of jobs; what the stock sweeper does."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
import pytest
import yaml
from conftest import SMALL
from search import MINE, SEARCH, acts, ours, rates, trials

from bnlight.cli import main
from bnlight.run.status import read_status

pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="the extra optuna is not installed")
# Optuna 2's first import of SQLAlchemy, which a test may do before the command does
pytestmark = pytest.mark.filterwarnings("ignore:Deprecated API features detected")
assert ours  # a fixture
Command = Callable[..., subprocess.CompletedProcess[str]]
ROOT = Path(__file__).parents[1]
OPTUNA_2 = importlib.metadata.version("optuna").startswith("2.")


def test_failed_diverged_and_stopped_trials_do_not_end_a_search(
    ours: Path, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    acts(project, "diverge", "fail", "ok", "diverge", "stop")
    assert main(["sweep", "ours"]) == 130
    assert [trial.state.name for trial in trials(ours)] == ["FAIL", "FAIL", "COMPLETE", "COMPLETE", "RUNNING"]
    before = trials(ours)
    assert before[3].value == before[2].value  # diverged: as bad as the worst so far
    first = rates(ours)
    assert sorted(first.values()) == ["diverged", "diverged", "done", "failed", "interrupted"]
    capsys.readouterr()

    assert main(["sweep", "ours"]) == 1  # the failed trial has failed
    output = capsys.readouterr().out
    second = rates(ours)
    assert len(second) == 6
    assert second.keys() >= first.keys()  # the stopped trial has kept its values
    assert sorted(second.values()) == ["diverged", "diverged", "done", "done", "done", "failed"]
    assert "[5] " in output
    assert "[6] " in output
    assert "interrupted before, continued" in output
    assert "[1]" not in output  # what was known was not started
    assert "Best val/accuracy" in output
    assert yaml.safe_load((ours / "optimization_results.yaml").read_text())["best_params"]

    assert main(["sweep", "ours"]) == 1
    assert "[" not in capsys.readouterr().out.split("Best val/accuracy")[0]
    assert rates(ours) == second

    assert main(["sweep", "ours", "--retry-failed"]) == 0
    output = capsys.readouterr().out
    assert "[2] " in output
    assert "failed before, continued" in output
    assert sorted(rates(ours).values()) == ["diverged", "diverged", "done", "done", "done", "done"]

    assert main(["sweep", "ours", "hydra.sweeper.n_trials=7"]) == 0
    assert "[7] " in capsys.readouterr().out
    assert len(rates(ours)) == 7


def test_another_question_is_another_study_and_force_begins_anew(
    ours: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import optuna

    few = "hydra.sweeper.n_trials=2"
    assert main(["sweep", "ours", few, "progress=off", "hydra.sweeper.sampler.seed=0"]) == 0
    assert main(["sweep", "ours", few, "--fail-fast"]) == 0  # the same question
    assert len(rates(ours)) == 2
    assert main(["sweep", "ours", few, "model.width=8"]) == 0
    assert main(["sweep", "ours", few, "data.batch_size=16"]) == 0
    names = [study.study_name for study in optuna.get_all_study_summaries(f"sqlite:///{ours}/study.db")]
    assert len(names) == 3
    assert len(rates(ours)) == 6
    assert main(["sweep", "ours", few, "--force"]) == 0
    assert len(rates(ours)) == 8
    # A seed's continuation is not its beginning again.
    assert main(["sweep", "ours", "hydra.sweeper.n_trials=4", "hydra.sweeper.sampler.seed=0"]) == 0
    assert len(rates(ours)) == 10
    capsys.readouterr()
    assert main(["sweep", "ours", "--dry-run"]) == 0
    assert "none can be listed" in capsys.readouterr().out
    assert len(rates(ours)) == 10


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("optimizer.lr=interval(1,0)", "no trial can be chosen: The `low` value must be"),
        ("hydra.sweeper.n_trials=0", "n_trials=0: a search has at least 1 trial"),
        ("hydra.sweeper.direction=up", "direction=up: expected maximize, minimize or null"),
        ("hydra.sweeper.storage=study.db", "storage=study.db is not to be opened: Could not parse"),
        ("hydra/sweeper/sampler=tpee", "Could not find 'hydra/sweeper/sampler/tpee'"),
    ],
)
def test_a_search_that_cannot_begin_says_why(
    ours: Path, capsys: pytest.CaptureFixture[str], argument: str, said: str
) -> None:
    assert main(["sweep", "ours", argument]) == 2
    output = capsys.readouterr().err
    assert said in output
    assert "pip install" not in output
    assert not rates(ours)


def test_less_is_better_where_the_jobs_say_so(ours: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monitor = ["monitor.metric=val/loss", "monitor.mode=min"]
    assert main(["sweep", "ours", *monitor, "hydra.sweeper.n_trials=3"]) == 0
    assert "Best val/loss" in capsys.readouterr().out
    results = [json.loads(path.read_text()) for path in ours.glob("*/result.json")]
    values = sorted(trial.value for trial in trials(ours))
    assert values == sorted(result["metrics"]["val/loss"] for result in results)
    assert yaml.safe_load((ours / "optimization_results.yaml").read_text())["best_value"] == values[0]


def test_the_comparison_has_a_searchs_settings_as_axes(
    ours: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    norms = ["norm=choice(batch,layer)", "hydra.sweeper.n_trials=3", "hydra.sweeper.sampler.seed=1"]
    text = SEARCH.replace("norm: {_target_: mine.Norm}\n", "").replace(" {override norm: custom},", "")
    Path("sweeps/ours.yaml").write_text(text)
    assert main(["sweep", "ours", *norms]) == 0
    capsys.readouterr()
    assert main(["compare", str(ours)]) == 0
    output = capsys.readouterr().out
    found = pd.read_csv(ours / "results.csv")
    assert len(found) == 3
    for rate in found["lr"]:
        assert f"{rate:g}" in output
    assert "at its own best" in output
    assert "edge" not in output


def test_a_search_outlives_its_killed_worker(ours: Path, project: Path, bnlight: Command) -> None:
    acts(project, "ok", "kill")
    done = bnlight("sweep", "ours", "hydra.sweeper.n_trials=4")
    assert done.returncode == 1, done.stderr
    assert "A new worker takes the rest." in done.stdout
    assert "failed: the process was killed by SIGKILL" in done.stdout
    for label in ("[1]", "[3]", "[4]"):
        assert f"{label} " in done.stdout
    assert sorted(rates(ours).values()) == ["done", "done", "done", "failed"]
    assert [trial.state.name for trial in trials(ours)] == [
        "COMPLETE",
        "FAIL",
        "FAIL",
        "COMPLETE",
        "COMPLETE",
    ]


def test_two_commands_on_one_search_share_its_trials(ours: Path, project: Path) -> None:
    command = [sys.executable, "-m", "bnlight", "sweep", "ours", "hydra.sweeper.n_trials=8"]
    both = [subprocess.Popen(command, cwd=project, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=180)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert len(trials(ours)) == len(rates(ours)) == 8
    assert sum(text.count(": done in") for text in said) == 8


def test_a_command_waits_for_the_trials_of_another_and_takes_up_those_that_it_leaves(
    ours: Path, project: Path
) -> None:
    acts(project, "wait")
    command = [sys.executable, "-m", "bnlight", "sweep", "ours", "hydra.sweeper.n_trials=2"]
    one = subprocess.Popen(command, cwd=project, stdout=subprocess.PIPE)
    while not (project / "begun").exists():
        assert one.poll() is None
        time.sleep(0.1)
    other = subprocess.Popen(command, cwd=project, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    said = ""
    while "Waiting for 1 trials that run elsewhere" not in said:
        line = other.stdout.readline()
        assert line, said  # else it has ended
        said += line
    one.kill()
    one.communicate()  # its worker has died with it
    (project / "begun").unlink()
    rest, _ = other.communicate(timeout=120)
    assert other.returncode == 0
    assert "[1] " in rest
    assert "2 jobs, 2 done" in rest
    assert [trial.state.name for trial in trials(ours)] == ["FAIL", "COMPLETE", "COMPLETE"]


def test_all_ranks_of_a_random_trial_have_its_values(ours: Path, project: Path) -> None:
    noting = """
import os, pathlib, time, torch.distributed

class Noting(Data):
    def setup(self, stage):
        super().setup(stage)
        if stage == "fit":
            lr = self.trainer.lightning_module.configure_optimizers()
            lr = (lr["optimizer"] if isinstance(lr, dict) else lr).param_groups[0]["lr"]
            job = pathlib.Path(self.trainer.default_root_dir).name
            pathlib.Path(f"seen-{job}-{self.trainer.global_rank}").write_text(repr(lr))
"""
    (project / "mine.py").write_text(MINE + noting)
    ranks = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "data._target_=mine.Noting"]
    assert main(["sweep", "ours", *ranks, "hydra.sweeper.n_trials=2", "scheduler=none"]) == 0
    seen: dict[str, list[float]] = {}
    for path in sorted(project.glob("seen-*")):
        seen.setdefault(path.name[5:-2], []).append(float(path.read_text()))
    assert len(seen) == 2
    for first, second in seen.values():
        assert first == second
    assert len({first for first, _ in seen.values()}) == 2


def test_trials_run_side_by_side(ours: Path, project: Path) -> None:
    pytest.importorskip("cloudpickle")
    acts(project, "fail")
    begun = main(
        ["sweep", "ours", "hydra/launcher=parallel", "hydra.launcher.n_jobs=2", "hydra.sweeper.n_trials=4"]
    )
    assert begun == 1
    assert sorted(rates(ours).values()) == ["done", "done", "done", "failed"]
    spans = sorted((s["started"], s["ended"]) for s in map(read_status, ours.glob("*-*-*")))
    assert spans[1][0] < spans[0][1]


@pytest.mark.skipif(not OPTUNA_2, reason="the sweeper's 1.4 has this mended")
def test_the_stock_sweeper_ends_at_a_diverged_trial(ours: Path, project: Path) -> None:
    acts(project, "diverge")
    stock = ["hydra/sweeper=optuna", "hydra.sweeper.n_jobs=1", "hydra.sweeper.max_failure_rate=1.0"]
    with pytest.raises(ValueError, match="Values cannot be specified"):
        main(["train", "-m", *custom(), *stock, "optimizer.lr=interval(0.001,0.1)"])


def test_the_stock_sweeper_ends_at_a_failed_trial_and_repeats_itself(ours: Path, project: Path) -> None:
    stock = ["hydra/sweeper=optuna", "hydra.sweeper.n_jobs=1", "hydra.sweeper.n_trials=2"]
    again = [*stock, "hydra.sweeper.storage=sqlite:///study.db", "hydra.sweeper.study_name=s"]
    arguments = ["train", "-m", *custom(), *again, "optimizer.lr=interval(0.001,0.1)"]
    acts(project, "fail")
    assert main(arguments) == 1
    assert len(trials(project)) == 1  # of two
    assert main(arguments) == 0
    assert len(trials(project)) == 3  # two more, not the one that was missing


def custom() -> Sequence[str]:
    return [*SMALL, "data=custom", "data._target_=mine.Data", "norm=custom", "norm._target_=mine.Norm"]


def test_a_list_runs_just_what_it_lists(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "sweeps").mkdir()
    (project / "sweeps" / "mine.yaml").write_text("""
# Which of two?
defaults: [train, {override model: mlp}, {override logger: csv}, {override trainer: cpu},
  {override hydra/sweeper: list}, _self_]
hydra:
  mode: MULTIRUN
  sweeper:
    params: {trainer.max_epochs: 1, +trainer.limit_train_batches: 3}
    jobs: [norm=batch optimizer.lr=0.1, "norm=layer 'model.width=8' seed=1,2"]
""")
    assert main(["sweep", "mine", "--dry-run"]) == 0
    assert "3 jobs: 3 runs" in capsys.readouterr().out
    assert main(["sweep", "mine"]) == 0
    assert "[3/3" in capsys.readouterr().out
    configs = [yaml.safe_load(path.read_text()) for path in project.glob("outputs/mine/*/config.yaml")]
    found = sorted(
        (c["job"]["choices"]["norm"], c["optimizer"]["lr"], c["model"]["width"], c["seed"]) for c in configs
    )
    assert [job[:1] + job[2:] for job in found] == [("batch", 128, 0), ("layer", 8, 1), ("layer", 8, 2)]
    assert found[0][1] == 0.1
    assert main(["sweep", "mine", "seed=2"]) == 0  # the command line wins
    output = capsys.readouterr().out
    assert output.count("done before, skipped") == 1 or "[2/2" in output
    assert main(["sweep", "mine", "hydra.sweeper.jobs=[]"]) == 2
    assert "the list has no jobs" in capsys.readouterr().err


def test_without_the_plugin_a_search_says_how_to_get_it(project: Path) -> None:
    program = (
        "import sys; sys.modules['hydra_plugins.hydra_optuna_sweeper'] = None; from bnlight.cli import main; "
        "sys.exit(main(['sweep', 'search']))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "pip install 'bnlight[optuna]'" in done.stderr
    assert not Path("outputs").exists()


def test_each_sweep_is_listed_with_what_it_asks(
    ours: Path, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "sweeps" / "norms.yaml").write_text("# Mine?\ndefaults: [train, _self_]\n")
    assert main(["sweep", "--help"]) == 0
    listed = capsys.readouterr().err
    assert "ours       Which learning rate?" in listed
    assert "norms      Mine?" in listed
    for name in ("search", "random", "list"):
        assert re.search(rf"^  {name} +Which|^  {name} +How", listed, re.MULTILINE)


RELEASE_CANDIDATE = os.environ.get("BNLIGHT_TEST_HYDRA_14")


@pytest.mark.skipif(
    not RELEASE_CANDIDATE,
    reason="BNLIGHT_TEST_HYDRA_14 names no folder made by pip install --pre --no-deps --target FOLDER "
    "hydra-core==1.4.0rc3 hydra-optuna-sweeper==1.4.0rc3 'omegaconf>=2.4.1rc1' 'optuna>=4.9,<6'",
)
def test_a_search_works_with_hydras_release_candidate_and_its_sweeper() -> None:
    one = f"{__file__}::{test_failed_diverged_and_stopped_trials_do_not_end_a_search.__name__}"
    environment = os.environ | {"PYTHONPATH": str(RELEASE_CANDIDATE)}
    version = [sys.executable, "-c", "import hydra, optuna; print(hydra.__version__, optuna.__version__)"]
    said = subprocess.run(version, env=environment, capture_output=True, text=True, check=True).stdout
    assert said.startswith("1.4")
    subprocess.run([sys.executable, "-m", "pytest", "-q", one], env=environment, cwd=ROOT, check=True)
