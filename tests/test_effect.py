"""A choice that reaches nothing is an error before the training; a job is filed by what it is, in whatever state."""

from __future__ import annotations

import copy
import functools
import json
import pickle
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from own_code import MAE, MINE, SERIES, SHORT

from bnlight.cli import main
from bnlight.compare.read import read_runs
from bnlight.lightning.factory import Factory
from bnlight.run.status import update_status

OTHERS = '''

class Deaf(nn.Module):
    """Takes a norm and uses none."""

    def __init__(self, num_classes, norm, heard=False):
        super().__init__()
        middle = norm(64) if heard else nn.BatchNorm1d(64)
        self.layers = nn.Sequential(nn.Flatten(), middle, nn.Linear(64, num_classes))

    def forward(self, x):
        return self.layers(x)


class OwnEps(Deaf):
    """Says the norm's eps itself, and asks what norm it is given."""

    def __init__(self, num_classes, norm, ask=False):
        super().__init__(num_classes, norm)
        self.layers[1] = norm(64, eps=norm.keywords["eps"] / 2) if ask else norm(64, eps=0.5)


class OwnOptimizer(Factories):
    """Takes an optimizer and a scheduler, and trains with its own."""

    def __init__(self, norm, optimizer, scheduler=None, lr=None):
        super().__init__(norm, optimizer, scheduler)
        self.lr = lr

    def configure_optimizers(self):
        if self.lr:
            return self.optimizer(self.parameters(), lr=self.lr)
        return torch.optim.Adam(self.parameters())


class Heir(Classifier):
    """A classifier with an optimizer of its own, made by hand."""

    def configure_optimizers(self):
        if self.label_smoothing:
            return hydra.utils.instantiate(self.optimizer)(self.parameters())
        return torch.optim.Adam(self.parameters())


class Late(Factories):
    """Builds its layers when the Trainer says so."""

    def __init__(self, norm, optimizer):
        pl.LightningModule.__init__(self)
        self.norm, self.optimizer = norm, optimizer

    def setup(self, stage):
        self.net = net(copy.deepcopy(self.norm))

    def configure_optimizers(self):
        return self.optimizer(self.parameters())


class Forgets(Regression):
    """Takes a network and trains another."""

    def __init__(self, model, copied=False):
        super().__init__()
        if copied:
            self.net = copy.deepcopy(model)


class Net(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.layers = net(norm)

    def forward(self, x):
        return self.layers(x)


class Broken(Regression):
    def training_step(self, batch, index):
        raise RuntimeError("no training today")
'''
IMPORTS = "import copy\nimport hydra\nfrom bnlight.lightning import Classifier\n"
DEAF = [*SHORT, "trainer.max_epochs=1", "model=custom", "model._target_=mine.Deaf"]
OWN_EPS = [*SHORT, "trainer.max_epochs=1", "model=custom", "model._target_=mine.OwnEps"]
OWN = [*SERIES, *MAE, "trainer.max_epochs=1", "module=custom"]
OPTIMIZER = [*OWN, "module._target_=mine.OwnOptimizer"]
HEIR = [*SHORT, "trainer.max_epochs=1", "model=mlp", "module=custom", "module._target_=mine.Heir"]
FORGETS = [*OWN, "module._target_=mine.Forgets", "model=custom", "model._target_=mine.Net"]
MLP = [*SHORT, "trainer.max_epochs=1", "model=mlp"]


@pytest.fixture
def mine(project: Path) -> Path:
    (project / "mine.py").write_text(IMPORTS + MINE + OTHERS)
    return project


def written(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob("outputs/*/*/status.json"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (DEAF, "mine.Deaf takes `norm` and has not used it"),
        ([*DEAF, "norm=none"], "mine.Deaf takes `norm` and has not used it"),
        ([*OWN_EPS, "norm.eps=0.1"], "norm.eps=0.1 would have no effect: mine.OwnEps always calls norm(...)"),
        (FORGETS, "mine.Forgets takes `model`, but nothing of the network that it is given (mine.Net) is in it"),
        ([*OPTIMIZER, "optimizer=adam"], "optimizer=adam would have no effect: mine.OwnOptimizer takes `optimizer`"),
        ([*OPTIMIZER, "scheduler=linear"], "scheduler=linear would have no effect"),
        ([*OPTIMIZER, "+module.lr=0.1", "optimizer.lr=1"], "always gives its optimizer a value of its own"),
        ([*HEIR, "optimizer=rmsprop"], "trains with Adam of its own"),
        ([*HEIR, "optimizer=adam", "optimizer.lr=0.1"], "optimizer.lr=0.1 would have no effect"),
        ([*MLP, "sync=world"], "sync=world would have no effect: there is one process"),
        ([*MLP, "+weight.eps=0.1"], "+weight.eps=0.1 would have no effect: there is no weight in this job"),
        ([*MLP, "scheduler=none", "+scheduler.eta_min=0.1"], "there is no scheduler in this job"),
        ([*MLP, "monitor.metric=null", "monitor.mode=min"], "monitor.metric is null, so nothing is monitored"),
    ],
)  # fmt: skip
def test_what_reaches_nothing_is_refused_before_the_training(
    mine: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert main(["train", *arguments]) == 1
    assert said in capsys.readouterr().out
    (job,) = written(mine)
    assert not (job / "checkpoints" / "best.ckpt").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        [*DEAF, "+model.heard=true", "norm=none"],
        [*OWN_EPS, "+model.ask=true", "norm.eps=0.1"],
        OWN_EPS,
        OPTIMIZER,
        [*OPTIMIZER, "+module.lr=0.1", "optimizer.momentum=0.5"],
        [*HEIR, "+module.label_smoothing=0.1", "optimizer=adam", "optimizer.lr=0.1"],
        [*OWN, "module._target_=mine.Late", "optimizer.lr=0.1", "norm=group", "norm.num_groups=4"],
        [*FORGETS, "+module.copied=true"],
        [*MLP, "sync=none"],
    ],
)  # fmt: skip
def test_what_reaches_something_trains(mine: Path, arguments: list[str]) -> None:
    assert main(["train", *arguments]) == 0


def test_a_failed_job_is_filed_by_what_it_is(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = [*OWN, "replace_norm=true", "norm=layer"]
    assert main(["train", *own, "module._target_=mine.Regression"]) == 0
    assert main(["train", *own, "module._target_=mine.Broken"]) == 1
    assert main(["train", *own, "module._target_=mine.NotThere"]) == 1
    for job in written(mine):
        assert "cnn" not in job.name
        block = yaml.safe_load((job / "config.yaml").read_text())["job"]
        assert block["choices"]["model"] == block["choices"]["module"] == job.name.split("-")[1]
        assert block["unused"] == {"model": "cnn", "optimizer": "sgd", "scheduler": "cosine"}
    read = read_runs(mine / "outputs" / "train")
    assert dict(zip(read.runs["model"], read.runs["state"], strict=True)) == {
        "Regression": "done",
        "Broken": "failed",
        "NotThere": "failed",
    }
    assert not [key for key in read.configs if key.split(".")[0] in ("optimizer", "scheduler")]


@pytest.mark.parametrize("state", ["running", "failed", "diverged", "preempted", "interrupted", "done"])
def test_a_job_is_in_the_same_row_in_every_state(mine: Path, state: str) -> None:
    """Also one whose files are of a time when they did not say what is unused."""
    assert main(["train", *OWN, "module._target_=mine.Regression", "replace_norm=true"]) == 0
    (job,) = written(mine)
    before = read_runs(job)
    update_status(job, state=state)
    config = yaml.safe_load((job / "config.yaml").read_text())
    config["job"]["choices"] |= config["job"].pop("unused")
    (job / "config.yaml").write_text(yaml.safe_dump(config))
    (job / "result.json").unlink()
    after = read_runs(job)
    same = ["job", "norm", "model", "data", "seed", "batch_size", "identity"]
    pd.testing.assert_frame_equal(after.runs[same], before.runs[same])
    assert {*after.configs} == {*before.configs}


def test_a_module_that_takes_the_default_model_is_filed_under_it(mine: Path) -> None:
    arguments = [text for text in HEIR if text != "model=mlp"]
    assert main(["train", *arguments, "+trainer.limit_train_batches=1"]) == 0
    (job,) = written(mine)
    config = json.loads((job / "result.json").read_text())["config"]
    assert config["job"]["choices"]["model"] == "cnn"
    assert config["job"]["unused"] == {}
    assert read_runs(job).runs["model"].tolist() == ["cnn"]


def test_a_norm_option_that_was_typed_wins_over_the_replaced_layer_also_at_its_default(mine: Path) -> None:
    import bnlight

    plain = [*SHORT, "trainer.max_epochs=1", "model=custom", "model._target_=mine.Plain", "replace_norm=true"]
    assert main(["train", *plain, "norm.eps=1e-5"]) == 0
    (job,) = written(mine)
    assert bnlight.load(job).model.layers[1].eps == 1e-5  # it has 1e-3 itself


def test_a_factory_knows_what_was_used_of_it() -> None:
    def made(given: Any) -> Factory:
        return Factory(functools.partial(dict, **given))

    factory = made({"a": 1, "b": 2})
    assert isinstance(factory, functools.partial)
    assert (factory.called, factory.reached) == (False, set())
    assert copy.deepcopy(factory)(a=3) == {"a": 3, "b": 2}
    assert (factory.called, factory.reached) == (True, {"b"})
    asked = made({"a": 1})
    assert asked.func is dict
    assert asked.called
    assert asked.keywords == {"a": 1}
    assert asked.reached == {"a"}
    again = pickle.loads(pickle.dumps(asked))
    assert type(again) is functools.partial
    assert again() == {"a": 1}
