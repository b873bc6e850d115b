"""Data modules under a Trainer: its loaders, resume inside an epoch, two ranks."""

import json
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from test_data_module import Numbers
from torch import Tensor, nn

from bnlight.data import ShuffledBatches, TensorBatches

# Lightning 2.6 asks torch 2.13's pytree in a way that torch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning")


class Recorder(pl.LightningModule):
    """A linear model that notes the samples of every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 2)
        self.batches: dict[str, list[list[float]]] = {"train": [], "val": [], "test": []}

    def _step(self, name: str, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        self.batches[name].append(x[:, 0].tolist())
        loss = nn.functional.cross_entropy(self.layer(x / 100), y)
        self.log(f"{name}/loss", loss)
        return loss

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self._step("train", batch)

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self._step("val", batch)

    def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self._step("test", batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(tmp_path: Path, **options: Any) -> pl.Trainer:
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "default_root_dir": str(tmp_path),
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
    }
    return pl.Trainer(**quiet | options)


def test_a_trainer_uses_the_loaders_as_they_are(tmp_path: Path) -> None:
    data, module = Numbers(seed=0), Recorder()
    fit = trainer(tmp_path, max_epochs=2)
    fit.fit(module, datamodule=data)
    assert isinstance(fit.train_dataloader, ShuffledBatches)
    assert isinstance(fit.val_dataloaders, TensorBatches)
    twin = Numbers(seed=0)
    twin.setup()
    loader = twin.train_dataloader()
    expected = [x[:, 0].tolist() for _ in range(2) for x, _ in loader]
    assert module.batches["train"] == expected
    fit.test(module, datamodule=data)
    assert list(chain.from_iterable(module.batches["test"])) == list(range(53, 72))


def test_overfit_batches_repeats_the_same_batches(tmp_path: Path) -> None:
    module = Recorder()
    trainer(tmp_path, max_epochs=3, overfit_batches=2).fit(module, datamodule=Numbers())
    steps = module.batches["train"]
    assert len(steps) == 6
    assert steps[:2] == steps[2:4] == steps[4:]


def test_training_loaders_may_also_serve_for_validation(tmp_path: Path) -> None:
    data = Numbers()
    data.setup()
    trainer(tmp_path).validate(Recorder(), dataloaders=data.train_dataloader(), verbose=False)


class Stop(Callback):
    """Ends training after so many steps, as a preemption would."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.steps:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "stopped.ckpt")
            raise InterruptedError


@pytest.mark.parametrize("steps", [1, 5, 6, 7, 12])  # six steps in an epoch
def test_a_run_stopped_anywhere_resumes_with_the_next_batch(tmp_path: Path, steps: int) -> None:
    whole = Recorder()
    trainer(tmp_path, max_epochs=3).fit(whole, datamodule=Numbers(seed=0))
    module = Recorder()
    with pytest.raises(InterruptedError):
        trainer(tmp_path, max_epochs=3, callbacks=[Stop(steps)]).fit(module, datamodule=Numbers(seed=0))
    assert module.batches["train"] == whole.batches["train"][:steps]
    module.batches["train"].clear()
    resumed = trainer(tmp_path, max_epochs=3)
    resumed.fit(module, datamodule=Numbers(seed=0), ckpt_path=tmp_path / "stopped.ckpt", weights_only=True)
    assert module.batches["train"] == whole.batches["train"][steps:]
    assert resumed.global_step == 18


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* is not empty")  # where the first run saved
@pytest.mark.parametrize(
    "options",
    [{"save_on_train_epoch_end": True}, {"save_on_train_epoch_end": False}, {"every_n_train_steps": 6}],
)
def test_a_run_saved_at_the_end_of_an_epoch_resumes_with_the_next_epoch(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    whole = Recorder()
    trainer(tmp_path, max_epochs=3).fit(whole, datamodule=Numbers(seed=0))
    module = Recorder()

    def saving(max_epochs: int) -> pl.Trainer:
        callback = ModelCheckpoint(dirpath=tmp_path / "saved", filename="{step}", save_top_k=-1, **options)
        return trainer(tmp_path, max_epochs=max_epochs, enable_checkpointing=True, callbacks=[callback])

    saving(max_epochs=1).fit(module, datamodule=Numbers(seed=0))
    module.batches["train"].clear()
    path = tmp_path / "saved" / "step=6.ckpt"
    saving(max_epochs=3).fit(module, datamodule=Numbers(seed=0), ckpt_path=path, weights_only=True)
    assert module.batches["train"] == whole.batches["train"][6:]


TWO_RANKS = """
import json, sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(1)
from test_data_trainer import Numbers, Recorder, trainer

class Written(Recorder):
    def write(self):
        name = f"rank{self.trainer.global_rank}-{self.trainer.state.fn.value}.json"
        Path(sys.argv[2], name).write_text(json.dumps(self.batches))
    on_fit_end = on_test_end = write

    def setup(self, stage):
        torch.manual_seed(self.trainer.global_rank)  # ranks that do not share a seed

class Unseeded(Numbers):
    def setup(self, stage=None):
        torch.manual_seed(100 + self.trainer.global_rank)
        super().setup(stage)

run = trainer(sys.argv[2], devices=2, strategy="ddp_fork", max_epochs=2)
run.fit(Written(), datamodule=Unseeded(eval_batch_size=4))
run = trainer(sys.argv[2], devices=2, strategy="ddp_fork")
run.test(Written(), datamodule=Unseeded(eval_batch_size=4), verbose=False)
"""


def test_two_ranks_share_every_step_and_see_each_test_sample_once(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-c", TWO_RANKS, str(Path(__file__).parent), str(tmp_path)],
        check=True,
        timeout=120,
        capture_output=True,
    )
    fit = [json.loads((tmp_path / f"rank{rank}-fit.json").read_text()) for rank in range(2)]
    assert [[len(batch) for batch in each["train"]] for each in fit] == [[8, 8, 5] * 2] * 2
    train, again = (
        [s for each in fit for batch in each["train"][part] for s in batch]
        for part in (slice(3), slice(3, 6))
    )
    assert train != again
    val = [s for each in fit for batch in each["val"][: len(each["val"]) // 2] for s in batch]
    assert len(fit[0]["val"]) == len(fit[1]["val"])
    assert sorted(train + val) == sorted(again + val) == list(range(53))
    test = [json.loads((tmp_path / f"rank{rank}-test.json").read_text())["test"] for rank in range(2)]
    assert len(test[0]) == len(test[1]) == 3
    assert sorted(sample for batches in test for batch in batches for sample in batch) == list(range(53, 72))
