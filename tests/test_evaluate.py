"""`bnlight test` and `bnlight adapt` on finished jobs, `bnlight.load` on their directories."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL
from own_code import MAE, MINE, REGRESSION

import bnlight
from bnlight.cli import main
from bnlight.data import Digits
from bnlight.lightning import Classifier


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a sweep over three norms, one of them twice, and a job that has failed."""
    folder = tmp_path_factory.mktemp("trained")
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert main(["train", "-m", *SMALL, "norm=batch,group,renorm", "trainer.max_epochs=3"]) == 0
        assert main(["train", *SMALL, "seed=1", "trainer.max_epochs=3"]) == 0
        assert main(["train", *SMALL, "norm=instance"]) == 1
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def jobs(trained: Path, project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(trained)
    return trained / "outputs" / "train"


def job(jobs: Path, start: str) -> Path:
    (found,) = jobs.glob(f"{start}-*")
    return found


def accuracy(module: torch.nn.Module, **options: Any) -> float:
    data = Digits(**options)
    data.setup()
    module.eval()
    with torch.no_grad():
        hits = [(module(x).argmax(1) == y).float() for x, y in data.test_dataloader()]
    return torch.cat(hits).mean().item()


def rows_of(*arguments: str) -> dict[str, Any]:
    assert main([*arguments, "--json", "out.json"]) == 0
    content: dict[str, Any] = json.loads(Path("out.json").read_text())
    return {row["job"].rsplit("-", 1)[0]: row for row in content["jobs"]}


def test_a_sweeps_jobs_are_tested_on_shifted_images(jobs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of("test", str(jobs), "data.shift.noise=0.3", "data.shift.seed=2")
    assert len(rows) == 4
    for start, row in rows.items():
        module = bnlight.load(job(jobs, start))
        assert row["metrics"]["test/accuracy"] == pytest.approx(
            accuracy(module, shift={"noise": 0.3, "seed": 2}), abs=1e-6
        )
        assert row["trained"]["test/accuracy"] == pytest.approx(accuracy(module), abs=1e-6)
        assert row["adapted"] is None
    said = capsys.readouterr()
    assert "instance-mlp-digits" in said.err
    assert "it is failed" in said.err
    lines = [line.split() for line in said.out.splitlines()]
    assert lines[0] == ["test/accuracy"]
    assert lines[1][:3] == ["job", "norm", "seed"]
    seeds = [row["metrics"]["test/accuracy"] for start, row in rows.items() if start.startswith("batch")]
    mean = next(line for line in lines if line[:4] == ["mean", "of", "2", "batch"])
    assert float(mean[-2]) == pytest.approx(sum(seeds) / 2, abs=1e-4)


def test_a_test_without_changes_is_that_of_the_training(jobs: Path) -> None:
    for row in rows_of("test", str(jobs)).values():
        assert row["metrics"] == pytest.approx(row["trained"])


def test_a_job_with_averaged_weights_tests_the_averages(project: Path) -> None:
    average = [
        "+callbacks.ema._target_=pytorch_lightning.callbacks.EMAWeightAveraging",
        "+callbacks.ema.decay=0.9",
    ]
    assert main(["train", *SMALL, *average]) == 0
    (row,) = rows_of("test", "outputs/train").values()
    assert row["metrics"] == pytest.approx({name: row["trained"][name] for name in row["metrics"]}, abs=1e-6)


@pytest.mark.filterwarnings("default::bnlight.population.UnconvergedAverages")  # the trainings are short
def test_adapted_statistics_are_those_of_the_shifted_test_images(
    jobs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = rows_of("adapt", str(jobs), "data.shift.contrast=0.3")
    assert (
        "statistics of 360 test samples of the data tested on; their labels are not used"
        in capsys.readouterr().out
    )
    data = Digits(shift={"contrast": 0.3})
    data.setup()
    for start in ("batch-mlp-digits-s0", "renorm-mlp-digits-s0"):
        module = bnlight.load(job(jobs, start)).eval()
        bnlight.adapt_statistics(module, data.test_dataloader())
        expected = accuracy(module, shift={"contrast": 0.3})
        assert rows[start]["adapted"]["test/accuracy"] == pytest.approx(expected, abs=1e-6)
        assert expected > rows[start]["metrics"]["test/accuracy"] + 0.05
    assert rows["group-mlp-digits-s0"]["adapted"] is None  # it has no statistics


def test_what_and_how_much_it_adapts_to_is_chosen(jobs: Path) -> None:
    place = str(job(jobs, "batch-mlp-digits-s0"))
    shift = "data.shift.contrast=0.3"
    (few,) = rows_of("adapt", place, shift, "--batches", "1", "--batch-size", "32").values()
    assert few["samples"] == 30  # 360 in twelve even batches of at most 32
    (val,) = rows_of("adapt", place, shift, "--to", "val").values()
    assert val["samples"] == 287
    (much,) = rows_of("adapt", place, shift, "--source-samples", "1e9").values()
    assert much["adapted"] == pytest.approx(much["metrics"], rel=1e-3)


@pytest.mark.filterwarnings("default::bnlight.population.UnconvergedAverages")  # the trainings are short
def test_the_adapted_checkpoint_is_written(jobs: Path, tmp_path: Path) -> None:
    place = job(jobs, "renorm")
    before = copy.deepcopy(bnlight.load(place).state_dict())
    (row,) = rows_of(
        "adapt", str(place), "data.shift.contrast=0.3", "--save", str(tmp_path / "a.ckpt")
    ).values()
    module = bnlight.load(tmp_path / "a.ckpt", Classifier)
    found = accuracy(module, shift={"contrast": 0.3})
    assert found == pytest.approx(row["adapted"]["test/accuracy"], abs=1e-6)
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key]) == ("running_" not in key)
    note = torch.load(tmp_path / "a.ckpt", weights_only=True)["bnlight_adapted"]
    assert note["data"] == ["data.shift.contrast=0.3"]


def test_other_data_of_the_same_shape_are_tested_on(jobs: Path, project: Path) -> None:
    Path("mine.py").write_text(
        "from bnlight.data import Digits, Shift\n"
        "class Dark(Digits):\n    pass\n"
        "class Wide(Digits):\n    input_shape = (1, 8, 9)\n"
        "class Few(Digits):\n    num_classes = 9\n"
    )
    place = str(job(jobs, "group"))
    arguments = ["data=custom", "data._target_=mine.Dark"]
    (row,) = rows_of("test", place, *arguments, "+data.shift.brightness=-0.3").values()
    expected = accuracy(bnlight.load(Path(place)), val_fraction=0.2, shift={"brightness": -0.3})
    assert row["metrics"]["test/accuracy"] == pytest.approx(expected, abs=1e-6)
    for name in ("Wide", "Few"):
        assert main(["test", place, "data=custom", f"data._target_=mine.{name}"]) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["outputs/nothing"], "outputs/nothing does not exist"),
        (["outputs"], "holds no finished job"),
        (["JOB", "data.shift.nois=1"], "Did you mean 'noise'?"),
        (["JOB", "data.shift.noise=-1"], "data.shift.noise=-1: shift.noise must be a number from 0 on"),
        (["JOB", "data.bach_size=1"], "Did you mean 'batch_size'?"),
        (["JOB", "norm=batch"], "would change what was trained"),
        (["JOB", "data.shift.noise=0.1,0.2"], "one value"),
        (["JOB", "data=cifar10"], "built for input_shape (1, 8, 8), but CIFAR10 has (3, 32, 32)"),
        (["JOB", "data=digit"], "Could not find 'data/digit'"),
        (["JOB", "data=custom"], "data._target_ has no value"),
    ],
)
def test_what_cannot_be_tested_is_refused(
    jobs: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    place = str(job(jobs, "renorm"))
    assert main(["test", *(place if argument == "JOB" else argument for argument in arguments)]) == 2
    assert said in capsys.readouterr().err


def test_only_one_job_is_saved_and_only_what_can_be_adapted(
    jobs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["adapt", str(jobs), "--save", "a.ckpt"]) == 2
    assert "--save is for one job" in capsys.readouterr().err
    assert main(["adapt", str(job(jobs, "group")), "--save", "a.ckpt"]) == 2
    assert "no running statistics" in capsys.readouterr().err


def test_a_checkpoint_of_a_job_is_tested_itself(jobs: Path) -> None:
    last = job(jobs, "renorm") / "checkpoints" / "last.ckpt"
    (row,) = rows_of("test", str(last)).values()
    module = Classifier.load_from_checkpoint(last)
    assert row["metrics"]["test/accuracy"] == pytest.approx(accuracy(module), abs=1e-6)


@pytest.mark.filterwarnings("default::bnlight.population.UnconvergedAverages")  # the trainings are short
def test_a_module_of_ones_own_is_tested_adapted_and_loaded_from_its_job(project: Path) -> None:
    (project / "mine.py").write_text(MINE)
    assert main(["train", *REGRESSION, *MAE, "norm=renorm"]) == 0
    (place,) = (project / "outputs" / "train").glob("renorm-Regression-*")
    module = bnlight.load(place)
    assert type(module).__name__ == "Regression"
    assert type(module.net[1]).__name__ == "BatchRenorm"
    again = bnlight.load(place / "checkpoints" / "best.ckpt", type(module))  # the norms are in the checkpoint
    for key, value in again.state_dict().items():
        assert torch.equal(value, module.state_dict()[key])
    (row,) = rows_of("adapt", str(place)).values()
    assert row["metrics"].keys() == row["adapted"].keys() == {"test/mae"}
    assert row["metrics"]["test/mae"] == pytest.approx(row["trained"]["test/mae"], rel=1e-5)
    assert row["adapted"]["test/mae"] != pytest.approx(row["metrics"]["test/mae"], rel=1e-5)


def test_what_belongs_to_no_job_needs_a_class(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "a.ckpt")
    with pytest.raises(FileNotFoundError, match=r"bnlight\.load\(path, Module\)"):
        bnlight.load(tmp_path / "a.ckpt")
    with pytest.raises(FileNotFoundError, match=r"checkpoints/best\.ckpt"):
        bnlight.load(tmp_path)


def test_a_job_that_cannot_be_tested_is_named_and_the_others_are_shown_each_with_its_setting(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "mine.py").write_text(
        f"{MINE}\n\nclass Untested(Regression):\n    test_step = pl.LightningModule.test_step\n"
    )
    rates = [*REGRESSION, *MAE, "module.lr=0.05,0.1", "seed=0,1"]
    assert (
        main(["train", "-m", *(f"+{word}" if word.startswith("module.lr") else word for word in rates)]) == 0
    )
    words = [word.replace("mine.Regression", "mine.Untested") for word in REGRESSION]
    assert main(["train", *words, *MAE]) in (0, 1)
    capsys.readouterr()
    assert main(["test", "outputs/train"]) == 1
    said = capsys.readouterr()
    assert "left out, Untested has no test_step" in said.err
    lines = [line.split() for line in said.out.splitlines()]
    assert "lr" in lines[1]
    assert sum(line[:3] == ["mean", "of", "2"] for line in lines) == 2  # not one of four
