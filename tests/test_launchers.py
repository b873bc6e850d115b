"""Sweeps of several jobs at a time on one machine: hydra/launcher=parallel, local and ray_local."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml
from conftest import SMALL, until
from four_jobs import MINE, OWN, RANKS, Command, check_four_jobs, inside, seen

from bnlight.cli import main
from bnlight.run.launch.launchers import EXTRAS
from bnlight.run.status import read_status

Start = Callable[..., subprocess.Popen[str]]
assert inside  # a fixture
no_ray = pytest.mark.skipif(
    not importlib.util.find_spec("ray"), reason="no ray here (80 MB): pip install ray"
)
ray = pytest.param("ray_local", marks=no_ray)
local = pytest.param("local", marks=pytest.mark.slow)  # as `slurm` does


@pytest.mark.parametrize("launcher", ["parallel", local, ray])
def test_four_jobs_with_one_and_two_ranks(
    project: Path, bnlight: Command, inside: Command, launcher: str
) -> None:
    check_four_jobs(project, bnlight, inside, f"hydra/launcher={launcher}")


def test_a_task_per_rank_without_a_cluster(project: Path, inside: Command) -> None:
    (project / "mine.py").write_text(MINE)
    launcher = ["hydra/launcher=local", "hydra.launcher.tasks_per_node=2"]
    sweep = [*SMALL, *OWN, *RANKS, "trainer.devices=2", "+norm.fails=false,true"]
    done = inside("train", "-m", *sweep, *launcher)
    assert done.returncode == 1, done.stderr
    assert "2 jobs, 1 done, 1 failed" in done.stdout
    assert sorted(place[1:] for place in seen(project)) == [(0, 2), (0, 2), (1, 2), (1, 2)]
    states = {
        read_status(path.parent)["state"]: path.parent for path in project.glob("outputs/train/*/config.yaml")
    }
    assert "rank 1: RuntimeError: as asked on rank 1" in read_status(states["failed"])["error"]


def test_a_jobs_process_that_dies_is_one_failed_job(project: Path, inside: Command) -> None:
    (project / "mine.py").write_text(
        "import os\nfrom bnlight.data import Digits\n\nclass Data(Digits):\n    def setup(self, stage):\n"
        "        if self.seed_of_job == 1:\n            os.kill(os.getpid(), 9)\n"
        "        if self.seed_of_job == 2:\n            os._exit(7)\n        super().setup(stage)\n\n"
        "    def __init__(self, seed_of_job, **options):\n        super().__init__(**options)\n"
        "        self.seed_of_job = seed_of_job\n"
    )
    own = [*SMALL, "data=custom", "data._target_=mine.Data", "+data.seed_of_job=${seed}"]
    done = inside("train", "-m", *own, "seed=1,2,3,4", "hydra/launcher=parallel", "hydra.launcher.n_jobs=2")
    assert done.returncode == 1, done.stderr
    assert "4 jobs, 2 done, 2 failed" in done.stdout
    errors = {}
    for path in project.glob("outputs/train/*/config.yaml"):
        errors[yaml.safe_load(path.read_text())["seed"]] = read_status(path.parent).get("error")
    assert "SIGKILL" in errors[1]
    assert "out of memory" in errors[1]
    assert "exit code 7" in errors[2]
    assert errors[3] is errors[4] is None


PARALLEL = ["hydra/launcher=parallel", "hydra.launcher.n_jobs=2"]
RAY = ["hydra/launcher=ray_local", "hydra.launcher.init.num_cpus=2"]


@pytest.mark.parametrize("launcher", [PARALLEL, pytest.param(RAY, marks=no_ray)], ids=["parallel", "ray"])
def test_ctrl_c_stops_all_jobs_and_the_same_command_continues_them(
    project: Path, inside: Command, launcher: list[str]
) -> None:
    given = ["train", "-m", *SMALL, "trainer.max_epochs=60", "+trainer.limit_train_batches=3", "seed=1,2,3"]
    given += launcher
    command = [sys.executable, "-m", "bnlight", *given]
    sweep = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while (
        len(list(project.glob("outputs/train/*/checkpoints/last.ckpt"))) < 2 and time.monotonic() < deadline
    ):
        time.sleep(0.05)
    family = psutil.Process(sweep.pid).children(recursive=True)
    sweep.send_signal(signal.SIGINT)
    _, errors = sweep.communicate(timeout=60)
    assert sweep.returncode == 130
    assert "bnlight train -m" in errors
    assert not psutil.wait_procs(family, timeout=10)[1]
    stopped = [path.parent for path in project.glob("outputs/train/*/status.json")]
    assert [read_status(job)["state"] for job in stopped] == ["interrupted", "interrupted"]  # not the third
    done = inside(*given)
    assert done.returncode == 0, done.stderr
    assert "3 jobs, 3 done" in done.stdout
    statuses = {path.parent: read_status(path.parent) for path in project.glob("outputs/train/*/status.json")}
    assert {job for job, status in statuses.items() if status["attempt"] == 2} == {*stopped}
    assert [status["state"] for status in statuses.values()] == ["done"] * 3


def test_jobs_die_with_a_killed_sweep(project: Path) -> None:
    command = [sys.executable, "-m", "bnlight", "train", "-m", *SMALL, "trainer.max_epochs=1000", "seed=1,2"]
    sweep = subprocess.Popen([*command, "hydra/launcher=parallel", "hydra.launcher.n_jobs=2"])
    try:
        deadline = time.monotonic() + 120
        while len(list(project.glob("outputs/train/*/metrics.csv"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        family = psutil.Process(sweep.pid).children(recursive=True)
    finally:
        sweep.kill()
        sweep.wait()
    assert not psutil.wait_procs(family, timeout=10)[1]
    states = [read_status(path.parent)["state"] for path in project.glob("outputs/train/*/status.json")]
    assert states == ["interrupted", "interrupted"]


@pytest.mark.parametrize("begun", [False, True], ids=["as it imports", "as jobs run"])
def test_the_server_that_jobs_are_forked_from_may_be_killed(project: Path, start: Start, begun: bool) -> None:
    given = ["train", "-m", *SMALL, "trainer.max_epochs=40", "+trainer.limit_train_batches=3", "seed=1,2,3"]
    sweep = start(*given, *PARALLEL)
    servers: list[psutil.Process] = []

    def there_is_one() -> bool:
        below = psutil.Process(sweep.pid).children(recursive=True)
        servers[:] = [one for one in below if "forkserver" in " ".join(one.cmdline())]
        runs = list(project.glob("outputs/train/*/checkpoints/last.ckpt"))
        return bool(servers) and (not begun or bool(runs))

    until(there_is_one)
    servers[0].kill()
    output, errors = sweep.communicate(timeout=120)
    assert sweep.returncode == 0, errors
    assert "3 jobs, 3 done" in output
    statuses = [read_status(path.parent) for path in project.glob("outputs/train/*/status.json")]
    assert [status["attempt"] for status in statuses] == [1, 1, 1]


@pytest.mark.parametrize(
    ("package", "preset"), [("submitit", "slurm"), ("submitit", "local"), ("ray", "ray_local")]
)
def test_a_preset_without_its_package_says_what_to_install(
    project: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    package: str,
    preset: str,
) -> None:
    find: Callable[..., object] = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: None if name == package else find(name, *rest)
    )
    assert main(["train", "-m", *SMALL, "seed=1,2", f"hydra/launcher={preset}"]) == 2
    assert (
        capsys.readouterr()
        .err.strip()
        .endswith(f"hydra/launcher={preset} needs {package}: pip install 'bnlight[{EXTRAS[package]}]'")
    )


def test_a_wrong_number_of_tasks_is_refused_before_anything_waits_in_a_queue(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    launcher = ["hydra/launcher=local", "hydra.launcher.tasks_per_node=3"]
    assert main(["train", "-m", *SMALL, *RANKS, "trainer.devices=2", *launcher]) == 2
    assert "hydra.launcher.tasks_per_node=3" in (said := capsys.readouterr().err)
    assert "trainer.devices=2 x trainer.num_nodes=1 wants 2 ranks" in said


def test_serial_is_hydras_own(project: Path) -> None:
    assert main(["train", "-m", *SMALL, "seed=1", "hydra/launcher=serial"]) == 0
    assert len(list(project.glob("outputs/train/*/result.json"))) == 1
    assert os.environ.get("OMP_NUM_THREADS") == "1"
