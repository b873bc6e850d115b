"""The `bnlight` command: fast to start, and clear about what does not exist."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bnlight.cli import main


def test_help_loads_nothing_heavy_and_is_quick(project: Path) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "bnlight", "--help"]
    begun = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - begun
    assert "bnlight sweep norms" in done.stdout
    loaded = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert not loaded & {"torch", "pytorch_lightning", "hydra", "wandb", "pandas", "plotly", "numpy"}
    assert seconds < 2  # 0.03 s alone; the machine may be busy


def test_importing_bnlight_loads_nothing_heavy() -> None:
    code = "import bnlight, sys; print(sorted({'torch', 'hydra', 'pytorch_lightning', 'wandb'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["modle=cnn"], ["no key 'modle'", "Did you mean 'module'?", "norm", "trainer"]),
        (["optimizer.lrr=1"], ["no key 'lrr' in 'optimizer'", "Did you mean 'lr'?", "momentum"]),
        (
            ["model=resnet", "model.widht=3"],
            ["no key 'widht' in 'model'", "Did you mean 'width'?", "zero_init_residual"],
        ),
        (["norm=grup"], ["Could not find 'norm/grup'", "Available options in 'norm'", "instance"]),
        (["+nrom=group"], ["adds a key that nothing reads", "Did you mean 'norm'?"]),
        (["++sweep=norms"], ["adds a key that nothing reads", "scheduler"]),
        (["+foo.bar=1"], ["adds a key that nothing reads"]),
        (["norm=custom"], ["norm._target_ has no value", "norm._target_=..."]),
        (["~norm"], ["the config has no norm; a job needs norm, model"]),
        (["-m", "norm=batch,grup"], ["Could not find 'norm/grup'"]),
        (["-m", "seed=1,2", "+modle=cnn"], ["Did you mean 'module'?"]),
        (["seed=1.5"], ["seed=1.5: expected a whole number from 0 to 4294967295, or null"]),
        (["threads=0"], ["threads=0: expected a whole number from 1"]),
        (["share_devices=x"], ["share_devices=x: expected a whole number from 1"]),
        (["optimizer.lr=fast"], ["optimizer.lr=fast: expected a number"]),
        (["fail_fast=foo"], ["fail_fast=foo: expected true or false"]),
        (["checkpoint_every=often"], ["checkpoint_every=often is not a duration: write"]),
        (["monitor.mode=best"], ["monitor.mode=best is unknown; choose one of max, min"]),
        (["hydra/launcher=parallel"], ["hydra/launcher=parallel is for the jobs of a sweep", "add -m"]),
        (["-m", "hydra/launcher=parallel", "hydra.launcher.n_jobs=0"], ["n_jobs=0: expected 1, 2, ..."]),
    ],
)
def test_what_does_not_exist_is_an_error_that_lists_what_does(
    project: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: list[str]
) -> None:
    assert main(["train", *arguments]) == 2
    output = capsys.readouterr().err
    for text in said:
        assert text in output
    assert not list(project.glob("outputs/*/*/"))


def test_outputs_that_are_a_file_end_a_job_in_one_sentence(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "notes.txt").touch()
    assert main(["train", "paths.outputs=notes.txt"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "Not a directory: 'notes.txt/train/" in line


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("defaults: [train, _self_\nhydra: {mode: MULTIRUN}", ["sweeps/mine.yaml", "expected ',' or ']'"]),
        ("", ["mine.yaml does not extend train", "begin it with 'defaults: [train, _self_]'"]),
        ("hydra: {mode: MULTIRUN}", ["mine.yaml does not extend train"]),
    ],
)
def test_a_sweep_file_that_says_no_job_is_an_error_that_names_it(
    project: Path, capsys: pytest.CaptureFixture[str], text: str, said: list[str]
) -> None:
    (project / "sweeps").mkdir()
    (project / "sweeps" / "mine.yaml").write_text(text)
    assert main(["sweep", "mine"]) == 2
    output = capsys.readouterr().err
    for part in said:
        assert part in output
    assert not (project / "outputs").exists()


def test_a_key_of_an_argument_may_still_be_added(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "+trainer.limit_train_batches=2", "--cfg", "job"]) == 0
    assert "limit_train_batches: 2" in capsys.readouterr().out


def test_an_unknown_sweep_lists_the_sweeps(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "sweeps").mkdir()
    (project / "sweeps" / "mine.yaml").touch()
    assert main(["sweep", "nroms"]) == 2
    assert "Choose one of batch_size, list, mine, norms" in capsys.readouterr().err


def test_comparing_a_folder_without_jobs_says_so(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "outputs/nothing"]) == 2
    assert "outputs/nothing" in capsys.readouterr().err


def test_the_environment_is_as_before(project: Path) -> None:
    before = dict(os.environ)
    main(["train", "norm=grup"])
    assert dict(os.environ) == before
