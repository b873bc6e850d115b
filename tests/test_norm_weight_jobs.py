"""Weight normalization and weight standardization in jobs: from the command line, resumed, on two ranks."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import yaml
from conftest import SMALL
from weights import originals, parametrized

from bnlight.callbacks import InitializeWeightNorm
from bnlight.cli import main
from bnlight.data import Digits
from bnlight.lightning import Classifier
from bnlight.models import MLP
from bnlight.norm import NORMS, weight_norm

FEW = [f"+trainer.limit_{stage}_batches=2" for stage in ("train", "val", "test")]
INITIALIZED = ["callbacks=[default,initialize_weight_norm]"]
PLAIN = [argument for argument in SMALL if not argument.startswith("model")]


def job_of(project: Path) -> Path:
    (job,) = (path for path in (project / "outputs" / "train").iterdir() if path.is_dir())
    return job


@pytest.mark.parametrize(
    "arguments",
    [
        [
            "weight=weight_norm",
            "model=mlp",
            "model.depth=1",
            *INITIALIZED,
            "trainer.precision=bf16-true",
        ],
        ["weight=weight_norm", "model=cnn", "model.widths=[4,4]", *INITIALIZED],
        ["weight=weight_norm", "model=resnet", "model.depth=8", "model.width=4", "weight.exclude=classifier"],
        ["weight=weight_standardization", "norm=group", "model=resnet", "model.depth=8", "model.width=4"],
    ],
)
def test_it_trains_from_the_command_line_and_its_checkpoints_load(
    project: Path, arguments: list[str]
) -> None:
    assert main(["train", *PLAIN, *FEW, "norm=none", *arguments]) == 0
    path = job_of(project) / "checkpoints" / "best.ckpt"
    torch.load(path, weights_only=True)
    module = Classifier.load_from_checkpoint(path).eval()
    assert parametrized(module.model)
    assert ("classifier" in parametrized(module.model)) == (
        "weight=weight_norm" in arguments and "weight.exclude=classifier" not in arguments
    )
    assert module(torch.zeros(2, 1, 8, 8, dtype=module.dtype)).shape == (2, 10)


def test_the_weight_is_part_of_a_jobs_identity(project: Path) -> None:
    options = [[], ["weight=weight_norm"], ["weight=weight_norm", *INITIALIZED]]
    for option in options:
        assert main(["train", *SMALL, *FEW, "norm=none", *option]) == 0
    jobs = [path.parent for path in project.glob("outputs/train/*/result.json")]
    assert len(jobs) == len(options)
    chosen = [yaml.safe_load((job / "config.yaml").read_text())["job"]["choices"]["weight"] for job in jobs]
    assert sorted(chosen) == ["none", "weight_norm", "weight_norm"]


def test_an_unknown_option_lists_the_choices_and_a_model_without_convolutions_says_what_to_do(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *SMALL, "weight=weight_nrom"]) == 2
    assert "weight_standardization" in capsys.readouterr().err
    assert main(["train", *SMALL, *INITIALIZED]) == 1
    assert "weight=weight_norm" in capsys.readouterr().out
    assert main(["train", *SMALL, "weight=weight_standardization"]) == 1
    assert "MLP has no convolution; linear=True" in capsys.readouterr().out


class Spy(InitializeWeightNorm):
    """Notes the steps before which the first layer's length changes, and its outputs' variance then."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, float]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        layer = pl_module.model.features[1]
        before = originals(layer)[0].detach().clone()
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if not torch.equal(originals(layer)[0], before):
            variance = layer(batch[0].flatten(1)).var(0, correction=0).mean().item()
            self.seen.append((trainer.global_step, variance))


def test_the_first_batch_initializes_a_training_and_a_resumed_one_is_left_alone(tmp_path: Path) -> None:
    def fit(epochs: int, checkpoint: Path | None) -> list[tuple[int, float]]:
        model = weight_norm(MLP((1, 8, 8), 10, NORMS["none"], width=8, depth=1))
        module = Classifier(model, 10, partial(torch.optim.SGD, lr=0.1))
        spy = Spy()
        trainer = pl.Trainer(
            max_epochs=epochs, callbacks=[spy], accelerator="cpu", default_root_dir=tmp_path, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            num_sanity_val_steps=0, accumulate_grad_batches=4,
        )  # fmt: skip
        trainer.fit(module, datamodule=Digits(seed=0), ckpt_path=checkpoint)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return spy.seen

    ((step, variance),) = fit(1, None)
    assert step == 0
    assert variance == pytest.approx(1, abs=1e-4)
    assert fit(2, tmp_path / "last.ckpt") == []


# A data module that notes the variance of the first layer's outputs in the first step (the initialization's own
# forward comes before it), and at the end of training a checksum of each parameter.
MINE = """
import json, os, pathlib
from bnlight.data import Digits

class Data(Digits):
    def setup(self, stage):
        super().setup(stage)
        if stage == "fit":
            self.variances = []
            self.trainer.lightning_module.model.features[1].register_forward_hook(self.note)

    def note(self, layer, args, output):
        self.variances.append(output.var(0, correction=0).mean().item())

    def teardown(self, stage):
        if stage == "fit":
            sums = [p.detach().double().sum().item() for p in self.trainer.lightning_module.parameters()]
            seen = {"variance": self.variances[1], "sums": sums}
            pathlib.Path(f"seen-{os.environ['RANK']}.json").write_text(json.dumps(seen))
"""


def test_two_ranks_start_from_rank_0s_batch_and_stay_equal(
    project: Path, bnlight: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    (project / "mine.py").write_text(MINE)
    arguments = [*SMALL, "trainer=ddp", "trainer.accelerator=cpu", "data=custom", "data._target_=mine.Data"]
    done = bnlight("train", *arguments, "norm=none", "weight=weight_norm", *INITIALIZED)
    assert done.returncode == 0, done.stdout + done.stderr
    zero, one = (json.loads((project / f"seen-{rank}.json").read_text()) for rank in (0, 1))
    assert zero["sums"] == one["sums"]
    assert zero["variance"] == pytest.approx(1, abs=1e-4)
    assert one["variance"] != pytest.approx(1, abs=1e-4)
