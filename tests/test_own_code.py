"""Networks, LightningModules and data modules of the user's own: what they are given, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import yaml
from own_code import MAE, MINE, REGRESSION, SERIES, SHORT
from torch import nn

from bnlight import norm as norms
from bnlight.cli import main
from bnlight.lightning import Classifier
from bnlight.lightning.build import arguments, complete, explicit


@pytest.fixture
def mine(project: Path) -> Path:
    (project / "mine.py").write_text(MINE)
    return project


def jobs(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob("outputs/*/*/status.json"))


def result(job: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((job / "result.json").read_text())
    return value


def train(folder: Path, *arguments: str) -> Path:
    before = set(jobs(folder))
    assert main(["train", *arguments]) == 0
    (job,) = set(jobs(folder)) - before
    return job


PLAIN = [*SHORT, "model=custom", "model._target_=mine.Plain", "norm=renorm"]


def test_a_network_that_takes_no_norm_is_refused_with_both_ways_out(
    mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *PLAIN]) == 1
    said = capsys.readouterr().out
    assert "mine.Plain takes no argument `norm`" in said
    assert "replace_norm=true" in said
    assert "norm(channels)" in said


@pytest.mark.parametrize("ranks", [1, 2])
def test_replace_norm_puts_the_chosen_norm_in_it_and_its_checkpoints_load(mine: Path, ranks: int) -> None:
    several = ["trainer=ddp", "trainer.accelerator=cpu"] if ranks == 2 else []
    job = train(mine, *PLAIN, "replace_norm=true", *several)
    assert result(job)["world_size"] == ranks
    module = Classifier.load_from_checkpoint(job / "checkpoints" / "best.ckpt")
    layer = module.model.layers[1]
    assert type(layer) is norms.BatchRenorm
    assert layer.eps == 1e-3  # the layer's own, as nobody has chosen another
    assert "BatchRenorm" in (job / "job.log").read_text()


def test_what_the_command_says_of_the_norm_wins_over_the_replaced_layer(mine: Path) -> None:
    job = train(mine, *PLAIN, "replace_norm={include: ['layers.1']}", "norm.eps=0.25")
    module = Classifier.load_from_checkpoint(job / "checkpoints" / "last.ckpt")
    assert module.model.layers[1].eps == 0.25


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([*PLAIN, "replace_norm={exclude: ['*']}"], "no norm to replace"),
        ([*PLAIN, "replace_norm={inclde: ['*']}"], "replace_norm has no inclde"),
        ([*SHORT, "model=mlp", "replace_norm=true"], "leave replace_norm out"),
        ([*SERIES, "module=custom", "module._target_=mine.Regression"], "mine.Regression takes no argument `norm`"),
        ([*REGRESSION, *MAE, "optimizer=adam"], "optimizer=adam would have no effect"),
        ([*REGRESSION, *MAE, "optimizer.lr=1"], "optimizer.lr=1 would have no effect"),
        ([*REGRESSION], "chosen by val/accuracy, which was not logged; logged: train/mse, val/mae"),
        ([*SERIES], "Series has no input_shape"),
        ([*SHORT, "module=custom", "module._target_=mine.net"], "expected a class derived from"),
        ([*SHORT, "data=custom", "data._target_=mine.Plain", "+data.num_classes=2"], "LightningDataModule"),
    ],
)  # fmt: skip
def test_what_would_have_no_effect_or_cannot_work_is_refused(
    mine: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert main(["train", *arguments]) == 1
    assert said in capsys.readouterr().out


def test_a_module_names_its_metric_and_the_job_follows_it(
    mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = train(mine, *REGRESSION, *MAE, "norm=renorm", "trainer.max_epochs=4", "+module.lr=0.1")
    said = capsys.readouterr().out
    assert "val/mae" in said
    assert "test/mae" in said
    assert job.name.startswith("renorm-Regression-Series-s0-")
    best = torch.load(job / "checkpoints" / "best.ckpt", weights_only=True)
    assert best["callbacks"]  # of the lowest error:
    saved = next(v for k, v in best["callbacks"].items() if "val/mae" in k)
    assert saved["best_model_score"] == pytest.approx(best["metrics"]["val/mae"])
    assert result(job)["metrics"]["val/mae"] == pytest.approx(best["metrics"]["val/mae"])
    assert best["hyper_parameters"] == {"lr": 0.1}
    assert result(job)["unused"] == ["model", "optimizer", "scheduler"]
    assert "those parts of the config are not used" in (job / "job.log").read_text()


def test_the_score_that_a_sweeper_gets_is_the_monitored_metric(
    mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bnlight.run.application import run_hydra
    from bnlight.run.job import run_job

    monkeypatch.syspath_prepend(str(mine))
    scores = []

    def task(config: Any) -> None:
        scores.append(run_job(config))

    run_hydra([*REGRESSION, *MAE], "train", task=task)
    (job,) = jobs(mine)
    assert scores == [result(job)["metrics"]["val/mae"]]


def test_factories_arrive_as_callables_and_the_schedule_knows_its_steps(mine: Path) -> None:
    arguments = [*SERIES, *MAE, "module=custom", "module._target_=mine.Factories", "norm=group"]
    job = train(mine, *arguments, "norm.num_groups=2", "optimizer.lr=0.01", "scheduler=linear")
    last = torch.load(job / "checkpoints" / "last.ckpt", weights_only=True)  # no factory is pickled in it
    assert last["lr_schedulers"][0]["total_iters"] == 2 * 6
    assert last["optimizer_states"][0]["param_groups"][0]["initial_lr"] == 0.01
    assert last["hyper_parameters"] == {}
    assert "net.1.running_mean" not in last["state_dict"]


def test_a_weight_method_reaches_the_layers_of_a_module(mine: Path) -> None:
    import bnlight

    job = train(mine, *REGRESSION, *MAE, "weight=weight_norm", "norm=none")
    module = bnlight.load(job)
    assert "net.0.parametrizations.weight.original0" in module.state_dict()
    assert type(module.net[1]) is norms.NoNorm


def test_no_validation_no_test_and_manual_optimization(
    mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*SERIES, "module=custom", "module._target_=mine.Bare", "replace_norm=true"]
    assert main(["train", *arguments]) == 1
    assert "logged: train/mse" in capsys.readouterr().out
    job = train(mine, *arguments, "monitor.metric=null")
    assert result(job)["metrics"].keys() == {"train/mse"}
    assert torch.load(job / "checkpoints" / "best.ckpt", weights_only=True)["epoch"] == 1
    chosen = train(mine, *arguments, "monitor.metric=train/mse", "monitor.mode=min")
    assert (chosen / "checkpoints" / "best.ckpt").exists()


def test_ranks_that_see_different_losses_stop_together(
    mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = ["module=custom", "module._target_=mine.Odd", "replace_norm=true", "trainer.log_every_n_steps=1"]
    job = train(mine, *SERIES, *odd, *MAE, "trainer=ddp", "trainer.accelerator=cpu", "trainer.max_epochs=50")
    assert result(job)["steps"] < 10
    assert "a loss is not finite on another rank" in result(job)["diverged"]
    assert "diverged" in capsys.readouterr().out


def test_early_stopping_follows_the_monitored_metric(mine: Path) -> None:
    stopping = ["callbacks=early_stopping", "callbacks.early_stopping.patience=1", "+module.lr=0.0"]
    job = train(mine, *REGRESSION, *MAE, *stopping, "trainer.max_epochs=9")
    assert result(job)["epochs"] < 9


def test_options_that_are_off_do_not_change_a_jobs_identity(mine: Path) -> None:
    from omegaconf import OmegaConf

    from bnlight.run.identity import identity

    before = OmegaConf.create({"seed": 0, "data": {"batch_size": 4}})
    off: dict[str, Any] = {"init_from": None, "replace_norm": False}
    off |= {"monitor": {"metric": "val/accuracy", "mode": "max"}}
    off |= {"data": {"batch_size": 4, "shift": {"noise": 0, "contrast": 1, "seed": 3}}}
    assert identity(OmegaConf.merge(before, off)) == identity(before)
    for change in ({"replace_norm": True}, {"monitor": {"mode": "min"}}, {"data": {"shift": {"noise": 0.1}}}):
        assert identity(OmegaConf.merge(before, off, change)) != identity(before)


def test_a_config_names_only_what_its_class_takes() -> None:
    module = "tests_of_arguments"
    import sys
    import types

    class Base(pl.LightningModule):
        def __init__(self, model: Any, lr: float = 0.1) -> None:
            super().__init__()

    class Handed(Base):
        def __init__(self, width: int = 3, **kwargs: Any) -> None:
            super().__init__(**kwargs)

    class Open(nn.Module):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__()

    class Bare(nn.Module):
        pass

    sys.modules[module] = types.SimpleNamespace(Handed=Handed, Open=Open, Bare=Bare)  # type: ignore[assignment]
    try:
        assert [*arguments({"_target_": f"{module}.Handed"})] == ["model", "lr", "width"]
        assert complete({"_target_": f"{module}.Handed"}, norm=1, model=2).keys() == {"_target_", "model"}
        assert complete({"_target_": f"{module}.Open"}, norm=1).keys() == {"_target_", "norm"}
        assert complete({"_target_": f"{module}.Open"}, named_only=True, norm=1).keys() == {"_target_"}
        assert complete({"_target_": f"{module}.Bare"}, norm=1).keys() == {"_target_"}
    finally:
        del sys.modules[module]


def test_a_norms_default_that_is_written_out_is_nobodys_choice() -> None:
    written = {"_target_": "bnlight.norm.BatchNorm", "_partial_": True, "eps": 1e-5, "momentum": 0.2}
    assert explicit(written) == {"_target_": "bnlight.norm.BatchNorm", "_partial_": True, "momentum": 0.2}


def test_a_wrong_mode_is_refused_before_anything_is_written(
    mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "monitor.mode=lowest"]) == 2
    assert "choose one of max, min" in capsys.readouterr().err
    assert not jobs(mine)


def test_the_config_on_disk_is_the_whole_config(mine: Path) -> None:
    job = train(mine, *REGRESSION, *MAE)
    config = yaml.safe_load((job / "config.yaml").read_text())
    assert config["replace_norm"] is True
    assert config["job"]["choices"]["module"] == "Regression"
