"""ReplaceNorm in modules of other people, with Trainers of their own: optimizer, checkpoints, resume, loading."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import ModelCheckpoint, WeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bnlight
from bnlight.callbacks import ReplaceNorm
from bnlight.norm import BatchRenorm, GroupNorm


class Net(pl.LightningModule):
    """Somebody's module; it has never heard of bnlight."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net: nn.Module = self.build()

    def build(self) -> nn.Module:
        width = self.hparams["width"]
        return nn.Sequential(
            nn.Linear(3, width),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.BatchNorm1d(width),
            nn.Linear(width, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        return y

    def training_step(self, batch: Any, index: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch: Any, index: int) -> None:
        self.log("test/loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Late(Net):
    """Builds its layers in configure_model."""

    def build(self) -> nn.Module:
        return nn.Identity()

    def configure_model(self) -> None:
        if isinstance(self.net, nn.Identity):
            self.net = super().build()


def data() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 3, generator=generator)
    return DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=8)


def trainer(folder: Path, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    settings: dict[str, Any] = {"max_epochs": 2, "accelerator": "cpu", "devices": 1, "logger": False}
    settings |= {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": folder}
    return pl.Trainer(callbacks=list(callbacks), **(settings | options))


def checkpoint(folder: Path, **options: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="saved", enable_version_counter=False, **options)


def outputs(module: pl.LightningModule) -> Tensor:
    with torch.no_grad():
        y: Tensor = module.eval()(torch.linspace(-1, 1, 12).view(4, 3))
    return y


def fitted(folder: Path, kind: type[Net] = Net, norm: Any = "renorm", **options: Any) -> Net:
    torch.manual_seed(0)
    module = kind(width=5)
    trainer(folder, ReplaceNorm(norm, **options), checkpoint(folder)).fit(module, data())
    return module


class Swap(pl.Callback):
    """What one would write oneself."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        bnlight.replace_norm(pl_module, "group")


def test_a_plain_swap_in_setup_cannot_be_loaded_again(tmp_path: Path) -> None:
    module = Net(width=8)
    trainer(tmp_path, Swap(), checkpoint(tmp_path)).fit(module, data())
    with pytest.raises(RuntimeError, match=r"(Missing|Unexpected) key"):
        Net.load_from_checkpoint(tmp_path / "saved.ckpt")


@pytest.mark.parametrize("kind", [Net, Late])
@pytest.mark.parametrize(
    "norm",
    [
        "group",
        GroupNorm,
        functools.partial(BatchRenorm, r_max=2.0),
        {"_target_": "bnlight.norm.SwitchableNorm", "eps": 0.1},
    ],
)
def test_a_replaced_module_is_trained_saved_and_loaded(tmp_path: Path, kind: type[Net], norm: Any) -> None:
    module = fitted(tmp_path, kind, norm)
    layers = [type(module.net[index]) for index in (1, 4)]
    assert nn.BatchNorm1d not in layers
    saved = torch.load(tmp_path / "saved.ckpt", weights_only=True)
    assert sum(len(group["params"]) for group in saved["optimizer_states"][0]["param_groups"]) == len(
        list(module.parameters())
    )
    loaded = bnlight.load(tmp_path / "saved.ckpt", kind)
    assert type(loaded).__name__ == kind.__name__
    assert isinstance(loaded, kind)
    assert loaded.hparams == {"width": 5}
    assert [type(loaded.net[index]) for index in (1, 4)] == layers
    assert repr(loaded.net) == repr(module.net)
    assert torch.equal(outputs(loaded), outputs(module))


@pytest.mark.parametrize("kind", [Net, Late])
def test_a_run_resumes_and_tests_from_its_checkpoint(tmp_path: Path, kind: type[Net]) -> None:
    for name, epochs in (("whole", 4), ("half", 2)):
        torch.manual_seed(0)
        module = kind()
        run = trainer(tmp_path, ReplaceNorm("renorm"), checkpoint(tmp_path / name), max_epochs=epochs)
        run.fit(module, data())
    resumed = kind()
    again = trainer(tmp_path, ReplaceNorm("renorm"), checkpoint(tmp_path / "half"), max_epochs=4)
    again.fit(resumed, data(), ckpt_path=tmp_path / "half" / "saved.ckpt")
    whole = bnlight.load(tmp_path / "whole" / "saved.ckpt", kind)
    assert torch.equal(outputs(resumed), outputs(whole))
    fresh = kind()
    tests = trainer(tmp_path, ReplaceNorm("renorm"))
    (found,) = tests.test(fresh, data(), ckpt_path=tmp_path / "whole" / "saved.ckpt", verbose=False)
    (expected,) = trainer(tmp_path).test(whole, data(), verbose=False)
    assert found == expected


def test_going_on_with_another_norm_is_refused(tmp_path: Path) -> None:
    fitted(tmp_path, norm="renorm")
    path = tmp_path / "saved.ckpt"
    with pytest.raises(
        ValueError, match=r"made with renorm in net\.1, net\.4, but this module has group in net\.1"
    ):
        trainer(tmp_path, ReplaceNorm("group")).fit(Net(width=5), data(), ckpt_path=path)


def test_checkpoints_of_the_weights_alone_are_loaded_too(tmp_path: Path) -> None:
    module = Net()
    save = checkpoint(tmp_path, save_weights_only=True)
    trainer(tmp_path, ReplaceNorm("switchable"), save).fit(module, data())
    assert torch.equal(outputs(bnlight.load(tmp_path / "saved.ckpt", Net)), outputs(module))


def test_a_checkpoint_without_replacement_is_loaded_as_lightning_does(tmp_path: Path) -> None:
    module = Net(width=4)
    trainer(tmp_path, checkpoint(tmp_path)).fit(module, data())
    loaded = bnlight.load(tmp_path / "saved.ckpt", Net, map_location="cpu", strict=True)
    assert type(loaded.net[1]) is nn.BatchNorm1d
    assert torch.equal(outputs(loaded), outputs(module))


def test_what_is_no_checkpoint_and_no_modules_class_is_said_to_be_none(tmp_path: Path) -> None:
    file = tmp_path / "file.pt"
    for content, seen in ((Net().state_dict(), "OrderedDict with net.0.weight"), ([1], "list")):
        torch.save(content, file)
        with pytest.raises(
            ValueError, match=rf"no checkpoint of Lightning's: it holds {seen}.*init_from=FILE"
        ):
            bnlight.load(file, Net)
    with pytest.raises(TypeError, match=r"expected the class of a LightningModule, got .*Linear"):
        bnlight.load(file, nn.Linear)  # type: ignore[type-var]


def test_what_was_left_out_is_left_out_when_it_is_loaded(tmp_path: Path) -> None:
    module = fitted(tmp_path, norm="group", include=lambda path, layer: path.endswith("4"))
    loaded = bnlight.load(tmp_path / "saved.ckpt", Net)
    for net in (module.net, loaded.net):
        assert [type(net[index]) for index in (1, 4)] == [nn.BatchNorm1d, GroupNorm]


def test_another_fit_of_the_same_module_changes_nothing(tmp_path: Path) -> None:
    module = fitted(tmp_path)
    layer = module.net[1]
    again = trainer(tmp_path, ReplaceNorm("renorm"))
    again.fit(module, data())
    again.test(module, data(), verbose=False)
    assert module.net[1] is layer


def test_a_callback_that_copies_the_module_must_come_later(tmp_path: Path) -> None:
    average = WeightAveraging(device="cpu")
    with pytest.raises(ValueError, match=r"after WeightAveraging in Trainer.*put ReplaceNorm first"):
        trainer(tmp_path, average, ReplaceNorm("renorm")).fit(Net(), data())


def test_an_average_of_weights_is_of_the_new_norms(tmp_path: Path) -> None:
    module, average = Net(width=5), WeightAveraging(device="cpu")
    trainer(tmp_path, ReplaceNorm("renorm"), average, checkpoint(tmp_path)).fit(module, data())
    assert isinstance(module.net[1], BatchRenorm)
    assert type(average._average_model.module.net[1]) is BatchRenorm
    assert torch.equal(outputs(bnlight.load(tmp_path / "saved.ckpt", Net)), outputs(module))


@pytest.mark.parametrize(
    "norm", [lambda channels: GroupNorm(channels), functools.partial(GroupNorm, device=torch.device("cpu"))]
)
def test_a_norm_that_cannot_be_written_down_is_refused_at_once(norm: Any) -> None:
    with pytest.raises(ValueError, match=r"give a name such as 'renorm'"):
        ReplaceNorm(norm)


def test_a_module_without_a_norm_is_refused(tmp_path: Path) -> None:
    class Bare(Net):
        def build(self) -> nn.Module:
            return nn.Linear(3, 2)

    with pytest.raises(ValueError, match="no norm to replace in Bare"):
        trainer(tmp_path, ReplaceNorm("renorm")).fit(Bare(), data())


def test_two_ranks_train_a_replaced_module(tmp_path: Path) -> None:
    module = Net(width=5)
    run = trainer(tmp_path, ReplaceNorm("renorm"), checkpoint(tmp_path), strategy="ddp_fork", devices=2)
    run.fit(module, data())
    loaded = bnlight.load(tmp_path / "saved.ckpt", Net)
    assert type(loaded.net[1]) is BatchRenorm
