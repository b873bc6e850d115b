"""Callbacks and loggers of the user's own are given what the config says, and nothing of bnlight's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import SMALL

from bnlight.cli import main

MINE = '''
import json
import pathlib
import pytorch_lightning as pl
from pytorch_lightning.callbacks import ModelCheckpoint


class Told(pl.Callback):
    """Its arguments are called as some of bnlight's own callbacks' are."""

    def __init__(self, every=7, dirpath="mine", text=None, at=None, **others):
        self.seen = {"every": every, "dirpath": dirpath, "text": text, "at": str(at), "others": others}

    def on_fit_start(self, trainer, module):
        pathlib.Path("seen.json").write_text(json.dumps(self.seen))


class Keeps(ModelCheckpoint):
    def __init__(self, every=3, **kwargs):
        super().__init__(**kwargs)
        pathlib.Path("keeps.json").write_text(json.dumps({"every": every}))
'''
QUICK = [*SMALL, "progress=off", "+trainer.limit_train_batches=4"]


@pytest.fixture
def mine(project: Path) -> Path:
    (project / "mine.py").write_text(MINE)
    return project


def test_a_callbacks_own_every_and_dirpath_stay_its_own(mine: Path) -> None:
    assert main(["train", *QUICK, "+callbacks.told._target_=mine.Told", "checkpoint_every=5"]) == 0
    seen = json.loads((mine / "seen.json").read_text())
    assert seen == {"every": 7, "dirpath": "mine", "text": None, "at": "None", "others": {}}


def test_one_that_writes_checkpoints_is_told_where_and_not_how_often(mine: Path) -> None:
    keeps = ["+callbacks.keeps._target_=mine.Keeps", "+callbacks.keeps.filename=kept"]
    assert main(["train", *QUICK, *keeps, "checkpoint_every=5"]) == 0
    assert json.loads((mine / "keeps.json").read_text()) == {"every": 3}
    (job,) = mine.glob("outputs/train/*")
    assert (job / "checkpoints" / "kept.ckpt").exists()
    assert (job / "checkpoints" / "last.ckpt").exists()


@pytest.mark.parametrize("launch", [[], ["-m", "hydra/launcher=parallel", "hydra.launcher.n_jobs=1"]])
def test_an_escaped_interpolation_and_keys_of_several_kinds_arrive_as_they_are(
    mine: Path, launch: list[str]
) -> None:
    callback = r"+callbacks.told={_target_: mine.Told, text: 'a \${b} c', at: {1: x, two: y, false: z}}"
    assert main(["train", *QUICK, *launch, callback]) == 0
    seen = json.loads((mine / "seen.json").read_text())
    assert seen["text"] == "a ${b} c"
    assert seen["at"] == "{1: 'x', 'two': 'y', False: 'z'}"


def test_a_logger_of_lightnings_logs_beside_metrics_csv(mine: Path) -> None:
    target = "logger._target_=pytorch_lightning.loggers.CSVLogger"
    assert main(["train", *QUICK, "logger=custom", target, "+logger.save_dir=logs", "+logger.name=mine"]) == 0
    (metrics,) = mine.glob("logs/mine/version_0/metrics.csv")
    assert "val/accuracy" in metrics.read_text().splitlines()[0]
    (job,) = mine.glob("outputs/train/*")
    assert (job / "metrics.csv").exists()


def test_a_logger_that_is_none_is_refused_in_words(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *QUICK, "logger=custom", "logger._target_=mine.Told"]) == 1
    assert "expected a class derived from pytorch_lightning.loggers.Logger" in capsys.readouterr().out
