"""`bnlight wandb leet`: W&B's own viewer in the terminal, on all runs below some directories at once."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bnlight.run.tracking.offline import Run


def leet(runs: Sequence[Run]) -> int:
    """Open `wandb leet` on the runs and return its exit code.

    It lists the run folders of one `wandb` directory, and each job has a directory of its own: so it is given a
    temporary one that links to the pieces of all runs.
    """
    with tempfile.TemporaryDirectory(prefix="bnlight-leet-") as folder:
        for piece in (piece for run in runs for piece in run.pieces):
            link = Path(folder) / piece.directory.resolve().name
            if not link.exists():
                link.symlink_to(piece.directory.resolve())
        # It would report its use to W&B.
        environment = os.environ | {"WANDB_ERROR_REPORTING": "false"}
        command = [sys.executable, "-m", "wandb", "leet", folder]
        return subprocess.run(command, env=environment, check=False).returncode
