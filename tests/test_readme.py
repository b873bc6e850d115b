"""What the README says of options and of the demo; test_docs_pages.py runs its commands and programs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_table_of_the_readme_has_every_option_of_every_group() -> None:
    import bnlight.conf

    named = {}
    row = r"^\| (`\w+`(?:, `\w+`)*) \| ([\w,; ]+?)(?: \(|\s*\|)"
    for groups, options in re.findall(row, README, re.MULTILINE):
        for group, listed in zip(re.findall(r"\w+", groups), options.split("; "), strict=True):
            named[group] = sorted(listed.split(", "))
    conf = Path(bnlight.conf.__path__[0])
    files = {folder: [*folder.glob("*.yaml")] for folder in conf.iterdir() if folder.name != "hydra"}
    assert named == {
        folder.name: sorted(path.stem for path in files[folder]) for folder in files if files[folder]
    }


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
