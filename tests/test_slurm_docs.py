"""The commands of docs/cluster.md that need a cluster, on a real SLURM without GPUs, each a little smaller."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SMALL, until
from slurm import cluster, queue, slurm

assert slurm  # fixtures
assert cluster
PAGE = Path(__file__).parents[1] / "docs" / "cluster.md"
COMMANDS = re.findall(r"^\$ (.*)$", PAGE.read_text(), re.MULTILINE)
SMALLER = [
    (r" \S*gpus\S*=\d+", ""),  # this cluster has none
    (r"=4\b", "=1"),  # and few cores
    (r"bnlight train", " ".join(["bnlight train", *SMALL, "+trainer.limit_train_batches=3"])),
    (r"trainer=ddp", "trainer=ddp trainer.accelerator=cpu"),
    (r"(bnlight sweep .*)", r"\1 norm=batch seed=0,1 trainer.max_epochs=1 trainer=cpu logger=csv"),
]
RANKS = {"sweep": [1, 1], "--ntasks=1": [2], "srun": [2]}  # of each job that it trains


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_page_on_clusters_does_what_it_says(
    project: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    (ranks,) = (ranks for word, ranks in RANKS.items() if word in command)
    for pattern, smaller in SMALLER:
        command = re.sub(pattern, smaller, command)
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    until(lambda: not queue(project))
    said = "".join(path.read_text() for path in project.glob("slurm-*.out"))
    results = [json.loads(path.read_text()) for path in project.glob("outputs/*/*/result.json")]
    assert [result["world_size"] for result in results] == ranks, done.stdout + said
