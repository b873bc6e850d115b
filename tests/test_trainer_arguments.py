"""Every argument of Lightning's Trainer works in a job, or is refused in words before there is one."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
import pytorch_lightning as pl
from conftest import SMALL

from bnlight.cli import main
from bnlight.run.ranks.devices import WrongDevices, devices_of

WORKS = {
    "accelerator": ["trainer.accelerator=auto"],
    "strategy": ["trainer.strategy=ddp"],
    "devices": ["trainer.devices=auto"],
    "num_nodes": ["trainer.num_nodes=1"],
    "precision": ["trainer.precision=bf16-mixed"],
    "max_epochs": ["trainer.max_epochs=2"],
    "min_epochs": ["+trainer.min_epochs=1"],
    "max_steps": ["+trainer.max_steps=4"],
    "min_steps": ["+trainer.min_steps=1"],
    "max_time": ["+trainer.max_time='00:00:05:00'"],
    "limit_val_batches": ["+trainer.limit_val_batches=1"],
    "limit_test_batches": ["+trainer.limit_test_batches=1"],
    "limit_predict_batches": ["+trainer.limit_predict_batches=1"],
    "overfit_batches": ["+trainer.overfit_batches=1"],
    "val_check_interval": ["trainer.val_check_interval=2"],
    "check_val_every_n_epoch": ["trainer.check_val_every_n_epoch=2", "trainer.max_epochs=4"],
    "num_sanity_val_steps": ["+trainer.num_sanity_val_steps=1"],
    "log_every_n_steps": ["trainer.log_every_n_steps=1"],
    "enable_model_summary": ["+trainer.enable_model_summary=true"],
    "accumulate_grad_batches": ["trainer.accumulate_grad_batches=2"],
    "gradient_clip_val": ["trainer.gradient_clip_val=1.0"],
    "gradient_clip_algorithm": ["+trainer.gradient_clip_algorithm=value", "trainer.gradient_clip_val=1.0"],
    "deterministic": ["trainer.deterministic=true"],
    "benchmark": ["+trainer.benchmark=true"],
    "inference_mode": ["+trainer.inference_mode=false"],
    "use_distributed_sampler": ["+trainer.use_distributed_sampler=false"],
    "profiler": ["+trainer.profiler=simple"],
    "detect_anomaly": ["+trainer.detect_anomaly=true"],
    "plugins": ["+trainer.plugins={_target_: pytorch_lightning.plugins.environments.LightningEnvironment}"],
    "sync_batchnorm": ["+trainer.sync_batchnorm=true"],
    "reload_dataloaders_every_n_epochs": ["+trainer.reload_dataloaders_every_n_epochs=1"],
    "enable_autolog_hparams": ["+trainer.enable_autolog_hparams=false"],
    "limit_train_batches": [],
}  # fmt: skip
REFUSED = {
    "callbacks": ("[]", "callbacks are added by +callbacks.mine._target_="),
    "logger": ("false", "a logger is chosen by logger=custom"),
    "enable_checkpointing": ("false", "callbacks.best=null callbacks.last=null"),
    "enable_progress_bar": ("true", "progress=bar, plain or off"),
    "default_root_dir": ("x", "paths.outputs"),
    "model_registry": ("x", "logger.log_model=best"),
    "fast_dev_run": ("true", "for a short one: trainer.max_epochs=1"),
    "barebones": ("true", "no callbacks and no metrics"),
}
WRONG = [
    ("trainer.devices=0", "expected 1, 2, ..., 'auto', or a list of GPUs such as [0,2]"),
    ("trainer.devices=null", "expected 1, 2, ..."),
    ("trainer.devices=1.5", "expected 1, 2, ..."),
    ("trainer.devices=[0]", "trainer.devices=[0] lists GPUs, and trainer.accelerator=cpu has none"),
    ("trainer.strategy=ddp_spawn", "bnlight starts them itself"),
    ("trainer.strategy=ddp_fork", "trainer.strategy=ddp"),
    ("trainer.strategy=ddp_notebook", "trainer.strategy=ddp"),
    ("trainer.strategy={_target_: pytorch_lightning.strategies.DDPStrategy, start_method: spawn}", "itself"),
    ("trainer.strategy=nonsense", "trainer.strategy=nonsense is unknown; choose one of auto, ddp"),
    ("trainer.precision=x", "Precision 'x' is invalid"),
    ("trainer.accelerator=x", "trainer.accelerator=x: expected auto, cpu or gpu"),
    ("trainer.num_nodes=x", "trainer.num_nodes=x: expected 1, 2"),
    ("trainer.accumulate_grad_batches=0", "accumulate_grad_batches"),
    ("+trainer.nonsense=1", "has no argument nonsense. Its arguments: accelerator, strategy"),
    ("+trainer.limit_val_batches=0", "validates never, but the best checkpoint is chosen by val/accuracy"),
    ("trainer.check_val_every_n_epoch=2", "with trainer.max_epochs=1 validates never"),
]  # fmt: skip


def test_each_argument_of_the_trainer_is_in_one_of_the_tables() -> None:
    assert {*WORKS, *REFUSED} == {*inspect.signature(pl.Trainer).parameters}
    assert not {*WORKS} & {*REFUSED}


@pytest.mark.parametrize("arguments", WORKS.values(), ids=WORKS)
def test_what_works_gives_a_job_with_a_result(project: Path, arguments: list[str]) -> None:
    assert main(["train", *SMALL, "progress=off", "+trainer.limit_train_batches=4", *arguments]) == 0
    (result,) = project.glob("outputs/train/*/result.json")
    metrics = json.loads(result.read_text())["metrics"]
    assert {"val/accuracy", "test/accuracy", "train/loss"} <= metrics.keys()


@pytest.mark.parametrize(
    ("argument", "said"),
    [*((f"+trainer.{key}={value}", way) for key, (value, way) in REFUSED.items()), *WRONG],
)
def test_what_does_not_work_is_refused_before_the_job(
    project: Path, capsys: pytest.CaptureFixture[str], argument: str, said: str
) -> None:
    assert main(["train", *SMALL, argument]) == 2
    assert said in capsys.readouterr().err
    assert not list(project.glob("outputs/*/*/"))


def test_devices_are_a_number_or_places_in_every_spelling() -> None:
    spelled = [1, "2", [0, 2], "0,", "0,2"]
    assert [devices_of({"devices": one}) for one in spelled] == [1, 2, [0, 2], [0], [0, 2]]
    assert devices_of({"devices": -1, "accelerator": "cpu"}) == 1
    for wrong in ([], [0, 0], "x", "0,x", -2, True, [-1]):
        with pytest.raises(WrongDevices, match="is not a number of devices"):
            devices_of({"devices": wrong})


def test_a_validation_that_comes_later_is_waited_for(project: Path) -> None:
    later = ["trainer.check_val_every_n_epoch=null", "trainer.val_check_interval=6", "trainer.max_epochs=3"]
    assert main(["train", *SMALL, "progress=off", "+trainer.limit_train_batches=4", *later]) == 0
    (result,) = project.glob("outputs/train/*/result.json")
    assert "val/accuracy" in json.loads(result.read_text())["metrics"]
