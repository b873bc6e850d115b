"""Runs read from what W&B has: its offline files alone, and a stand-in of its server that its client has filled."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
import wandb
from conftest import SMALL
from test_compare_builder import WITHOUT, write_offline_run
from wandb_server import Server, serving

from bnlight.compare import Runs, compare, read_runs
from bnlight.compare.read import online
from bnlight.compare.read.tracked import Tracked, run_of

TRACKED = [*(argument for argument in SMALL if "max_epochs" not in argument), "trainer.max_epochs=2"]
SWEEP = [*TRACKED, "logger=wandb", "trainer.log_every_n_steps=5", "norm=batch,none", "optimizer.lr=0.1,1e9"]
ELSEWHERE = {"path", "log", "wandb", "source", "url"}  # where a run is, which differs
UNKNOWN = {"heartbeat", "epochs", "versions", "hardware"}  # measured by the job itself

# What others log: names, steps and settings of their own, and things that are no metrics.
FOREIGN = """
import sys, wandb
quiet = wandb.Settings(console="off", silent=True)
for piece in (1, 2):  # stock W&B begins at step 0 again
    config = {"norm": "batch", "seed": 3, "lr": 0.5, "batch_size": 16, "betas": [0.9, 0.99]}
    with wandb.init(mode="offline", id="twice", name="mine", config=config, settings=quiet) as run:
        for step in range(3):
            run.log({"loss": 10.0 * piece + step, "note": "a word", "weights": wandb.Histogram([1, 2, 3])})
        run.summary["flops"] = 1e9
with wandb.init(mode="offline", id="named", name="named", config={"norm": {"name": "group"}}, settings=quiet) as run:
    run.log({"val/loss": float("nan"), "trainer/global_step": 7})
with wandb.init(mode="offline", id="empty", name="empty", settings=quiet) as run:
    pass
run = wandb.init(mode="offline", id="failed", name="failed", config={"norm": "layer"}, settings=quiet)
run.log({"val/loss": 2})
run.finish(exit_code=3)
"""

STOPPING = """
import os, signal
from bnlight.data import Digits
class Data(Digits):
    def val_dataloader(self):
        os.kill(os.getpid(), signal.{})
        return super().val_dataloader()
"""


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep with W&B offline, two of its four jobs at a rate that is far too high: its directory."""
    folder = tmp_path_factory.mktemp("user")
    train = [sys.executable, "-m", "bnlight", "train", "-m", *SWEEP]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= {"WANDB_MODE": "offline"}
    subprocess.run(train, cwd=folder, env=environment, check=True, capture_output=True, timeout=180)
    return folder / "outputs" / "train"


@pytest.fixture
def only_wandb(sweep: Path, tmp_path: Path) -> Path:
    """The offline folders of the sweep's jobs, without the jobs."""
    for piece in sweep.glob("*/wandb/offline-run-*"):
        shutil.copytree(piece, tmp_path / "wandb" / piece.name)
    return tmp_path / "wandb"


@pytest.fixture
def server(project: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """W&B's server; this process has a key for it."""
    with serving() as running:
        monkeypatch.setenv("WANDB_BASE_URL", running.url)
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.setenv("WANDB_CACHE_DIR", str(project / "cache"))
        monkeypatch.setenv("WANDB_MODE", "online")
        yield running
        wandb.teardown()


def upload(folder: Path) -> None:
    command = [sys.executable, "-m", "wandb", "sync", *map(str, sorted(folder.glob("offline-run-*")))]
    subprocess.run(command, check=True, capture_output=True, timeout=120)


def assert_same_tables(jobs: Runs, tracked: Runs) -> None:
    """Everything that W&B is told is the same; `time` is when each logger had written."""
    shared = [name for name in jobs.history if name != "time"]
    assert (
        {"step", "epoch", "train/loss", "val/accuracy", "test/accuracy"}
        <= set(shared)
        <= set(tracked.history)
    )
    pd.testing.assert_frame_equal(jobs.history[shared], tracked.history[shared], check_dtype=False)
    assert (jobs.history["time"] - tracked.history["time"]).abs().max() < 1
    columns = [name for name in jobs.runs if name not in ELSEWHERE | UNKNOWN]
    assert {"state", "error", "identity", "overrides", "steps", "world_size", "val/loss"} <= set(columns)
    ours, theirs = jobs.runs[columns].sort_index(), tracked.runs[columns].sort_index()
    pd.testing.assert_frame_equal(ours, theirs, check_dtype=False, rtol=1e-6)  # results are float32
    assert list(jobs.configs.sort_index(axis=1)) == list(tracked.configs.sort_index(axis=1))
    for name in jobs.configs:
        pd.testing.assert_series_equal(
            jobs.configs[name].sort_index(), tracked.configs[name].sort_index(), check_dtype=False
        )


def test_the_offline_files_alone_give_the_tables_of_the_jobs(sweep: Path, only_wandb: Path) -> None:
    jobs, tracked = read_runs(sweep), read_runs(only_wandb)
    assert set(jobs.runs["state"]) == {"done", "diverged"}
    assert tracked.notes == []
    assert_same_tables(jobs, tracked)
    assert tracked.runs["path"].isna().all()
    ours, theirs = compare(sweep), compare(only_wandb)
    assert ours.verdict == theirs.verdict
    assert [(cell.settings, cell.metric.n) for cell in ours.cells] == [
        (cell.settings, cell.metric.n) for cell in theirs.cells
    ]


@pytest.mark.parametrize(("signal", "state"), [("SIGTERM", "preempted"), ("SIGINT", "interrupted")])
def test_a_run_that_was_stopped_has_not_failed(project: Path, signal: str, state: str) -> None:
    Path("mine.py").write_text(STOPPING.format(signal))
    job = [*TRACKED, "logger=wandb", "data=custom", "data._target_=mine.Data", "hydra.run.dir=job"]
    done = subprocess.run([sys.executable, "-m", "bnlight", "train", *job], check=False, timeout=120)
    assert done.returncode != 0
    (piece,) = Path("job/wandb").glob("offline-run-*")
    (alone,) = read_runs(piece).runs.to_dict("records")
    assert (alone["state"], alone["error"]) == (state, None)
    assert read_runs("job").runs["state"].tolist() == [state]


def test_a_file_a_folder_and_a_tree_of_folders_are_read_alike(only_wandb: Path) -> None:
    folder = sorted(only_wandb.iterdir())[0]
    (file,) = folder.glob("*.wandb")
    alone = read_runs(file)
    pd.testing.assert_frame_equal(alone.history, read_runs(folder).history)
    assert len(alone.runs) == 1
    assert len(read_runs(only_wandb).runs) == len(read_runs(only_wandb.parent).runs) == 4
    shutil.copytree(folder, only_wandb / "copies" / folder.name)
    again = read_runs(only_wandb)
    assert len(again.runs) == 4
    assert (
        again.history["directory"]
        .value_counts()
        .equals(read_runs(only_wandb).history["directory"].value_counts())
    )


def test_a_run_that_its_job_shows_too_is_counted_once(sweep: Path, only_wandb: Path) -> None:
    both = read_runs(sweep, only_wandb)
    assert both.notes == [f"{only_wandb}: 4 of its W&B runs are in {sweep} too, counted once"]
    pd.testing.assert_frame_equal(both.history, read_runs(sweep).history)
    assert both.runs["path"].notna().all()
    shutil.copytree(sorted(sweep.glob("batch*"))[0], only_wandb / "one")
    mixed = read_runs(only_wandb)
    assert len(mixed.runs) == 4
    assert mixed.runs["path"].notna().sum() == 1


def test_runs_that_bnlight_has_not_made_are_read_and_what_they_lack_is_noted(project: Path) -> None:
    subprocess.run([sys.executable, "-c", FOREIGN], check=True, timeout=120)
    read = read_runs(project)
    runs = read.runs.set_index("norm")
    row = runs.loc["batch"]
    assert (row["job"], row["seed"], row["lr"], row["batch_size"], row["flops"]) == ("mine", 3, 0.5, 16, 1e9)
    assert (row["state"], row["attempt"], row["loss"], row["steps"]) == ("done", 2, 22, 2)
    history = read.history.set_index("norm").loc["batch"]
    assert history["step"].tolist() == [0, 1, 2]
    assert history["loss"].tolist() == [20, 21, 22]
    assert "note" not in read.history
    assert (runs["state"]["group"], runs["error"]["group"]) == ("diverged", "val/loss is nan at step 7")
    assert runs["state"]["layer"] == "failed"
    assert runs["state"]["?"] == "done"
    assert sorted(read.notes) == [
        "empty: its W&B config has no norm (norm, or norm.name)",
        "empty: no metric in W&B",
    ]
    said = str(compare(project))
    assert "diverged named: val/loss is nan at step 7" in said
    assert "nan\n" not in said  # a run without a log is named by its source


def test_a_file_that_is_cut_off_anywhere_is_an_interrupted_run_or_a_note(only_wandb: Path) -> None:
    folder = sorted(only_wandb.glob("offline-run-*"))[0]
    (file,) = folder.glob("*.wandb")
    data, seen = file.read_bytes(), []
    whole = read_runs(folder)
    for length in [*range(7, len(data), 601), len(data)]:
        file.write_bytes(data[:length])
        read = read_runs(only_wandb)
        names = {*read.runs.index}
        if len(names) == 3:
            assert read.notes == [f"{file} ({length} bytes): no run, it was killed at its start"]
            seen.append(-1)
        elif length < len(data):
            (name,) = whole.runs.index
            assert read.runs["state"][name] in ("interrupted", "running")  # it began this very minute
            seen.append(int((read.history["directory"] == name).sum()))
    assert seen == sorted(seen)
    assert seen[0] == -1
    assert seen[-1] == len(whole.history)
    file.write_bytes(os.urandom(5000))
    rest = read_runs(only_wandb)
    assert len(rest.runs) == 3
    assert len(rest.notes) == 1


def test_runs_of_equal_names_and_ids_in_two_projects_are_two_and_odd_settings_are_no_error(
    tmp_path: Path,
) -> None:
    rows = [
        {"_step": 0, "step": 5, "loss": 1.0, "state": 2.0},
        {"_step": 1, "loss": 0.5, "time": 3.0, "": 1.0},
    ]
    for project in ("mine", "yours"):
        config = {
            "norm": ["batch", "layer"],
            "seed": [1, 2],
            "job": "an own word",
            "data": {"batch_size": "x"},
        }
        folder = tmp_path / project / "offline-run-20260101_000000-baseline"
        write_offline_run(folder, "baseline", config, rows, project=project)
    read = read_runs(tmp_path)
    assert sorted(read.runs.index) == ["mine/run baseline", "yours/run baseline"]
    assert (read.runs["state"] == "done").all()
    assert (read.runs["result/state"] == 2).all()
    assert read.history["step"].tolist() == [0, 1, 0, 1]
    assert len(read.notes) == 2  # of the norm
    compare(tmp_path)


def test_groups_that_the_user_s_own_module_does_not_take_say_nothing_of_the_run(tmp_path: Path) -> None:
    job = {"name": "own", "choices": {"module": "mine", "model": "cnn", "norm": "batch"}}
    config = {"norm": {"momentum": 0.1, "name": "batch"}, "module": {"width": 8}, "job": job}
    write_offline_run(
        tmp_path / "offline-run-20260101_000000-own", "own", config, [{"_step": 0, "loss": 1.0}]
    )
    read = read_runs(tmp_path)
    assert read.runs.loc["run own", ["job", "model", "norm"]].tolist() == ["own", "mine", "batch"]
    (settings,) = read.configs.to_dict("records")
    assert settings == {
        "norm": "batch", "norm.momentum": 0.1, "module": "mine", "module.width": 8, "model": "mine"
    }  # fmt: skip


def test_a_thousand_offline_runs_are_all_there(tmp_path: Path) -> None:
    for number in range(1000):
        folder = tmp_path / f"sweep-{number % 2}" / "wandb" / f"offline-run-20260101_000000-{number:08d}"
        config = {"norm": ("batch", "group")[number % 2], "seed": number}
        rows = [
            {"_step": step, "trainer/global_step": 10 * step, "val/loss": 1 / (1 + step)} for step in range(9)
        ]
        write_offline_run(folder, f"{number:08d}", config, rows, exit_code=0 if number else None)
    read = read_runs(tmp_path)
    assert read.runs["state"].value_counts().to_dict() == {"done": 999, "interrupted": 1}
    assert read.runs["norm"].value_counts().to_dict() == {"batch": 500, "group": 500}
    assert sorted(read.runs["seed"]) == list(range(1000))
    assert len(read.history) == 9000
    assert read.history.groupby("step")["val/loss"].first().to_dict() == {
        10 * i: 1 / (1 + i) for i in range(9)
    }


def test_offline_files_need_neither_torch_nor_hydra(only_wandb: Path) -> None:
    script = f"""
{WITHOUT.format(names=("torch", "lightning", "pytorch_lightning", "hydra", "omegaconf", "torchmetrics"))}
from bnlight.compare import read_runs
print(len(read_runs({str(only_wandb)!r}).runs))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout == "4\n", done.stderr


def test_the_server_gives_the_tables_of_the_jobs_page_by_page(
    sweep: Path, only_wandb: Path, server: Server
) -> None:
    held = wandb.init(
        mode="offline", job_type="comparison", group="train", project="bnlight", dir=only_wandb.parent
    )
    held.finish()  # as `bnlight wandb report` leaves one
    wandb.teardown()
    assert len(read_runs(only_wandb).runs) == 4
    upload(only_wandb)
    server.page = 3
    jobs, tracked = read_runs(sweep), read_runs("wandb:us/bnlight/train")
    assert tracked.directories == tracked.notes == []
    assert_same_tables(jobs, tracked)
    assert set(tracked.runs["url"]) == {
        f"{server.url}/us/bnlight/runs/{name}" for name in server.runs if name != held.id
    }
    pd.testing.assert_frame_equal(read_runs("wandb:us/bnlight").history, tracked.history)

    both = read_runs(sweep, "wandb:us/bnlight")
    assert both.notes == [f"wandb:us/bnlight: 4 of its W&B runs are in {sweep} too, counted once"]
    assert both.runs["path"].notna().all()
    assert both.runs["url"].to_dict() == tracked.runs["url"].to_dict()

    with pytest.raises(ValueError, match="project us/bnlight has no run of group 'other'"):
        read_runs("wandb:us/bnlight/other")
    with pytest.raises(ValueError, match=f"{server.url} shows no project us/absent to this key"):
        read_runs("wandb:us/absent")
    with pytest.raises(ValueError, match="expected wandb:entity/project"):
        read_runs("wandb:bnlight")


def test_a_history_that_the_server_does_not_give_is_a_note(
    only_wandb: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(only_wandb)
    monkeypatch.setattr(online, "SECONDS_TO_ANSWER", 2)
    server.silent = {"HistoryPage"}
    read = read_runs("wandb:us/bnlight")
    assert len(read.runs) == len(read.notes) == 4
    assert all(
        "its history cannot be read (no answer within 2 s), its summary is" in note for note in read.notes
    )
    assert read.runs["train/accuracy"].notna().all()
    assert read.history.empty
    server.silent = {"query Runs("}
    with pytest.raises(ConnectionError, match=f"{server.url} has not answered as it should"):
        read_runs("wandb:us/bnlight")


def test_a_server_that_cannot_be_asked_is_named_with_what_to_do(
    server: Server, monkeypatch: pytest.MonkeyPatch, project: Path
) -> None:
    server.knows_no = True
    with pytest.raises(PermissionError, match=r"does not let the key in.*wandb login --relogin"):
        read_runs("wandb:us/bnlight")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match=r"127.0.0.1:9 cannot be reached.*WANDB_BASE_URL"):
        read_runs("wandb:us/bnlight")
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("NETRC", str(project / "netrc"))
    with pytest.raises(PermissionError, match=r"no key for http://127.0.0.1:9. Run `wandb login`"):
        read_runs("wandb:us/bnlight")


def test_of_equal_validations_the_first_is_the_checkpoints() -> None:
    rows = [{"_step": step, "val/accuracy": 0.9, "val/loss": loss} for step, loss in ((1, 0.5), (2, 0.1))]
    config = {"norm": "batch", "monitor": {"metric": "val/accuracy", "mode": "max"}}
    tracked = Tracked("id", "name", "project", ("project",), "source", "finished", config, rows=rows)
    assert run_of(tracked).row["val/loss"] == 0.5
