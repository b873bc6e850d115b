"""One rank of a job, started by the launcher: `python -m bnlight.run.rank JOB_DIRECTORY [LABEL]`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import yaml
from torch.distributed.elastic.multiprocessing.errors import record

from bnlight.run.processes import die_with_parent


def read_config(directory: Path) -> dict[str, Any]:
    """The job's resolved config."""
    config: dict[str, Any] = yaml.safe_load((directory / "config.yaml").read_text(encoding="utf-8"))
    return config


@record
def main() -> None:
    """Train this rank's share of the job; an exception reaches the launcher with its traceback."""
    die_with_parent()
    from bnlight.run.isolation import log_to
    from bnlight.run.train import train

    directory = Path(sys.argv[1])
    with log_to(directory / "job.log", rank=int(os.environ["RANK"])):
        train(read_config(directory), directory, label=" ".join(sys.argv[2:]))


if __name__ == "__main__":
    sys.excepthook = lambda *_: None  # `record` has told the launcher, which writes it down once
    main()
