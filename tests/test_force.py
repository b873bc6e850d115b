"""`--force` runs each job again once, also where the sweep's worker dies meanwhile."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import SMALL

from bnlight.cli import main
from bnlight.run.status import read_status
from bnlight.run.survive.command import command, note, of_this_command, this_command, unfinished

Command = Callable[..., subprocess.CompletedProcess[str]]

# Data that note whose they are, and kill their process where the test wants it: in the training, or when the job
# is done and recorded.
MINE = """
import os, pathlib, signal
from threading import Thread
from bnlight.data import Digits

def kill_when_done(status):
    while '"done"' not in status.read_text():
        pass
    os.kill(os.getpid(), signal.SIGKILL)

class Data(Digits):
    def __init__(self, of_seed, **options):
        super().__init__(**options)
        self.of_seed = of_seed

    def setup(self, stage):
        if stage == "fit":
            with open("trained", "a") as file:
                print(self.of_seed, file=file)
            if pathlib.Path(f"kill-{self.of_seed}").exists():
                os.kill(os.getpid(), signal.SIGKILL)
            if pathlib.Path(f"kill-after-{self.of_seed}").exists():
                status = pathlib.Path(self.trainer.default_root_dir, "status.json")
                Thread(target=kill_when_done, args=[status], daemon=True).start()
        super().setup(stage)
"""
SWEEP = ["train", "-m", *SMALL, "progress=off", "+trainer.limit_train_batches=2", "seed=0,1,2,3",
         "data=custom", "data._target_=mine.Data", "+data.of_seed=${seed}"]  # fmt: skip
PARALLEL = ["hydra/launcher=parallel", "hydra.launcher.n_jobs=2"]


@pytest.mark.parametrize(
    "launcher", [[], pytest.param(PARALLEL, marks=pytest.mark.slow)], ids=["serial", "parallel"]
)
def test_a_forced_sweep_runs_each_job_once_though_workers_die(
    project: Path, bnlight: Command, launcher: list[str]
) -> None:
    (project / "mine.py").write_text(MINE)
    assert main(SWEEP) == 0
    (project / "kill-1").touch()
    (project / "kill-after-2").touch()
    done = bnlight(*SWEEP, "--force", *launcher)
    assert done.returncode == 1, done.stderr
    assert trained(project) == dict.fromkeys("0123", 2)
    assert states(project) == {0: "done", 1: "failed", 2: "done", 3: "done"}
    assert "4 jobs, 3 done, 1 failed" in done.stdout
    assert done.stdout.count("A new worker takes the rest") == (0 if launcher else 2)
    for path in project.glob("outputs/train/*/status.json"):
        assert read_status(path.parent)["attempt"] == 1  # begun anew

    (project / "kill-1").unlink()
    assert main([*SWEEP, "--retry-failed"]) == 0
    assert trained(project) == {"0": 2, "1": 3, "2": 2, "3": 2}


def test_a_job_that_is_killed_while_it_is_being_wiped_begins_anew(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project / "mine.py").write_text(MINE)
    job = [*SWEEP[2:-4], "seed=0", *SWEEP[-3:]]
    assert main(["train", *job]) == 0
    (status,) = project.glob("outputs/train/*/status.json")
    before = read_status(status.parent)

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        assert main(["train", *job, "--force"]) == 130
    assert main(["train", *job]) == 0  # the command that the stopped one has named
    assert trained(project) == {"0": 2}
    after = read_status(status.parent)
    assert after["state"] == "done"
    assert after["wandb_id"] != before["wandb_id"]
    assert (
        after["attempt"] == before["attempt"] + 1
    )  # so whoever reads metrics.csv passes over what was there


def test_the_clock_does_not_decide_what_a_command_has_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BNLIGHT_SINCE", repr(time.time()))
    hour = 3600.0
    mine = {"command": this_command(), "started": time.time() - hour}  # it was set back in between
    assert of_this_command(mine)
    assert of_this_command({"command": "another", "started": time.time()})  # in another terminal
    assert not of_this_command({"command": "earlier", "started": time.time() - hour})
    assert not of_this_command(
        {"command": "earlier", "started": time.time() + hour}
    )  # it has been set back since


def test_a_line_of_the_journal_that_is_not_whole_stops_nobody(tmp_path: Path) -> None:
    with command() as file:
        note("begun", tmp_path / "one")
        note("begun", tmp_path / "two")
        with file.open("a") as more:
            more.write('{"event": "begun", "pid": 7')
        note("ended", tmp_path / "three")  # behind it
        note("ended", tmp_path / "one")
        assert [entry["job"] for entry in unfinished()] == [str(tmp_path / "two")]


def trained(project: Path) -> dict[str, int]:
    return dict(Counter(sorted((project / "trained").read_text().split())))


def states(project: Path) -> dict[int, str]:
    jobs = [path.parent for path in project.glob("outputs/train/*/status.json")]
    return {
        yaml.safe_load((job / "config.yaml").read_text())["seed"]: read_status(job)["state"] for job in jobs
    }
