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
    ],
)
def test_what_does_not_exist_is_an_error_that_lists_what_does(
    project: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: list[str]
) -> None:
    assert main(["train", *arguments]) == 2
    output = capsys.readouterr().err
    for text in said:
        assert text in output
    assert not list(project.glob("**/status.json"))


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
