"""Starting from given weights: prefixes, other norms, what does not fit, and what it means for a job."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import SMALL
from torch import Tensor, nn

from bnlight.cli import main
from bnlight.lightning import Classifier
from bnlight.lightning.initial import initialize
from bnlight.models import CNN
from bnlight.norm import NORMS

Save = Callable[[Any], Path]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    def write(content: Any) -> Path:
        torch.save(content, tmp_path / "weights.pt")
        return tmp_path / "weights.pt"

    return write


def net(norm: Callable[[int], nn.Module] = nn.BatchNorm1d, width: int = 6) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, width), norm(width), nn.ReLU(), nn.Linear(width, 2))


def trained() -> nn.Sequential:
    model = net()
    for _ in range(3):
        model(torch.randn(8, 4))
    return model.eval()


class Wrapped(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("nest", ["", "state_dict", "model_state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "model.", "module.", "_orig_mod.", "module.model."])
def test_a_state_dict_is_found_in_its_file_and_under_its_prefix(save: Save, nest: str, prefix: str) -> None:
    source = trained()
    state: Any = {prefix + key: value for key, value in source.state_dict().items()}
    file = save({nest: state, "epoch": 3} if nest else state)
    for target in (net(), Wrapped(net())):
        assert "7 tensors" not in initialize(target, file)
        assert same(getattr(target, "model", target).state_dict(), source.state_dict())


@pytest.mark.parametrize("name", [name for name in NORMS if name not in ("instance", "batch_instance")])
def test_a_batch_norms_weights_start_any_norm_and_what_differs_is_told(save: Save, name: str) -> None:
    source, target = trained(), net(NORMS[name])
    first = {key: value.clone() for key, value in target.state_dict().items()}
    said = initialize(target, save(source.state_dict()))
    theirs = source.state_dict()
    for key, value in target.state_dict().items():
        assert torch.equal(value, theirs[key] if key in theirs else first[key]), key
    if name == "group":
        assert "of another norm, left out: 1.running_mean, 1.running_var, 1.num_batches_tracked" in said
    if name in ("batch", "renorm"):
        x = torch.randn(5, 4)
        assert torch.allclose(target.eval()(x), source(x), atol=1e-6)


def test_any_norms_weights_start_a_batch_norm(save: Save) -> None:
    target = net()
    said = initialize(target, save(net(NORMS["switchable"]).state_dict()))
    assert "of another norm, left out: " in said
    target = net()
    said = initialize(target, save(net(NORMS["group"]).state_dict()))
    assert "not in the file, first values: 1.running_mean, 1.running_var" in said


def test_a_bias_that_the_other_norm_makes_redundant_comes_and_goes(save: Save) -> None:
    shapes: Any = {"input_shape": (1, 8, 8), "num_classes": 3, "widths": [4], "depth": 1}
    batch, group = CNN(norm=NORMS["batch"], **shapes), CNN(norm=NORMS["group"], **shapes)
    said = initialize(group, save(batch.state_dict()))
    zeroed = [
        name
        for name, p in group.named_parameters()
        if name.endswith("bias") and name not in batch.state_dict()
    ]
    assert zeroed
    assert all(not group.get_parameter(name).any() for name in zeroed)
    assert f"set to 0: {zeroed[0]}" in said
    assert f"redundant biases, left out: {zeroed[0]}" in initialize(batch, save(group.state_dict()))


def test_what_does_not_fit_is_listed(save: Save) -> None:
    state = trained().state_dict()
    state["9.weight"] = state.pop("3.weight")
    with pytest.raises(
        ValueError, match=r"missing in the file: 3\.weight\n.*but not in the module: 9\.weight"
    ):
        initialize(net(), save(state))
    with pytest.raises(ValueError, match=r"other shapes: 0\.weight \(6, 4\), here \(5, 4\)"):
        initialize(net(width=5), save(trained().state_dict()))
    no_bias = {key: value for key, value in trained().state_dict().items() if key != "3.bias"}
    with pytest.raises(ValueError, match=r"missing in the file: 3\.bias"):
        initialize(net(), save(no_bias))
    with pytest.raises(ValueError, match=r"missing in the file: 0\.weight"):
        initialize(net(), save({"other.weight": torch.ones(2)}))


def test_a_file_without_weights_or_with_programs_is_refused(save: Save, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds a dict with epoch; expected a state dict"):
        initialize(net(), save({"epoch": 3}))
    with pytest.raises(ValueError, match=r"torch\.save\(model\.state_dict\(\), path\)"):
        initialize(net(), save(net()))
    (tmp_path / "text").write_text("no weights")
    with pytest.raises(ValueError, match=r"no file of torch\.save"):
        initialize(net(), tmp_path / "text")


def only(project: Path, pattern: str) -> Path:
    (job,) = project.glob(f"outputs/train/{pattern}")
    return job


def test_a_job_starts_from_another_jobs_weights(project: Path) -> None:
    main(["train", *SMALL])
    first = only(project, "batch-*")
    frozen = ["norm=renorm", "optimizer.lr=0.0"]
    assert main(["train", *SMALL, *frozen, f"init_from={first}"]) == 0
    job = only(project, "renorm-*")
    then = Classifier.load_from_checkpoint(first / "checkpoints" / "best.ckpt")
    now = Classifier.load_from_checkpoint(job / "checkpoints" / "last.ckpt")
    for name, parameter in then.named_parameters():
        assert torch.equal(now.get_parameter(name), parameter)
    assert f"started from {first / 'checkpoints' / 'best.ckpt'}" in (job / "job.log").read_text()


def test_a_jobs_identity_has_the_weights_and_not_their_place(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["train", *SMALL])
    best = only(project, "batch-*") / "checkpoints" / "best.ckpt"
    shutil.copy(best, "a.ckpt")
    shutil.copy(best, "b.ckpt")
    arguments = ["train", *SMALL, "norm=layer"]
    assert main([*arguments, "init_from=a.ckpt"]) == 0
    assert main([*arguments, "init_from=b.ckpt"]) == 0
    assert "done before, skipped" in capsys.readouterr().out
    weights = torch.load("b.ckpt", weights_only=True)
    torch.save({"state_dict": {k: v * 2 for k, v in weights["state_dict"].items()}}, "b.ckpt")
    assert main([*arguments, "init_from=b.ckpt"]) == 0
    assert len(list(project.glob("outputs/train/layer-*"))) == 2


def test_a_job_that_resumes_keeps_what_it_has_learned(project: Path) -> None:
    main(["train", *SMALL])
    first = only(project, "batch-*")
    script = (
        "import sys, os; from bnlight.cli import main; import pytorch_lightning as pl\n"
        "def die(self, trainer, module, batch, index):\n"
        "    if trainer.current_epoch == 1 and index == 3: os._exit(9)\n"
        "pl.Callback.on_train_batch_start = die\n"
        "main(['train', *sys.argv[1:]])"
    )
    arguments = [*SMALL, "norm=layer", "trainer.max_epochs=2", f"init_from={first}"]
    assert (
        subprocess.run([sys.executable, "-c", script, *arguments], check=False, env=os.environ).returncode
        == 9
    )
    job = only(project, "layer-*")
    assert main(["train", *arguments]) == 0
    assert (job / "job.log").read_text().count("started from") == 1
    assert json.loads((job / "status.json").read_text())["attempt"] == 2
    assert yaml.safe_load((job / "config.yaml").read_text())["init_from"] == str(first)


def test_two_ranks_start_from_the_same_weights(project: Path) -> None:
    main(["train", *SMALL])
    first = only(project, "batch-*")
    ddp = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.max_epochs=1", "optimizer.lr=0.0", "norm=none"]
    assert main(["train", *SMALL, *ddp, f"init_from={first}"]) == 0
    assert (only(project, "none-*") / "job.log").read_text().count("started from") == 2


def test_weights_that_do_not_exist_are_the_commands_error(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *SMALL, "init_from=nothing.ckpt"]) == 2
    assert "nothing.ckpt does not exist" in capsys.readouterr().err
    assert not list(project.glob("**/status.json"))
