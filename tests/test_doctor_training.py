"""The doctor at the start of a training, in anybody's Trainer and in bnlight's jobs, and `bnlight doctor`."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import yaml
from conftest import SMALL
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from bnlight.callbacks import Doctor
from bnlight.cli import main
from bnlight.run import doctor as job_doctor
from bnlight.run.application import compose_job

SWEEP = yaml.safe_load((Path(__file__).parents[1] / "sweeps" / "norms.yaml").read_text())


class Mine(pl.LightningModule):
    """Somebody's module, with a training_step that only a Trainer can call and no forward of its own."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.log("loss", loss := nn.functional.cross_entropy(self.net(batch[0]).flatten(1), batch[1]))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, weight_decay=1e-4)


def net(norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), norm(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1))


def data(number: int = 64, labels: Tensor | None = None) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(number, 3, 5, 5, generator=generator)
    return TensorDataset(images, torch.arange(number) % 4 if labels is None else labels)


def fit(
    module: pl.LightningModule,
    callbacks: list[pl.Callback],
    folder: Path,
    whole: Any = None,
    size: int = 4,
    **options: Any,
) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=callbacks,
        **options,
    )
    trainer.fit(module, DataLoader(data() if whole is None else whole, batch_size=size))
    return trainer


def test_a_training_begins_with_its_findings_and_goes_on_as_without(tmp_path: Path) -> None:
    lines: list[str] = []
    alone, looked_at = Mine(net()), Mine(net())
    torch.manual_seed(0)
    fit(alone, [], tmp_path, accumulate_grad_batches=2)
    random = torch.get_rng_state()
    torch.manual_seed(0)
    fit(looked_at, [callback := Doctor(tell=lines.append)], tmp_path, accumulate_grad_batches=2)
    assert torch.equal(random, torch.get_rng_state())
    for one, other in zip(alone.state_dict().values(), looked_at.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in looked_at.modules())
    checks = [finding.check for finding in callback.diagnosis]
    assert checks == ["few_values", "accumulation", "redundant_bias", "decayed_norms"]
    assert len(lines) == 4
    assert lines[0].startswith("doctor: batch statistics of 4 samples, 36 values per channel")
    assert "(in net.1)" in lines[0]


def test_a_healthy_training_says_nothing_and_a_told_line_is_not_told_again(tmp_path: Path) -> None:
    lines: list[str] = []
    module = Mine(net(lambda c: nn.GroupNorm(2, c)))
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.1)
    fit(module, [Doctor(tell=lines.append)], tmp_path)
    assert lines == []
    told: set[str] = set()
    fit(Mine(net()), [Doctor(tell=lines.append, told=told)], tmp_path)
    first = len(lines)
    assert first > 0
    fit(Mine(net()), [Doctor(tell=lines.append, told=told)], tmp_path)
    assert len(lines) == first


def test_labels_are_looked_at_as_they_come(tmp_path: Path) -> None:
    for labels, fires in ((torch.arange(256) // 64, True), (torch.arange(256) % 4, False)):
        fit(Mine(net()), [callback := Doctor(tell=lambda _: None)], tmp_path, data(256, labels), size=16)
        assert ("class_sorted" in {finding.check for finding in callback.diagnosis}) == fires


def test_more_than_five_lines_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bnlight.lightning.doctor.LINES", 2)
    lines: list[str] = []
    fit(Mine(net()), [Doctor(tell=lines.append)], tmp_path)
    assert len(lines) == 3
    assert lines[-1] == "doctor: and 1 more; `bnlight doctor` lists them"


def test_the_trainings_own_error_stays_and_what_was_seen_is_said(tmp_path: Path) -> None:
    lines: list[str] = []
    rows = nn.Sequential(nn.Flatten(), nn.Linear(75, 4), nn.BatchNorm1d(4))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        fit(Mine(rows), [Doctor(tell=lines.append)], tmp_path, size=1)
    assert "1 sample, 1 value per channel" in lines[0]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in rows.modules())


def test_nothing_that_goes_wrong_in_the_doctor_ends_a_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("broken")
        yield

    lines: list[str] = []
    monkeypatch.setattr("bnlight.lightning.doctor.examine", broken)
    assert fit(Mine(net()), [Doctor(tell=lines.append)], tmp_path).global_step == 16
    assert lines == ["doctor: could not look at this training (RuntimeError: broken)"]
    monkeypatch.undo()
    monkeypatch.setattr("bnlight.doctor.LAYER_CHECKS", (broken,))
    lines.clear()
    assert fit(Mine(net()), [Doctor(tell=lines.append)], tmp_path).global_step == 16
    assert "the check broken failed: RuntimeError: broken" in lines[0]


def test_a_compiled_model_is_compiled_once_and_not_looked_into(tmp_path: Path) -> None:
    compiled = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    module = Mine(torch.compile(net(), backend=backend))
    lines: list[str] = []
    fit(module, [Doctor(tell=lines.append)], tmp_path)
    assert len(compiled) == 1
    assert any("is compiled" in line for line in lines)
    assert any("weight decay" in line for line in lines)
    torch.compiler.reset()


def examined(*overrides: str) -> dict[str, Any]:
    return {finding.check: finding for finding in job_doctor.examine_job(compose_job([*SMALL, *overrides]))}


def test_the_command_says_what_is_wrong_and_writes_nothing(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", *SMALL]) == 0
    assert capsys.readouterr().out == "Nothing found.\n"
    assert main(["doctor", *SMALL, "data.batch_size=4"]) == 1
    printed = capsys.readouterr().out
    assert "warning  few_values\n  what   batch statistics of 4 samples, 4 values per channel" in printed
    assert "model.features.2" in printed
    assert "remedy Use larger batches" in printed
    assert list(project.iterdir()) == []


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("init_from=none.ckpt", "the job cannot be built: FileNotFoundError: none.ckpt does not exist"),
        ("nrom=batch", "Did you mean 'norm'?"),
        ("+nrom=batch", "adds a key that nothing reads"),
        ("norm=batchh", "batchh"),
        ("norm=batch,group", "norm=batch,group"),
        ("norm", "expected overrides"),
        ("-m", "expected overrides"),
        ("norm=custom", "norm"),
    ],
)
def test_a_wrong_command_is_an_error_of_its_own(
    argument: str, said: str, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", argument]) == 2
    assert said in capsys.readouterr().err
    assert list(project.iterdir()) == []


def test_the_command_knows_ranks_sync_and_accumulation(project: Path) -> None:
    ranks = [
        "norm=batch",
        "trainer=ddp",
        "trainer.accelerator=cpu",
        "trainer.devices=2",
        "data.batch_size=16",
    ]
    assert examined(*ranks).keys() == {"local_statistics"}
    assert examined(*ranks, "sync=world") == {}
    assert examined(*ranks, "sync=world", "data.batch_size=8") == {}  # 16 together
    assert "few_values" in examined(*ranks, "data.batch_size=8")
    assert "accumulation" in examined("data.batch_size=16", "trainer.accumulate_grad_batches=4")


def test_a_users_own_module_and_a_first_step_that_fails(project: Path) -> None:
    (project / "mine.py").write_text(
        "import torch, pytorch_lightning as pl\n"
        "class Net(pl.LightningModule):\n"
        "    def __init__(self, norm, broken=False):\n"
        "        super().__init__()\n"
        "        self.net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10), norm(10))\n"
        "        self.broken = broken\n"
        "    def training_step(self, batch, batch_idx):\n"
        "        x = self.net(batch[0])\n"
        "        if self.broken: raise RuntimeError('no such thing')\n"
        "        return torch.nn.functional.cross_entropy(x, batch[1])\n"
        "    def configure_optimizers(self):\n"
        "        return torch.optim.AdamW(self.parameters())\n"
    )
    sys.path.insert(0, str(project))
    own = ["module=custom", "module._target_=mine.Net"]
    found = examined(*own, "data.batch_size=4")
    assert {"few_values", "redundant_bias", "decayed_norms"} <= found.keys()
    assert found["few_values"].layers == ("net.2",)
    broken = examined(*own, "data.batch_size=4", "+module.broken=true")
    assert "RuntimeError: no such thing" in broken["first_step"].problem
    assert "few_values" in broken


@pytest.mark.parametrize("norm", SWEEP["hydra"]["sweeper"]["params"]["norm"].split(","))
def test_the_demo_is_healthy_and_so_its_output_stays_as_it_is(norm: str, project: Path) -> None:
    demo = {key: value for key, value in SWEEP.items() if key not in ("defaults", "hydra")}
    config = compose_job([f"norm={norm}", "trainer=cpu", "logger=csv"])
    for key, value in demo.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    assert config["data"]["batch_size"] == 16
    assert job_doctor.examine_job(config) == []


def test_a_sweep_says_each_finding_once(
    bnlight: Callable[..., subprocess.CompletedProcess[str]], project: Path
) -> None:
    done = bnlight(
        "train",
        "-m",
        *SMALL,
        "data.batch_size=4",
        "data.limit=64",
        "norm=batch,layer",
        "seed=0,1",
        "progress=plain",
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if "doctor:" in line]
    assert len(lines) == 1
    assert "batch statistics of 4 samples" in lines[0]


def test_two_ranks_say_it_once(
    bnlight: Callable[..., subprocess.CompletedProcess[str]], project: Path
) -> None:
    done = bnlight(
        "train",
        *SMALL,
        "data.limit=128",
        "trainer=ddp",
        "trainer.accelerator=cpu",
        "trainer.devices=2",
        "progress=plain",
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if "doctor:" in line]
    assert len(lines) == 1
    assert "each of the 2 ranks normalizes by its own batch" in lines[0]


@pytest.mark.parametrize("norm", ["renorm", "full"])
def test_a_training_too_short_for_its_averages_is_told_and_the_remedy_is_one(
    project: Path, norm: str
) -> None:
    def found(*words: str) -> list[str]:
        config = compose_job([*SMALL, f"norm={norm}", "norm.momentum=0.01", *words])
        return [str(one) for one in job_doctor.examine_job(config) if one.check == "unconverged"]

    (said,) = found()
    assert "their initial values" in said
    remedy = re.search(r"norm\.momentum=[0-9.]*[0-9]", said)
    assert remedy
    assert found(remedy[0]) == []
    assert found("trainer.max_epochs=40") == []
