"""Every optimizer with every scheduler, and the settings of one that another follows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bnlight.conf
import pytest
import pytorch_lightning as pl
import torch
import yaml
from conftest import SMALL
from omegaconf import OmegaConf

from bnlight.cli import main
from bnlight.data import Digits
from bnlight.lightning.build import instantiate
from bnlight.lightning.classifier import Classifier
from bnlight.models import MLP
from bnlight.norm import BatchNorm
from bnlight.run import identity
from bnlight.run.application import compose_job

QUICK = [*SMALL, "progress=off", "+trainer.limit_train_batches=3"]
NAMES = {
    group: sorted(path.stem for path in Path(bnlight.conf.__path__[0], group).glob("*.yaml"))
    for group in ("optimizer", "scheduler")
}
SETTINGS = {
    "sgd": [[], ["optimizer.momentum=0"], ["optimizer.momentum=0.5", "optimizer.nesterov=false"]],
    "rmsprop": [[], ["optimizer.momentum=0.9"], ["+optimizer.centered=true"]],
    "adam": [[], ["optimizer.betas=[0.5,0.9]"], ["+optimizer.amsgrad=true"]],
    "adamw": [[], ["optimizer.betas=[0.5,0.9]"], ["+optimizer.amsgrad=true"]],
}


def test_the_table_has_every_optimizer() -> None:
    assert sorted(SETTINGS) == NAMES["optimizer"]


@pytest.mark.parametrize("scheduler", NAMES["scheduler"])
@pytest.mark.parametrize(("name", "settings"), [(n, s) for n, several in SETTINGS.items() for s in several])
def test_each_optimizer_trains_with_each_scheduler(
    tmp_path: Path, name: str, settings: list[str], scheduler: str
) -> None:
    config = compose_job([f"optimizer={name}", f"scheduler={scheduler}", *settings])
    model = MLP(input_shape=(1, 8, 8), num_classes=10, norm=BatchNorm, width=8, depth=1)
    module = Classifier(model, 10, config["optimizer"], config["scheduler"])
    trainer = pl.Trainer(
        max_epochs=1, limit_train_batches=3, limit_val_batches=0, logger=False, accelerator="cpu",
        default_root_dir=tmp_path, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=Digits(batch_size=64, seed=0))
    assert trainer.global_step == 3
    (optimizer,) = trainer.optimizers
    for key in ("momentum", "nesterov", "amsgrad", "centered"):
        wanted = config["optimizer"].get(key)
        moves = key == "momentum" and scheduler == "onecycle" and wanted
        assert wanted is None or moves or optimizer.param_groups[0][key] == wanted, f"{key} is as chosen"


@pytest.mark.parametrize(
    ("momentum", "nesterov"), [("0.9", True), ("0.5", True), ("0", False), ("0.0", False)]
)
def test_nesterov_follows_the_momentum(momentum: str, nesterov: bool) -> None:
    config = compose_job([f"optimizer.momentum={momentum}"])
    assert config["optimizer"]["nesterov"] is nesterov
    chosen = compose_job([f"optimizer.momentum={momentum}", f"optimizer.nesterov={nesterov}"])
    assert identity.identity(OmegaConf.create(config)) == identity.identity(OmegaConf.create(chosen))
    assert (
        instantiate(config["optimizer"])([torch.nn.Parameter(torch.zeros(2))]).defaults["nesterov"]
        is nesterov
    )


def test_a_setting_that_follows_one_that_a_search_has_yet_to_choose() -> None:
    file = OmegaConf.load(Path(bnlight.conf.__path__[0], "optimizer", "sgd.yaml"))
    compose_job([])
    bases = []
    for lr in (0.1, 0.2):
        base = OmegaConf.create({"optimizer": file, "seed": 0})
        base.optimizer.update(momentum="???", lr=lr)
        bases.append(identity.identity(base, complete=False))
    assert bases[0] != bases[1]


@pytest.mark.parametrize("words", [["optimizer.momentum=0"], ["+optimizer.dampening=0.1"]])
def test_nesterov_without_momentum_is_refused_before_the_job(
    project: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    assert main(["train", *QUICK, *words, "optimizer.nesterov=true"]) == 2
    said = capsys.readouterr().err
    assert "Nesterov's step needs a momentum above 0 and no dampening" in said
    assert not list(project.glob("outputs/*/*/"))


def test_a_sweep_over_the_momentum_from_none_on(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *QUICK, "-m", "optimizer.momentum=0,0.9", "scheduler=cosine,onecycle"]) == 0
    configs = [yaml.safe_load(path.read_text()) for path in project.glob("outputs/*/*/config.yaml")]
    found: set[Any] = {(c["optimizer"]["momentum"], c["optimizer"]["nesterov"]) for c in configs}
    assert found == {(0, False), (0.9, True)}
    capsys.readouterr()
    assert main(["compare", "outputs/train", "--by", "momentum"]) == 0
    assert "nesterov" not in capsys.readouterr().out
    assert len(configs) == 4
