"""One rank of a job, started by the launcher: `python -m bnlight.run.ranks.rank JOB_DIRECTORY [LABEL]`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
import yaml
from torch.distributed.elastic.multiprocessing.errors import record

from bnlight.lightning.stop import Stopped
from bnlight.run.ranks.processes import die_with_parent
from bnlight.run.status import update_status
from bnlight.run.survive.command import STOPPED_BY_SIGNAL
from bnlight.run.survive.output import outlive_the_reader


def read_config(directory: Path) -> dict[str, Any]:
    """The job's resolved config."""
    config: dict[str, Any] = yaml.safe_load((directory / "config.yaml").read_text(encoding="utf-8"))
    return config


@record
def main() -> None:
    """Train this rank's share of the job; an exception reaches the launcher with its traceback."""
    die_with_parent()
    outlive_the_reader()
    from bnlight.run.isolation import log_to
    from bnlight.run.train import train

    directory = Path(sys.argv[1])
    rank, code = int(os.environ["RANK"]), 0
    with log_to(directory / "job.log", rank=rank):
        try:
            train(read_config(directory), directory, label=" ".join(sys.argv[2:]))
        except Stopped as stop:  # the job's owner records it; rank 0 leaves last, so only its code counts
            if rank == 0:
                update_status(directory, stopped=stop.where, signum=int(stop.signum))
                code = STOPPED_BY_SIGNAL
    if dist.is_initialized():  # the threads of an open group now and then abort a process that ends
        dist.destroy_process_group()
    if code:
        sys.exit(code)


if __name__ == "__main__":
    sys.excepthook = lambda *_: None  # `record` has told the launcher, which writes it down once
    main()
