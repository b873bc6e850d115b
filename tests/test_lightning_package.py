"""Modules and Trainers of the package `lightning`, whose classes are others than those of `pytorch_lightning`."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lightning") is None, reason="the package lightning is not installed"
)

NET = """
import lightning.pytorch as L
import torch
from torch import nn


class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))

    def training_step(self, batch, index):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Data(L.LightningDataModule):
    pass


def data():
    x = torch.randn(32, 3)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, (x[:, 0] > 0).long()), batch_size=8)


def trainer(*callbacks, **options):
    options = {"max_epochs": 2, "accelerator": "cpu", "devices": 1, "logger": False} | options
    return L.Trainer(callbacks=list(callbacks), enable_progress_bar=False, enable_model_summary=False, **options)
"""

CALLBACKS = """
import bnlight
from bnlight.callbacks import RenormSchedule, ReplaceNorm
from mine import Net, data, trainer
from lightning.pytorch.callbacks import ModelCheckpoint

net = Net()
save = ModelCheckpoint(".", filename="saved")
trainer(ReplaceNorm("renorm"), RenormSchedule(), save).fit(net, data())
loaded = bnlight.load("saved.ckpt", Net)
assert type(loaded) .__name__ == "Net"
assert repr(loaded.net) == repr(net.net) and "BatchRenorm" in repr(net.net)
assert all(a.equal(b) for a, b in zip(loaded.state_dict().values(), net.state_dict().values(), strict=True))
trainer(ReplaceNorm("renorm"), max_epochs=3).fit(Net(), data(), ckpt_path="saved.ckpt")
"""

SYNC = """
import bnlight
import torch
from mine import Net, data, trainer

class Told(Net):
    def on_train_end(self):
        mean = self.net[1].running_mean.clone()
        both = [torch.empty_like(mean) for _ in range(2)]
        torch.distributed.all_gather(both, mean)
        assert both[0].equal(both[1])
        print("in step")

trainer(plugins=[bnlight.NormSync()], devices=2, strategy="ddp_fork").fit(Told(), data())
trainer(plugins=[bnlight.NormSync()], sync_batchnorm=True, devices=2, strategy="ddp_fork").fit(Told(), data())
"""


@pytest.mark.parametrize(("program", "said"), [(CALLBACKS, ""), (SYNC, "in step")])
def test_callbacks_and_synchronization_work_with_its_trainer(project: Path, program: str, said: str) -> None:
    (project / "mine.py").write_text(NET)
    (project / "program.py").write_text(program)
    done = subprocess.run([sys.executable, "program.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert said in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["module=custom", "module._target_=mine.Net", "replace_norm=true"],
        ["data=custom", "data._target_=mine.Data"],
    ],
)
def test_the_command_says_which_package_it_needs(project: Path, arguments: list[str]) -> None:
    (project / "mine.py").write_text(NET)
    command = [sys.executable, "-m", "bnlight", "train", "trainer=cpu", "logger=csv", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "import pytorch_lightning as pl" in done.stdout
