"""Hydra's own flags: each works, wherever it stands, or is refused in words."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from bnlight.cli import main

WORKS = [
    (["--cfg", "job"], "batch_size: 64"),
    (["norm=group", "--cfg", "job", "seed=3"], "seed: 3"),
    (["--cfg=job", "--package", "optimizer"], "momentum: 0.9"),
    (["-c", "job", "-p", "norm"], "virtual_batch_size"),
    (["--cfg", "job", "--resolve"], "monitor: val/accuracy"),
    (["--dry-run", "-r", "seed=1"], "1 jobs: 1 runs"),
    (["seed=0,1", "-m", "norm=batch", "--dry-run"], "2 jobs: 2 runs"),
    (["norm=batch", "--multirun", "seed=0,1", "--dry-run"], "2 jobs: 2 runs"),
    (["--config-name", "norms", "--dry-run"], "18 jobs: 18 runs"),
]
REFUSED = [
    (["-m", "seed=0,1", "--cfg", "job"], "--cfg and -m: choose one"),
    (["-m", "--info", "config"], "--info and -m: choose one"),
    (["--cfg", "job", "seed=0,1"], "--cfg shows the config of one job, and seed=0,1 are several"),
    (["--resolve"], "--resolve is for --cfg"),
    (["--package", "norm"], "--package is for --cfg"),
    (["--experimental-rerun", "x"], "the same command again goes on"),
    (["--shell-completion", "install=bash"], "no shell completion"),
    (["--config-path", "/tmp"], "--config-dir=FOLDER"),
    (["--config-dir"], "expected one argument"),
    (["--config-name"], "expected one argument"),
    (["--config-dir", "nowhere"], "--config-dir=nowhere: there is no such folder"),
    (["--config-name", "nothing"], "Cannot find primary config 'nothing'"),
    (["--cfg"], "expected one argument"),
    (["--info", "nonsense"], "invalid choice: 'nonsense'"),
    (["--nonsense"], "unrecognized arguments: --nonsense"),
    (["nonsense"], "missing EQUAL"),
]


@pytest.mark.parametrize(("arguments", "said"), WORKS)
def test_a_flag_works_wherever_it_stands(
    project: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert main(["train", *arguments]) == 0
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "said"), REFUSED)
def test_a_flag_without_effect_or_value_is_refused(
    project: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert main(["train", *arguments]) == 2
    assert said in capsys.readouterr().err
    assert not (project / "outputs").exists()


@pytest.mark.parametrize("flag", ["--help", "-h", "--hydra-help", "--version"])
def test_help_is_shown_beside_overrides(project: Path, capsys: pytest.CaptureFixture[str], flag: str) -> None:
    with pytest.raises(SystemExit) as left:
        main(["train", "model=mlp", flag])
    assert not left.value.code
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--info", "searchpath"], "pkg://bnlight.sweeps"),
        (["seed=1", "--info", "defaults", "norm=group"], "norm/group"),
    ],
)
def test_info_is_shown_and_no_job_is_run(
    project: Path,
    bnlight: Callable[..., subprocess.CompletedProcess[str]],
    arguments: list[str],
    said: str,
) -> None:
    done = bnlight("train", *arguments)
    assert done.returncode == 0
    assert said in done.stdout
    assert not (project / "outputs").exists()
