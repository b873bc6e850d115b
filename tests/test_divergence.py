"""A training whose loss is no number has diverged, whatever it logs; a validation that is none is a bad score."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from own_code import MINE, SERIES
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from bnlight.cli import main
from bnlight.compare import compare
from bnlight.lightning import Checkpoint, StopOnDivergence

MODULES = '''

class Silent(Regression):
    """Logs no loss in training; of some seeds its weights are soon no numbers."""

    def training_step(self, batch, index):
        broken = torch.initial_seed() % 2 and self.global_step >= 2
        return F.mse_loss(self(batch[0]), batch[1]) * (float("nan") if broken else 1)


class Late(Regression):
    """Its error on other data is no number in the first epochs, or in all of them."""

    def __init__(self, norm, until=2, on="val"):
        super().__init__()
        self.until, self.on = until, on
        self.more = norm(2)

    def validation_step(self, batch, index):
        bad = self.current_epoch < self.until and self.on == "val"
        self.log("val_loss", F.l1_loss(self(batch[0]), batch[1]) * (float("nan") if bad else 1))

    def test_step(self, batch, index):
        bad = self.until == 99
        self.log("test_loss", F.l1_loss(self(batch[0]), batch[1]) * (float("inf") if bad else 1))
'''


@pytest.fixture
def mine(project: Path) -> Path:
    (project / "mine.py").write_text(MINE + MODULES)
    return project


def results(folder: Path) -> dict[str, dict[str, Any]]:
    return {
        p.parent.name: json.loads(p.read_text()) for p in sorted(folder.glob("outputs/train/*/result.json"))
    }


class Net(pl.LightningModule):
    """Shows the loss of its training in one of several ways, and logs none."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.automatic_optimization = how, how in ("tensor", "dict")
        self.layer = nn.Linear(4, 1)

    def training_step(self, batch: list[Tensor], index: int) -> Any:
        loss = F.mse_loss(self.layer(batch[0]), batch[0].sum(1, keepdim=True))
        loss = loss * (float("nan") if self.global_step >= 6 else 1)
        if self.how == "tensor":
            return loss
        if self.how == "dict":
            return {"loss": loss, "more": 1}
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        loss.backward() if self.how == "backward" else self.manual_backward(loss)
        optimizer.step()
        return None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.mark.parametrize(
    ("how", "said", "step"),
    [
        ("tensor", "the training loss is nan", 8),
        ("dict", "the training loss is nan", 8),
        ("manual_backward", "the training loss is nan", 8),
        ("backward", "layer.weight is nan", 10),  # at the epoch's end
    ],
)
def test_a_loss_that_is_logged_nowhere_is_watched(tmp_path: Path, how: str, said: str, step: int) -> None:
    watch = StopOnDivergence()
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=4, callbacks=[watch], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=4, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(Net(how), DataLoader(TensorDataset(torch.randn(20, 4)), 2))
    assert watch.reason == f"{said} at step {step}"
    assert trainer.global_step == step


def test_a_norm_whose_runs_turn_into_nan_does_not_win_by_the_one_that_is_left(mine: Path) -> None:
    module = [
        "module=custom",
        "module._target_=mine.Silent",
        "replace_norm=true",
        "trainer.log_every_n_steps=3",
    ]
    watched = ["monitor.metric=val/mae", "monitor.mode=min"]
    assert main(["train", "-m", *SERIES, *module, *watched, "norm=batch", "seed=0,1,3"]) == 0
    diverged = {name.split("-s")[1][0]: one["diverged"] for name, one in results(mine).items()}
    assert diverged == {
        "0": None,
        "1": "the training loss is nan at step 3",
        "3": "the training loss is nan at step 3",
    }
    (cell,) = compare(mine / "outputs" / "train").cells
    assert (cell.metric.n, cell.states) == (1, {"diverged": 2})


LATE = [*SERIES, "module=custom", "module._target_=mine.Late", "monitor.metric=val_loss", "monitor.mode=min"]


@pytest.mark.parametrize("callbacks", ["default", "early_stopping"])
def test_a_validation_that_is_not_finite_yet_stops_nothing_and_is_the_worst_score(
    mine: Path, callbacks: str
) -> None:
    assert main(["train", *LATE, f"callbacks={callbacks}", "trainer.max_epochs=4"]) == 0
    (one,) = results(mine).values()
    assert (one["diverged"], one["epochs"]) == (None, 4)
    (job,) = mine.glob("outputs/train/*")
    best = torch.load(job / "checkpoints" / "best.ckpt", weights_only=True)
    assert best["epoch"] >= 2
    assert one["metrics"]["val_loss"] == pytest.approx(best["metrics"]["val_loss"])


@pytest.mark.parametrize(("mode", "first"), [("max", float("inf")), ("min", float("-inf"))])
def test_no_infinity_is_the_best_score(tmp_path: Path, mode: str, first: float) -> None:
    scores = iter([first, 1.0, 2.0])

    class Scored(Net):
        def validation_step(self, batch: list[Tensor], index: int) -> None:
            self.log("score", next(scores))

    data = DataLoader(TensorDataset(torch.randn(2, 4)), 2)
    keep = Checkpoint(str(tmp_path), monitor="score", mode=mode, filename="best")
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=3, callbacks=[keep], logger=False, num_sanity_val_steps=0,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path, log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(Scored("tensor"), data, data)
    assert keep.best_model_score is not None
    assert float(keep.best_model_score) == {"max": 2.0, "min": 1.0}[mode]


def test_a_final_score_that_is_not_finite_is_kept_and_loses(
    mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "-m", *LATE, "norm=batch,layer", "seed=0,1", "+module.on=test",
                 "+module.until=0"]) == 0  # fmt: skip
    assert main(["train", "-m", *LATE, "norm=layer", "seed=2", "+module.on=test", "+module.until=99"]) == 0
    lost = next(one for one in results(mine).values() if one["config"]["seed"] == 2)
    assert (lost["diverged"], lost["metrics"]["test_loss"]) == (None, None)
    assert "test_loss not finite" in capsys.readouterr().out
    found = compare(mine / "outputs" / "train", by=["norm"])
    states = {cell.contender: (cell.metric.n, cell.states) for cell in found.cells}
    assert states == {"batch": (2, {}), "layer": (2, {"diverged": 1})}
    assert "test_loss is not finite" in str(found)
