"""Killed and resumed jobs offline: their W&B pieces in order, their metrics complete, the commands that upload them."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from conftest import SMALL
from wandb_file import records
from wandb_server import serving

from bnlight.cli import main
from bnlight.run.tracking.offline import command, find_runs
from bnlight.run.tracking.pieces import pieces

# A norm that kills its process without a word, at the numbers of training forwards that KILL_AT lists.
KILLING = """
import os, signal, time
from bnlight.norm import BatchNorm

seen = 0

class Norm(BatchNorm):
    def forward(self, x, mask=None):
        global seen
        seen += self.training
        if seen == int(os.environ.get("KILL_AT", "0")):
            time.sleep(2.5)  # W&B writes once a second
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x, mask)
"""
STEPS = ["trainer.max_epochs=2", "+trainer.limit_train_batches=10", "trainer.log_every_n_steps=1"]
TRACKED = [*(argument for argument in SMALL if "max_epochs" not in argument), *STEPS, "logger=wandb"]
KILLED = [*TRACKED, "norm=custom", "norm._target_=mine.Norm", "checkpoint_every=3"]

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def killed_twice(project: Path, bnlight: Command) -> Path:
    """A job of 20 steps, killed in the middle of both epochs, then finished: its directory."""
    (project / "mine.py").write_text(KILLING)
    for kill_at, code in (("6", -9), ("9", -9), ("0", 0)):
        done = bnlight("train", *KILLED, KILL_AT=kill_at)
        assert done.returncode == code, done.stderr
    (job,) = (path.parent for path in project.glob("outputs/train/*/status.json"))
    return job


def history(piece: Path) -> list[dict[str, float]]:
    """The rows of a piece, read by the tests' own reader."""
    (file,) = piece.glob("*.wandb")
    rows = [record.history for record in records(file) if record.WhichOneof("record_type") == "history"]
    return [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in row.item}
        for row in rows
    ]


def test_a_job_that_was_killed_twice_has_every_step_in_order_and_one_run(
    killed_twice: Path, bnlight: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    job = killed_twice
    with (job / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    last = {int(row["step"]): row for row in rows if row["train/loss"]}  # the last attempt of each step
    assert sorted(last) == list(range(1, 21))
    assert {row["attempt"] for row in rows} == {"1", "2", "3"}
    for attempt in "123":
        steps = [int(row["step"]) for row in rows if row["attempt"] == attempt and row["train/loss"]]
        assert steps == sorted(set(steps))

    found = pieces(job)
    config = yaml.safe_load((job / "config.yaml").read_text())
    assert [piece.exit_code for piece in found] == [None, None, 0]
    assert len({piece.run_id for piece in found}) == 1
    assert [piece.started for piece in found] == sorted(piece.started for piece in found)
    for piece in found:
        assert piece.config["model"] == config["model"]
        assert piece.config["seed"] == config["seed"]
        assert piece.config["job"]["identity"] == config["job"]["identity"]
    wandb_steps = [row["_step"] for piece in found for row in history(piece.directory)]
    assert wandb_steps == sorted(set(wandb_steps))
    for metric in ("train/loss", "val/accuracy"):
        rows_of = [row for piece in found for row in history(piece.directory) if metric in row]
        at = [row["trainer/global_step"] for row in rows_of]
        assert at == sorted(set(at))
        assert at == (list(range(1, 21)) if metric == "train/loss" else [10, 20])

    assert main(["wandb", "ls", "outputs"]) == 0
    said = capsys.readouterr().out
    assert f"{found[0].run_id}  {job.name}  done" in said
    places = [
        said.index(f"wandb sync outputs/train/{job.name}/wandb/{piece.directory.name}\n") for piece in found
    ]
    assert places == sorted(places)
    assert "3 pieces to upload" in said
    assert main(["wandb", "sync", "outputs", "--dry-run"]) == 0
    commands = capsys.readouterr().out.splitlines()
    with serving() as server:
        there = {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": server.url}
        done = bnlight("wandb", "sync", "outputs", **there)
        assert done.returncode == 0, done.stderr
        assert {path.name for path in Path.cwd().iterdir()} <= {"mine.py", "__pycache__", "outputs"}
        assert {*server.begun} == {found[0].run_id}
        (received,) = server.history.values()
        losses = [row["trainer/global_step"] for _, row in sorted(received.items()) if "train/loss" in row]
        assert losses == list(range(1, 21))
        again = bnlight("wandb", "sync", "outputs", **there)
        assert (again.returncode, again.stdout) == (0, "no W&B run waits for its upload\n")
    assert [Path(line.split()[-1]).name for line in commands] == [piece.directory.name for piece in found]


@pytest.mark.parametrize(
    "launcher", [["-m", "bnlight"], ["-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "bnlight"]]
)
def test_a_job_has_one_run_and_nothing_lies_outside_of_its_directory(
    project: Path, launcher: list[str]
) -> None:
    ranks = ["trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu"] if len(launcher) > 2 else []
    homes = {name: project / name.lower() for name in ("HOME", "TMPDIR")}
    for folder in homes.values():
        folder.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("XDG_")}
    train = [sys.executable, *launcher, "train", *TRACKED, *ranks]
    done = subprocess.run(
        train, env=environment | {name: str(folder) for name, folder in homes.items()},
        capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    left = [path for folder in homes.values() for path in folder.rglob("*") if path.is_file()]
    assert not left
    assert {path.name for path in project.iterdir()} == {"home", "tmpdir", "outputs"}
    (run,) = find_runs([project])
    (piece,) = run.pieces
    job = project / "outputs" / "train" / run.job
    config = yaml.safe_load((job / "config.yaml").read_text())
    assert (run.state, piece.exit_code, piece.run_id) == (
        "done",
        0,
        json.loads((job / "status.json").read_text())["wandb_id"],
    )
    assert {key: piece.config[key] for key in config if key != "norm"} == {
        k: v for k, v in config.items() if k != "norm"
    }
    assert piece.config["norm"] == config["norm"] | {"name": "batch"}
    assert "torch==" in (piece.directory / "files" / "requirements.txt").read_text()


def test_what_cannot_be_uploaded_is_named(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["train", *TRACKED]) == 0
    (run,) = find_runs([project / "outputs"])
    (whole,) = run.pieces
    wandb = whole.directory.parent
    monkeypatch.setenv("NETRC", str(project / "netrc"))
    assert main(["wandb", "sync", "outputs"]) == 2  # nobody is asked over the network
    assert "WANDB_API_KEY" in capsys.readouterr().err

    begun = wandb / f"offline-run-20200101_000000-{run.run_id}"  # killed before W&B had written anything
    begun.mkdir()
    (begun / f"run-{run.run_id}.wandb").write_bytes(next(whole.directory.glob("*.wandb")).read_bytes()[:7])
    assert main(["wandb", "sync", "outputs", "--dry-run"]) == 1
    said = capsys.readouterr()
    assert said.out.splitlines() == [f"wandb sync outputs/train/{run.job}/wandb/{whole.directory.name}"]
    assert f"{begun.name}: run-{run.run_id}.wandb (7 bytes) names no run" in said.err

    again = wandb / f"offline-run-20300101_000000-{run.run_id}"  # as stock W&B resumes: from step 0
    shutil.copytree(whole.directory, again)
    assert main(["wandb", "sync", "outputs", "--dry-run"]) == 1
    said = capsys.readouterr()
    assert not said.out
    assert "overlap those of" in said.err
    (whole.directory / f"run-{run.run_id}.wandb.synced").touch()
    shutil.rmtree(again)
    assert main(["wandb", "ls", "outputs"]) == 0
    assert "0 pieces to upload" in capsys.readouterr().out


def test_an_upload_that_fails_says_so_where_wandb_itself_leaves_with_0(
    bnlight: Command, project: Path
) -> None:
    assert main(["train", *TRACKED]) == 0
    (run,) = find_runs([project / "outputs"])
    (piece,) = run.pieces
    with serving() as server:
        server.refuses = True
        there = {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": server.url}
        stock = subprocess.run(
            [sys.executable, "-m", *command(piece)], env=os.environ | there, capture_output=True, check=False
        )
        assert stock.returncode == 0
        done = bnlight("wandb", "sync", "outputs", **there)
        assert done.returncode == 1
        assert f"{piece.directory.name}: `wandb sync` left with" in done.stderr
    gone = bnlight("wandb", "sync", "outputs", **there, timeout=30)
    assert gone.returncode == 2
    assert "cannot be reached" in gone.stderr


def test_stock_pieces_of_one_run_start_at_step_0_again(project: Path) -> None:
    script = """
import wandb
quiet = wandb.Settings(console="off", silent=True)
for _ in range(2):
    with wandb.init(mode="offline", id="stock", resume="allow", settings=quiet) as run:
        run.log({"loss": 1})
        run.log({"loss": 2})
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
    (run,) = find_runs([project])
    assert [(piece.first, piece.last) for piece in run.pieces] == [(0, 1), (0, 1)]
    assert "overlap" in run.problems()[0]


def test_a_file_that_is_cut_off_anywhere_is_read_up_to_there(project: Path) -> None:
    assert main(["train", *TRACKED]) == 0
    (run,) = find_runs([project / "outputs"])
    (piece,) = run.pieces
    (file,) = piece.directory.glob("*.wandb")
    data, steps = file.read_bytes(), []
    for length in range(0, len(data), 97):
        file.write_bytes(data[:length])
        (cut,) = pieces(piece.directory.parent.parent)
        assert cut.broken or cut.run_id == run.run_id
        steps.append(-1 if cut.last is None else cut.last)
    assert steps == sorted(steps)
    assert steps[-1] == piece.last
    assert steps[0] == -1
