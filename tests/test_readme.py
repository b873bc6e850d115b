"""The README's commands, run as printed, in a folder that has only what the README says to put there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
COMMANDS = [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()]


def test_the_commands_of_the_readme_run_as_printed(project: Path) -> None:
    for kind, text in BLOCKS:
        name = re.match(r"# (\w+\.py)\n", text)
        if kind == "python" and name:
            (project / name.group(1)).write_text(text)
        elif kind == "yaml":
            (project / "sweeps").mkdir()
            (project / "sweeps" / "batch_size.yaml").write_text(text)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    ran = 0
    for command in COMMANDS:
        if command.startswith("pip "):
            continue  # what made this environment
        done = subprocess.run(
            command,
            shell=True,
            cwd=project,
            env=os.environ | {"PATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        ran += 1
    assert ran >= 6
    assert len(list(project.glob("outputs/batch_size/*/result.json"))) == 2 * 2 * 3


@pytest.mark.parametrize("code", [text for kind, text in BLOCKS if kind == "python"])
def test_the_python_of_the_readme_runs(code: str) -> None:
    names: dict[str, object] = {}
    exec(code, names)
    if "y" in names:
        assert names["y"].shape == names["x"].shape  # type: ignore[attr-defined]


def test_the_options_named_in_the_readme_are_those_there_are() -> None:
    import bnlight.conf

    conf = Path(bnlight.conf.__path__[0])
    for group, options in re.findall(
        r"^\| `(norm|weight|model|data|trainer)` \| ([\w, ]+?)(?: \(|\s*\|)", README, re.MULTILINE
    ):
        assert sorted(options.split(", ")) == sorted(path.stem for path in (conf / group).glob("*.yaml")), (
            group
        )


def test_the_demo_ends_as_the_readme_shows(project: Path) -> None:
    """`make demo` is this command; the table's rows and the files are there, and a second run is quick."""
    command = [sys.executable, "-m", "bnlight", "sweep", "norms"]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=500, check=True)
    for name in ("renorm", "batch", "layer", "group", "instance", "none"):
        row = re.search(rf"^{name} +3 +0\.9\d+ ± 0\.\d+ .* \(3/3\) .* ms$", done.stdout, re.MULTILINE)
        assert row, f"{name}\n{done.stdout[-3000:]}"
        assert re.search(rf"^{name} +3 +0\.9\d+ ± 0\.\d+ .* \(3/3\) .* ms$", README, re.MULTILINE), name
    assert "outputs/norms/*/wandb/offline-run-* (18 W&B runs, offline)" in done.stdout
    again = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=20, check=True)
    assert again.stdout.count("done before, skipped") == 18
