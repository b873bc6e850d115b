"""The README and every page in docs run from top to bottom, in a user's folder: programs, files and commands.

A block whose first line is a comment that names a file, `# my_net.py`, is written to that file.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
OWN_TEST = "docs/norms.md"  # in test_docs.py
PAGES = sorted({"README.md", *(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))} - {OWN_TEST})
BLOCK = re.compile(r"^```(\w+)\n(?:# ([\w/]+\.(?:py|yaml))\n)?(.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES)
def test_a_page_runs_as_it_reads(page: str, project: Path) -> None:
    text = (ROOT / page).read_text()
    torch.manual_seed(0)
    sys.path.insert(0, str(project))
    names: dict[str, Any] = {"__name__": "__page__"}
    for block in BLOCK.finditer(text):
        kind, file, body = block.groups()
        above = text.count("\n", 0, block.start(3))  # so that a failure names the page's own line
        if file:
            path = project / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(body)
        elif kind == "python":
            exec(compile("\n" * above + body, page, "exec"), names)
        elif kind == "bash":
            for command in body.replace("\\\n", " ").splitlines():
                if command.startswith("pip "):
                    continue  # what made this environment
                run(command, f"{page}, below line {above}")
    if page == "README.md":
        assert len(list(project.glob("outputs/small_batches/*/result.json"))) == 2 * 2 * 3


def run(command: str, where: str) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command,
        shell=True,
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, f"{where}: {command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
