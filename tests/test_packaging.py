"""What ships: a wheel that works from an empty environment, in a folder that knows nothing of the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from conftest import SMALL

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that no stale build folder takes part."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("bnlight", "conf", "sweeps"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", target, source], check=True)
    (path,) = target.glob("bnlight-*.whl")
    return path


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new environment that has the wheel, and this one's libraries beside it."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    query = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(
        subprocess.run([python, "-c", query], check=True, capture_output=True, text=True).stdout.strip()
    )
    # A folder named in a .pth file adds its packages, not its own .pth files: the editable install stays out.
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--force-reinstall", wheel], check=True)
    return python


def test_the_wheel_trains_from_another_folder(python: Path, project: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    where = subprocess.run(
        [python, "-c", "import bnlight; print(bnlight.__file__)"],
        capture_output=True, text=True, check=True, env=environment,
    )  # fmt: skip
    assert Path(where.stdout.strip()).is_relative_to(python.parents[1])
    command = python.parent / "bnlight"
    done = subprocess.run(
        [command, "train", *SMALL], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(list(project.glob("outputs/train/*/result.json"))) == 1


def test_the_wheel_has_the_sweeps_and_two_ranks(python: Path, project: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    arguments = [*SMALL, "norm=batch", "seed=0", "trainer=ddp", "trainer.accelerator=cpu"]
    (project / "own.yaml").write_text("defaults: [train, _self_]\nhydra: {mode: MULTIRUN}\n")
    command = [python, "-m", "bnlight", "sweep", "own.yaml", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert (project / "outputs" / "own" / "comparison.html").exists()
    listed = subprocess.run(
        [python, "-m", "bnlight", "sweep", "--help"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert "norms" in listed.stderr


def test_the_wheel_has_what_hydra_finds_the_groups_by(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert "bnlight/plugins/hydra_plugins/bnlight_groups.py" in names
    assert "bnlight/conf/norm/renorm.yaml" in names


def test_every_package_is_listed() -> None:
    import tomllib

    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in ROOT.glob("bnlight/**/__init__.py")}
    assert found | {"bnlight.conf", "bnlight.sweeps"} == set(listed)
