"""Every page in docs runs from top to bottom, in a user's folder: its programs, its files and its commands.

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

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(
    page.name for page in DOCS.glob("*.md") if page.name != "norms.md"
)  # test_docs.py has that one
BLOCK = re.compile(r"^```(\w+)\n(?:# ([\w/]+\.(?:py|yaml))\n)?(.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES)
def test_a_page_runs_as_it_reads(page: str, project: Path) -> None:
    text = (DOCS / page).read_text()
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
            exec(compile("\n" * above + body, f"docs/{page}", "exec"), names)
        elif kind == "bash":
            for command in body.replace("\\\n", " ").splitlines():
                run(command, f"docs/{page}, below line {above}")


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
