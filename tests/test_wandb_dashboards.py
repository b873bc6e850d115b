"""What a W&B run carries for dashboards: axes, best values, histograms, the best checkpoint, its address; and leet."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import wandb
from conftest import SMALL
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from wandb_file import records
from wandb_server import serving

from bnlight.callbacks import NormMonitor
from bnlight.cli import main
from bnlight.norm import BatchNorm
from bnlight.run.memory import peak_memory, reset_peak_memory
from bnlight.run.tracking.logger import wandb_logger

TRACKED = [*(argument for argument in SMALL if not argument.startswith("logger")), "logger=wandb"]
CONFIG: dict[str, Any] = {
    "job": {"name": "job", "sweep": "sweep", "choices": {"norm": "batch"}},
    "monitor": {"metric": "val/mae", "mode": "min"},
}
Command = Callable[..., subprocess.CompletedProcess[str]]


def written(job: Path, kind: str) -> list[Any]:
    """The records of a kind that the job's last piece holds, when W&B's process has written it to its end."""
    piece = max(job.glob("wandb/offline-run-*"))
    (file,) = piece.glob("*.wandb")
    end = time.monotonic() + 30
    while True:
        found = list(records(file))
        if any(record.WhichOneof("record_type") == "exit" for record in found) or time.monotonic() > end:
            return [getattr(record, kind) for record in found if record.WhichOneof("record_type") == kind]
        time.sleep(0.1)


def items(row: Any) -> dict[str, Any]:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in row}


def summary_of(job: Path) -> dict[str, Any]:
    return {key: value for record in written(job, "summary") for key, value in items(record.update).items()}


def log_run(job: Path, values: list[float], run_id: str = "abcd1234") -> None:
    logger = wandb_logger(CONFIG, job, run_id, project="p")
    for step, value in enumerate(values):
        logger.log_metrics({"val/mae": value, "val/loss": value, "epoch": step}, step=step)
    logger.experiment.finish()


def test_charts_are_over_optimizer_steps_and_the_summary_has_the_best_and_the_last(project: Path) -> None:
    log_run(project, [3.0, 1.0, 2.0])
    defined = {metric.name or metric.glob_name: metric for metric in written(project, "metric")}
    assert defined["*"].step_metric == defined["val/mae"].step_metric == "trainer/global_step"
    assert defined["val/accuracy"].summary.max
    assert not defined["val/accuracy"].summary.min
    assert defined["epoch"].options.hidden
    summary = summary_of(project)
    assert summary["val/mae"] == summary["val/loss"] == {"min": 1.0, "last": 2.0}
    assert summary["best_val/mae"] == 1.0


@pytest.mark.parametrize(("now", "best"), [([2.0, 1.0], None), ([0.75, float("nan"), 0.25, 0.5], 0.25)])
def test_the_best_of_earlier_attempts_counts(project: Path, now: list[float], best: float | None) -> None:
    (project / "metrics.csv").write_text(
        "attempt,step,epoch,time,val/mae\n1,1,0,1,0.5\n1,2,0,1,\n1,3,0,1,nan\n"
    )
    log_run(project, now)
    assert summary_of(project).get("best_val/mae") == best  # None: it stays what it was


def test_the_best_checkpoint_is_an_artifact_also_when_it_has_been_pruned(project: Path) -> None:
    assert main(["train", *TRACKED, "logger.log_model=best"]) == 0
    (job,) = (path.parent for path in project.glob("outputs/train/*/status.json"))
    best = (job / "checkpoints" / "best.ckpt").read_bytes()
    (artifact,) = written(job, "artifact")
    assert artifact.type == "model"
    assert "best" in artifact.aliases
    assert json.loads(artifact.metadata)["monitor"] == "val/accuracy"
    (entry,) = artifact.manifest.contents
    assert main(["prune", "outputs", "--keep", "none"]) == 0
    assert not (job / "checkpoints" / "best.ckpt").exists()
    assert Path(entry.local_path).read_bytes() == best
    assert main(["train", *TRACKED, "seed=5", "logger.log_model=all"]) == 1
    failed = [json.loads(path.read_text()) for path in project.glob("outputs/train/*/status.json")]
    assert ["log_model is null or best, got 'all'" in str(s.get("error")) for s in failed].count(True) == 1


class Breaking(pl.Callback):
    """A parameter that is no longer finite."""

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step == 4:
            module.net[1].bias.data[0] = float("inf")


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 40), BatchNorm(40), nn.Linear(40, 1))

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_histograms_hold_each_channel_of_parameters_averages_and_batches(project: Path) -> None:
    module = Module()
    x = torch.randn(32, 3)
    logger = wandb_logger(CONFIG, project, "abcd1234", project="p")
    trainer = pl.Trainer(
        max_epochs=1, logger=logger, accelerator="cpu",
        callbacks=[Breaking(), NormMonitor(4, num_batches=1, histograms=True)],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1,
    )  # fmt: skip
    seen: list[Tensor] = []
    module.net[0].register_forward_hook(lambda *a: seen.append(a[2].detach()))
    trainer.fit(module, DataLoader(TensorDataset(x), batch_size=8))
    logger.experiment.finish()
    (row,) = (items(record.item) for record in written(project, "history"))
    for name in ("weight", "bias", "running_mean", "running_var", "batch_mean", "batch_var"):
        assert row[f"norm/net.1/{name}_histogram._type"] == "histogram"
        assert sum(row[f"norm/net.1/{name}_histogram.values"]) == (39 if name == "bias" else 40)
    for name, values in (("batch_mean", seen[-1].mean(0)), ("batch_var", seen[-1].var(0))):
        counts, edges = np.histogram(values.numpy(), bins=32)
        assert row[f"norm/net.1/{name}_histogram.values"] == counts.tolist()
        np.testing.assert_allclose(row[f"norm/net.1/{name}_histogram.bins"], edges, rtol=1e-4, atol=1e-6)


def test_online_jobs_know_their_address(project: Path, bnlight: Command) -> None:
    with serving() as server:
        there = {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": server.url, "WANDB_MODE": "online"}
        done = bnlight("train", *TRACKED, **there, timeout=120)
        assert done.returncode == 0, done.stderr
    (job,) = (path.parent for path in project.glob("outputs/train/*/status.json"))
    status, result = (json.loads((job / name).read_text()) for name in ("status.json", "result.json"))
    assert status["wandb_url"] == result["wandb_url"]
    assert status["wandb_url"].startswith(server.url)
    assert status["wandb_url"].endswith(f"/runs/{status['wandb_id']}")


PEAK = """
import torch
from bnlight.run.memory import peak_memory, reset_peak_memory

def look():
    print(peak_memory(torch.device("cpu"), since_reset=True))

reset_peak_memory()
look()
large = torch.ones(75_000_000)
look()
del large
look()
reset_peak_memory()
look()
"""


def test_peak_memory_is_that_of_one_job(project: Path) -> None:
    if not reset_peak_memory():
        assert peak_memory(torch.device("cpu"), since_reset=False) is None
        pytest.skip("this kernel does not let a process reset its peak memory")
    # In a new process: one that has run for long keeps what it has freed.
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    before, during, still, after = map(int, done.stdout.split())
    assert during - before > 270_000_000
    assert still == pytest.approx(during, rel=0.02)
    assert after < during - 270_000_000
    assert main(["train", *SMALL]) == 0
    (result,) = project.glob("outputs/train/*/result.json")
    said = json.loads(result.read_text())
    assert 50_000_000 < said["peak_memory"] < 5_000_000_000
    assert said["wandb_url"] is None


def test_leet_opens_on_all_runs_of_a_sweep(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for job in ("one", "two"):
        log_run(project / "outputs" / job, [1.0, 2.0], run_id=f"run{job}")
        written(project / "outputs" / job, "exit")
    wandb.teardown()
    assert main(["wandb", "ls", "outputs"]) == 0
    assert "bnlight wandb leet DIR" in capsys.readouterr().out
    process, terminal = pty.fork()
    if process == 0:
        os.environ |= {"TERM": "xterm-256color", "LINES": "50", "COLUMNS": "180"}
        os.execv(sys.executable, [sys.executable, "-m", "bnlight", "wandb", "leet", "outputs"])
    shown, asked = screen(terminal, [b"-runone", b"-runtwo"], until=60)
    assert asked == [], shown[-2000:]
    os.write(terminal, b"q")
    screen(terminal, [b"nothing more"], until=20)
    _, code = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(code) == 0
    assert main(["wandb", "leet", "outputs/one/wandb/none"]) == 2


def screen(terminal: int, wanted: list[bytes], until: float) -> tuple[bytes, list[bytes]]:
    """What the terminal has been sent, until all that is wanted was seen or the program has ended; what is missing."""
    shown, end = b"", time.monotonic() + until
    while time.monotonic() < end and any(text not in shown for text in wanted):
        if not select.select([terminal], [], [], 0.2)[0]:
            continue
        try:
            part = os.read(terminal, 65536)
        except OSError:  # it has ended
            break
        if b"\x1b[6n" in part:
            os.write(terminal, b"\x1b[1;1R")  # a terminal says where its cursor is
        shown += part
    return shown, [text for text in wanted if text not in shown]
