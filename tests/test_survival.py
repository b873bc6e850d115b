"""A training that is stopped anywhere goes on as if it had not been stopped, bit by bit on the CPU."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import subprocess
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
from conftest import SMALL
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric

from bnlight.cli import main
from bnlight.compare.read import read_runs
from bnlight.lightning import LastCheckpoint
from bnlight.lightning.stop import seconds
from bnlight.run import progress
from bnlight.run.status import read_status, update_status

# A network with dropout that sends its process a signal at the start of a training step.
MINE = """
import os, signal
from torch import nn
from bnlight.models import MLP

class Net(MLP):
    def __init__(self, norm, **arguments):
        super().__init__(norm=norm, **arguments)
        self.drop, self.steps = nn.Dropout(0.2), 0

    def forward(self, x):
        self.steps += self.training
        here = os.environ.get("RANK", "0") in os.environ.get("ON", "0")
        if self.training and here and self.steps == int(os.environ.get("AT", 0)):
            os.kill(os.getpid(), getattr(signal, os.environ["SIGNAL"]))
        return super().forward(self.drop(x))
"""
ARGUMENTS = [
    *(argument for argument in SMALL if not argument.startswith(("model", "trainer.max"))),
    "model=custom", "model._target_=mine.Net", "+model.width=16", "+model.depth=1", "norm=renorm",
    "callbacks=[default,renorm_schedule]", "trainer.max_epochs=2", "trainer.log_every_n_steps=7", "progress=off",
]  # fmt: skip
EVERY_EPOCH = 18  # steps


@pytest.fixture
def ours(project: Path) -> Path:
    (project / "mine.py").write_text(MINE)
    return project


def contents(root: Path) -> tuple[dict[str, Any], dict[str, Any], pd.DataFrame]:
    """The last and the best checkpoint of the only job below, and its metrics by step."""
    (job,) = (path.parent for path in root.glob("train/*/status.json"))
    assert read_status(job)["state"] == "done"
    last, best = (
        torch.load(job / "checkpoints" / f"{name}.ckpt", weights_only=True) for name in ("last", "best")
    )
    history = read_runs(root / "train").history.drop(columns=["time"], errors="ignore")
    return last, best, history.drop(columns=[name for name in history if "seconds" in name])


def assert_equal(a: Any, b: Any, at: str = "") -> None:
    """Bit by bit, but for the folder in paths."""
    if at.endswith("current_score"):  # ModelCheckpoint does not take it up, and nothing reads it
        return
    if isinstance(a, dict):
        if at.endswith("best_k_models"):  # by path
            a, b = ({"": value} for value in (*a.values(), *b.values()))
        assert a.keys() == b.keys(), at
        for key in a:
            assert_equal(a[key], b[key], f"{at}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), at
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{at}.{index}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), at
    elif not (isinstance(a, str) and "/" in a):
        assert a == b or (a != a and b != b), at


def assert_same_run(one: Path, other: Path) -> None:
    for a, b in zip(contents(one), contents(other), strict=True):
        if isinstance(a, pd.DataFrame):
            pd.testing.assert_frame_equal(a, b, check_exact=True)
        else:
            assert_equal(a, b)


def test_a_stopped_run_is_bit_by_bit_the_run_that_was_not_stopped(
    ours: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *ARGUMENTS, "paths.outputs=whole"]) == 0
    moments = [
        (1, "SIGTERM"),
        (5, "SIGINT"),
        (7, "SIGTERM"),
        (EVERY_EPOCH, "SIGUSR1"),
        (25, "SIGUSR2"),
        (36, "SIGTERM"),
    ]
    for step, name in moments:
        outputs = f"paths.outputs=at-{step}"
        monkeypatch.setenv("AT", str(step))
        monkeypatch.setenv("SIGNAL", name)
        assert main(["train", *ARGUMENTS, outputs]) == 130
        said = "interrupted" if name == "SIGINT" else "preempted"
        epoch = 2 if step >= EVERY_EPOCH else 1
        assert f"{said} at epoch {epoch}, step {step}" in capsys.readouterr().out
        monkeypatch.delenv("AT")
        assert main(["train", *ARGUMENTS, outputs]) == 0
        assert_same_run(Path("whole"), Path(f"at-{step}"))


def test_a_handler_that_lightning_left_behind_keeps_no_signal_from_a_job(
    ours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    over = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    over._signal_connector.register_signal_handlers()
    monkeypatch.setenv("AT", "3")
    monkeypatch.setenv("SIGNAL", "SIGTERM")
    try:
        assert main(["train", *ARGUMENTS]) == 130
    finally:
        over._signal_connector.teardown()


def test_a_killed_run_goes_on_from_its_last_checkpoint(ours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step, every in ((11, 4), (30, "10min")):
        command = ["train", *ARGUMENTS, f"checkpoint_every={every}", f"paths.outputs=k{step}"]
        with monkeypatch.context() as environment:
            environment.setenv("AT", str(step))
            environment.setenv("SIGNAL", "SIGKILL")
            killed = multiprocessing.get_context("fork").Process(target=main, args=(command,))
            killed.start()
            killed.join(60)
        assert killed.exitcode == -9
        assert main(["train", *ARGUMENTS, f"paths.outputs=k{step}"]) == 0
        (job,) = Path(f"k{step}").glob("train/*/metrics.csv")
        again = pd.read_csv(job).query("attempt == 2")
        assert again["step"].min() == (
            14 if step == 11 else 21
        )  # rows of steps since 8, and since the epoch's start
    assert main(["train", *ARGUMENTS, "paths.outputs=whole"]) == 0
    assert_same_run(Path("whole"), Path("k11"))
    assert_same_run(Path("whole"), Path("k30"))


@pytest.mark.parametrize("left", [0, 3000])
def test_a_broken_checkpoint_is_named_with_the_way_out(project: Path, left: int) -> None:
    assert main(["train", *SMALL, "trainer.max_epochs=2"]) == 0
    (job,) = (path.parent for path in project.glob("outputs/train/*/status.json"))
    update_status(job, state="interrupted")
    last = job / "checkpoints" / "last.ckpt"
    with last.open("r+b") as file:
        file.truncate(left)
    assert main(["train", *SMALL, "trainer.max_epochs=2"]) == 1
    error = read_status(job)["error"]
    assert f"{last.absolute()} cannot be loaded: delete it" in error
    last.unlink()
    assert main(["train", *SMALL, "trainer.max_epochs=2", "--retry-failed"]) == 0
    assert read_status(job)["state"] == "done"


def test_two_ranks_stop_at_one_step_and_go_on_bit_by_bit(ours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = [*ARGUMENTS, "trainer=ddp", "trainer.accelerator=cpu", "trainer.max_epochs=2", "sync=none"]
    ranks += ["trainer.log_every_n_steps=4", "checkpoint_every=2", "time_limit=1h"]
    assert main(["train", *ranks, "paths.outputs=whole"]) == 0
    with monkeypatch.context() as environment:
        for name, value in (("AT", "12"), ("ON", "1"), ("SIGNAL", "SIGTERM")):
            environment.setenv(name, value)
        assert main(["train", *ranks, "paths.outputs=cut"]) == 130
    assert main(["train", *ranks, "paths.outputs=cut"]) == 0
    assert_same_run(ours / "whole", ours / "cut")


class Plain(pl.LightningModule):
    """Somebody's module: epoch means by `self.log` and by torchmetrics, a plateau scheduler, numbers drawn anew."""

    def __init__(self, stop_at: int = -1) -> None:
        super().__init__()
        self.layer, self.mean, self.stop_at = torch.nn.Linear(4, 1), MeanMetric(), stop_at
        self.seen: list[float] = []
        self.logged: list[dict[str, float]] = []

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        (x,) = batch
        self.seen.append(float(x[0, 0]))
        loss = (self.layer(x) + torch.randn(1)).square().mean()
        self.mean.update(loss.detach())
        for how in ("mean", "sum", "min", "max"):
            self.log(f"loss/{how}", loss, on_step=False, on_epoch=True, reduce_fx=how)
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        if self.trainer.global_step == self.stop_at:
            callback = next(c for c in self.trainer.callbacks if isinstance(c, LastCheckpoint))  # type: ignore[attr-defined]
            callback.request.signum = 15

    def on_train_epoch_end(self) -> None:
        self.log("mean", self.mean.compute())
        self.mean.reset()

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        self.log("val", self.layer(batch[0]).square().mean())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val"}}


class Rows(pl.Callback):
    """The metrics of each epoch."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.callback_metrics  # noqa: B018 - Lightning computes them when they are asked for

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.rows.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    on_train_end = on_train_epoch_start


def fit(
    module: Plain, folder: Path, checkpoint: Path | None, *callbacks: pl.Callback, workers: int = 0
) -> Rows:
    data = TensorDataset(torch.arange(80.0).view(20, 4) / 80)
    loader = DataLoader(data, batch_size=2, shuffle=True, num_workers=workers)
    rows = Rows()
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=3, logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[rows, *callbacks], default_root_dir=str(folder), val_check_interval=0.5,
    )  # fmt: skip
    with contextlib.suppress(SystemExit):  # how Lightning ends a stopped run
        trainer.fit(module, loader, DataLoader(data, batch_size=20), ckpt_path=checkpoint, weights_only=False)
    return rows


@pytest.mark.parametrize("stop_at", [3, 5, 10, 14, 30])
def test_anybodys_module_and_loader_resume_exactly_with_the_callback(tmp_path: Path, stop_at: int) -> None:
    pl.seed_everything(1, verbose=False)
    whole = Plain()
    expected = fit(whole, tmp_path / "whole", None, LastCheckpoint())
    pl.seed_everything(1, verbose=False)
    first = Plain(stop_at)
    before = fit(first, tmp_path / "cut", None, LastCheckpoint())
    pl.seed_everything(99, verbose=False)  # a new process
    second = Plain()
    after = fit(second, tmp_path / "cut", tmp_path / "cut" / "checkpoints" / "last.ckpt", LastCheckpoint())
    assert first.seen + second.seen == whole.seen  # the same samples in the same order
    assert len(first.seen) == stop_at
    assert torch.equal(second.layer.weight, whole.layer.weight)
    if second.seen:
        assert after.rows[-1] == expected.rows[-1]
    assert len(before.rows) >= 1


def test_stock_lightning_resumes_in_the_middle_of_an_epoch_as_another_run(tmp_path: Path) -> None:
    pl.seed_everything(1, verbose=False)
    whole = Plain()
    expected = fit(whole, tmp_path / "whole", None, ModelCheckpoint(save_top_k=0))
    pl.seed_everything(1, verbose=False)
    stock = ModelCheckpoint(
        dirpath=tmp_path / "cut", filename="at-{step}", every_n_train_steps=13, save_top_k=-1
    )
    fit(Plain(), tmp_path / "cut", None, stock)
    pl.seed_everything(99, verbose=False)
    second = Plain()
    after = fit(second, tmp_path / "cut", tmp_path / "cut" / "at-step=13.ckpt", ModelCheckpoint(save_top_k=0))
    assert second.seen != whole.seen[13:]
    assert after.rows[1]["loss/sum"] != expected.rows[2]["loss/sum"]


@pytest.mark.parametrize(
    ("text", "value"),
    [(90, 90), ("90s", 90), ("30min", 1800), ("2h", 7200), ("1.5h", 5400), ("1d", 86400), (None, None)],
)
def test_durations(text: Any, value: float | None) -> None:
    assert seconds(text) == value


def test_a_heartbeat_that_cannot_be_written_is_no_failure(
    project: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(progress, "update_status", full)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_BEATS", 0.01)
    assert main(["train", *SMALL]) == 0
    assert "Exception in thread" not in capfd.readouterr().err


def test_a_full_disk_fails_the_job_and_leaves_no_half_files(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = project / "outputs"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs to mount a small file system (root)")
    try:
        assert (
            main(["train", "-m", *SMALL, "model.width=3000,8", "trainer.max_epochs=2", "progress=off"]) == 1
        )
        output = capsys.readouterr().out
        assert "No space left on device" in output
        states = sorted(read_status(path.parent)["state"] for path in small.glob("train/*/status.json"))
        assert states == ["done", "failed"]  # the small one still fits
        assert not [path for path in small.rglob(".*") if "ckpt" in path.name or "json." in path.name]
        for path in small.rglob("*.ckpt"):
            torch.load(path, weights_only=True)
        with contextlib.suppress(OSError), (small / "filler").open("wb", buffering=0) as file:
            while file.write(b"0" * 4096):
                pass
        assert main(["train", "-m", *SMALL, "seed=7,8", "progress=off"]) == 1
        said = "".join(capsys.readouterr())
        assert "No space left on device" in said
        assert "Traceback" not in said
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)
