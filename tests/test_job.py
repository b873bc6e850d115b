"""One job: its directory, its identity, and what happens when it is started again."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import SMALL

from bnlight.cli import main
from bnlight.lightning import Classifier
from bnlight.run.status import own, read_status, update_status


def only_job(project: Path, sweep: str = "train") -> Path:
    (job,) = (path for path in (project / "outputs" / sweep).iterdir() if path.is_dir())
    return job


def read(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text())
    return value


def test_a_job_leaves_everything_in_its_directory(project: Path) -> None:
    assert main(["train", *SMALL, "norm=renorm", "trainer.max_epochs=2", "seed=3"]) == 0
    job = only_job(project)
    assert job.name.startswith("renorm-mlp-digits-s3-")
    assert {path.name for path in project.iterdir()} == {"outputs"}
    assert {path.name for path in job.iterdir() if not path.name.startswith(".")} == {
        "config.yaml", "status.json", "result.json", "metrics.csv", "job.log", "checkpoints",
    }  # fmt: skip
    config = yaml.safe_load((job / "config.yaml").read_text())
    assert config["norm"]["_target_"] == "bnlight.norm.BatchRenorm"
    assert config["job"]["choices"]["norm"] == "renorm"
    assert config["job"]["identity"].startswith(job.name.rsplit("-", 1)[1])
    assert "${" not in (job / "config.yaml").read_text()
    status = read_status(job)
    assert (status["state"], status["attempt"], status["traceback"]) == ("done", 1, None)
    result = read(job / "result.json")
    assert result["world_size"] == 1
    assert {"train/loss", "val/loss", "val/accuracy", "test/accuracy"} <= result["metrics"].keys()
    with (job / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:4] == ["attempt", "step", "epoch", "time"]
    validated = [int(row["step"]) for row in rows if row["val/accuracy"]]
    assert validated == [result["steps"] // 2, result["steps"]]
    timed = [float(row["train/seconds_per_step"]) for row in rows if row["train/seconds_per_step"]]
    assert len(timed) == 2
    assert all(value > 0 for value in timed)


def test_checkpoints_load_without_pickled_objects_and_without_arguments(project: Path) -> None:
    main(["train", *SMALL, "norm=renorm"])
    for name in ("best", "last"):
        path = only_job(project) / "checkpoints" / f"{name}.ckpt"
        torch.load(path, weights_only=True)
        module = Classifier.load_from_checkpoint(path).eval()
        assert type(module.model).__name__ == "MLP"
        assert module(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_the_reported_test_accuracy_is_that_of_the_best_checkpoint(project: Path) -> None:
    from bnlight.data import Digits

    main(["train", *SMALL, "trainer.max_epochs=3"])
    module = Classifier.load_from_checkpoint(only_job(project) / "checkpoints" / "best.ckpt").eval()
    data = Digits()
    data.prepare_data()
    data.setup("test")
    with torch.no_grad():
        batches = [(module(x).argmax(1) == y).float() for x, y in data.test_dataloader()]
    expected = read(only_job(project) / "result.json")["metrics"]["test/accuracy"]
    assert torch.cat(batches).mean().item() == pytest.approx(expected, abs=1e-6)


def test_a_finished_job_is_not_touched_again(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["train", *SMALL])
    job = only_job(project)
    before = {path: path.stat().st_mtime_ns for path in job.rglob("*")}
    assert main(["train", *SMALL, "progress=off", "logger.project=other", "logger=wandb"]) == 0
    assert "done before, skipped" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in job.rglob("*")} == before


def test_force_starts_again_from_nothing(project: Path) -> None:
    main(["train", *SMALL])
    job = only_job(project)
    (job / "checkpoints" / "last.ckpt").write_bytes(b"broken")
    assert main(["train", *SMALL, "--force"]) == 0
    assert read_status(job)["attempt"] == 1
    torch.load(job / "checkpoints" / "last.ckpt", weights_only=True)


def test_identity_is_what_is_trained_not_where_or_how_it_is_shown(project: Path) -> None:
    same = [[], ["paths.outputs=elsewhere"], ["paths.data=/data", "progress=off"]]
    for arguments in same:
        main(["train", *SMALL, *arguments])
    other = [["seed=1"], ["norm.eps=0.1"], ["data.split_seed=1"], ["trainer.max_epochs=2"]]
    for arguments in other:
        main(["train", *SMALL, *arguments])
    names = {path.parent.name for path in project.glob("**/status.json")}
    assert len(names) == 1 + len(other)


def test_a_failure_is_recorded_and_runs_again_only_on_request(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "mine.py").write_text("def Net(norm):\n    raise RuntimeError('the weights are missing')\n")
    arguments = ["train", *SMALL[2:], "model=custom", "model._target_=mine.Net"]
    arguments = [argument for argument in arguments if not argument.startswith("model.depth")]
    assert main(arguments) == 1
    job = only_job(project)
    assert read_status(job)["state"] == "failed"
    assert "RuntimeError: the weights are missing" in read_status(job)["traceback"]
    assert "RuntimeError: the weights are missing" in (job / "job.log").read_text()
    assert "the weights are missing" in capsys.readouterr().out
    assert main(arguments) == 1
    assert "--retry-failed" in capsys.readouterr().out
    assert read_status(job)["attempt"] == 1
    main([*arguments, "--retry-failed"])
    assert read_status(job)["attempt"] == 2


def test_a_killed_job_reads_as_interrupted_and_continues(project: Path) -> None:
    arguments = [*SMALL, "trainer.max_epochs=60", "logger=wandb"]
    process = subprocess.Popen(
        [sys.executable, "-m", "bnlight", "train", *arguments], stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        done = list(project.glob("outputs/train/*/status.json"))
        if done and json.loads(done[0].read_text()).get("epoch", 0) >= 3:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    job = only_job(project)
    assert json.loads((job / "status.json").read_text())["state"] == "running"
    killed = read_status(job)
    assert killed["state"] == "interrupted"
    assert main(["train", *arguments]) == 0
    status = read_status(job)
    assert (status["state"], status["attempt"]) == ("done", 2)
    assert status["wandb_id"] == killed["wandb_id"]
    with (job / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["val/loss"]]
    resumed = [int(row["epoch"]) for row in rows if row["attempt"] == "2"]
    reached = max(int(row["epoch"]) for row in rows if row["attempt"] == "1")
    assert resumed[0] in (reached, reached + 1)  # killed before, or after, the epoch's checkpoint was written
    assert resumed[-1] == 59


def test_a_job_owned_by_a_living_process_is_left_to_it(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["train", *SMALL])
    job = only_job(project)
    with own(job):
        update_status(job, state="running", host=os.uname().nodename)
        assert main(["train", *SMALL]) == 0
        assert "is being run by process" in capsys.readouterr().out
        assert read_status(job)["state"] == "running"
    assert read_status(job)["state"] == "interrupted"


def test_two_configs_never_share_a_directory(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["train", *SMALL, "hydra.run.dir=outputs/one"])
    before = (project / "outputs" / "one" / "config.yaml").read_text()
    assert main(["train", *SMALL, "seed=1", "hydra.run.dir=outputs/one"]) == 1
    assert "different jobs never share a directory" in capsys.readouterr().out
    assert (project / "outputs" / "one" / "config.yaml").read_text() == before


def test_an_unreadable_status_costs_one_job_and_not_the_sweep(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["train", *SMALL])
    (only_job(project) / "status.json").write_text("garbage")
    assert main(["train", "-m", *SMALL, "seed=0,1"]) == 1
    output = capsys.readouterr().out
    assert "not valid JSON" in output
    assert "2 jobs, 1 done" in output

    assert main(["train", "-m", *SMALL, "seed=0,1", "--dry-run"]) == 0
    assert "unreadable, fails" in capsys.readouterr().out
    assert (
        main(["train", "-m", *SMALL, "seed=0,1", "hydra/launcher=parallel", "hydra.launcher.n_jobs=1"]) == 1
    )
    assert "2 jobs, 1 done" in capsys.readouterr().out


def test_a_diverged_job_is_a_result_of_its_own_kind(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", "-m", *SMALL, "norm=none", "optimizer.lr=1e30,0.1", "trainer.log_every_n_steps=5"]
    assert main([*arguments, "trainer.max_epochs=3"]) == 0
    output = capsys.readouterr().out
    assert "diverged (the training loss is nan at step 5)" in output
    assert "1 diverged" in output
    states = {
        path.parent.name: read_status(path.parent) for path in project.glob("outputs/train/*/status.json")
    }
    (diverged,) = (name for name, status in states.items() if status["state"] == "diverged")
    assert sorted(status["state"] for status in states.values()) == ["diverged", "done"]
    result = read(project / "outputs" / "train" / diverged / "result.json")
    assert result["metrics"]["train/loss"] is None
    assert "test/accuracy" not in result["metrics"]
    assert result["steps"] < 20
    assert main([*arguments, "trainer.max_epochs=3"]) == 0
    assert "diverged before, skipped" in capsys.readouterr().out


def test_the_last_checkpoint_is_of_the_last_epoch_also_when_nothing_gets_better(project: Path) -> None:
    main(["train", *SMALL, "norm=none", "optimizer.lr=0.0", "trainer.max_epochs=3"])
    folder = only_job(project) / "checkpoints"
    epochs = {
        name: torch.load(folder / f"{name}.ckpt", weights_only=True)["epoch"] for name in ("best", "last")
    }
    assert epochs == {"best": 0, "last": 3}  # the last is written when all three have passed


def test_a_moved_job_still_knows_its_best_checkpoint_when_it_resumes(project: Path) -> None:
    # The first attempt dies in its third epoch; the second sees wrong validation labels, so it cannot do better.
    (project / "mine.py").write_text(
        """
import os
from bnlight.data import Digits

class Data(Digits):
    def setup(self, stage):
        super().setup(stage)
        if os.environ.get("SPOILED"):
            x, y = self._splits["val"]
            self._splits["val"] = x, (y + 1) % 10
"""
    )
    arguments = [*SMALL, "data=custom", "data._target_=mine.Data", "trainer.max_epochs=3"]
    script = (
        "import sys, os; from bnlight.cli import main; import pytorch_lightning as pl\n"
        "def die(self, trainer, module):\n"
        "    if trainer.current_epoch == 2: os._exit(9)\n"
        "pl.Callback.on_train_epoch_start = die\n"
        f"main(['train', *{arguments!r}])"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 9
    best = torch.load(only_job(project) / "checkpoints" / "best.ckpt", weights_only=True)
    (project / "outputs").rename(project / "moved")
    spoiled = os.environ | {"SPOILED": "1"}
    command = [sys.executable, "-m", "bnlight", "train", *arguments, "paths.outputs=moved"]
    subprocess.run(command, check=True, env=spoiled, stdout=subprocess.DEVNULL)
    (job,) = (project / "moved" / "train").iterdir()
    assert torch.load(job / "checkpoints" / "best.ckpt", weights_only=True)["epoch"] == best["epoch"]
    result = read(job / "result.json")["metrics"]
    assert result["val/accuracy"] == best["metrics"]["val/accuracy"]
    assert read_status(job)["attempt"] == 2


@pytest.mark.parametrize("typo", ["progress=loud", "rerun=yes", "progress=null"])
def test_a_wrong_word_beside_the_job_does_not_touch_it(
    project: Path, capsys: pytest.CaptureFixture[str], typo: str
) -> None:
    assert main(["train", *SMALL, typo]) == 2
    assert "choose one of" in capsys.readouterr().err
    assert not list(project.glob("**/status.json"))


def test_an_error_is_told_whole(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *SMALL, "data=mnist", "data.url=http://127.0.0.1:9/"]) == 1
    output = capsys.readouterr().out
    assert str(Path("data") / "mnist") in output
    assert "train-images-idx3-ubyte" in output
    assert "while building" not in output
    assert read_status(only_job(project))["error"] in output


def test_without_checkpoints_none_are_written(project: Path) -> None:
    assert main(["train", *SMALL, "callbacks.best=null", "callbacks.last=null"]) == 0
    assert not list(project.glob("**/*.ckpt"))


def test_losses_are_logged_in_full_precision_in_a_half_precision_model(project: Path) -> None:
    main(["train", *SMALL, "trainer.precision=bf16-true", "trainer.log_every_n_steps=1000"])
    with (only_job(project) / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    for name in ("train/loss", "val/loss"):
        (value,) = (float(row[name]) for row in rows if row[name])
        assert value != torch.tensor(value).bfloat16().item()


def test_own_classes_are_used_from_the_working_directory(project: Path) -> None:
    (project / "mine.py").write_text(
        """
from torch import nn
from bnlight.data import Digits

class Data(Digits):
    pass

class Norm(nn.Module):
    def __init__(self, channels, scale=1.0):
        super().__init__()
        self.inner, self.scale = nn.BatchNorm1d(channels), scale

    def forward(self, x):
        return self.inner(x) * self.scale

class Net(nn.Module):
    def __init__(self, norm, num_classes):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), norm(8), nn.ReLU(), nn.Linear(8, num_classes))

    def forward(self, x):
        return self.layers(x)
"""
    )
    arguments = [
        "trainer=cpu",
        "trainer.max_epochs=1",
        "logger=csv",
        "data=custom",
        "data._target_=mine.Data",
    ]
    arguments += [
        "model=custom",
        "model._target_=mine.Net",
        "norm=custom",
        "norm._target_=mine.Norm",
        "+norm.scale=0.5",
    ]
    assert main(["train", *arguments]) == 0
    job = only_job(project)
    assert job.name.startswith("Norm-Net-Data-s0-")
    module = Classifier.load_from_checkpoint(job / "checkpoints" / "best.ckpt")
    assert module.model.layers[2].scale == 0.5


def test_a_model_that_takes_no_norm_is_refused(project: Path) -> None:
    arguments = ["trainer=cpu", "logger=csv", "model=custom", "model._target_=torch.nn.Flatten"]
    assert main(["train", *arguments]) == 1
    trace = read_status(only_job(project))["traceback"]
    assert "takes no argument `norm`" in trace
    assert "norm(channels)" in trace


def test_a_job_leaves_nothing_behind_in_its_process(project: Path) -> None:
    environment, state, threads = dict(os.environ), torch.get_rng_state(), torch.get_num_threads()
    handlers = [signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)]
    assert main(["train", *SMALL, "trainer=ddp", "trainer.devices=1", "trainer.deterministic=true"]) == 0
    assert dict(os.environ) == environment
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.deterministic
    assert not torch.distributed.is_initialized()
    assert [signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(project: Path) -> None:
    for directory, seed in (("a", 1), ("b", 1), ("c", 2)):
        main(["train", *SMALL, f"seed={seed}", f"paths.outputs={directory}"])
    a, b, c = (read(next((project / name).glob("train/*/result.json")))["metrics"] for name in "abc")
    assert a == b
    assert a["train/loss"] != c["train/loss"]


@pytest.mark.parametrize(
    "name", ["callbacks=early_stopping", "optimizer=adamw", "optimizer=rmsprop", "scheduler=none"]
)
def test_options_of_the_recipe_train(project: Path, name: str) -> None:
    assert main(["train", *SMALL, name, "trainer.gradient_clip_val=1.0"]) == 0


@pytest.mark.parametrize("option", ["scheduler=onecycle", "scheduler=linear", "scheduler=cosine"])
def test_a_schedule_ends_at_the_last_step(project: Path, option: str) -> None:
    main(["train", *SMALL, option, "trainer.log_every_n_steps=1"])
    with (only_job(project) / "metrics.csv").open() as file:
        rates = [float(row["train/lr"]) for row in csv.DictReader(file) if row["train/lr"]]
    assert rates[-1] < 0.06 * max(rates)
