"""One Weights & Biases run per job."""

from __future__ import annotations

import contextlib
import logging
import netrc
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from pytorch_lightning.loggers import WandbLogger

log = logging.getLogger(__name__)
SECONDS_TO_CONNECT = 30.0
_unreachable: list[str] = []  # why this process has given up on W&B's server

Mode = Literal["online", "offline", "disabled", "shared"]


def wandb_logger(
    config: Mapping[str, Any],
    directory: Path,
    run_id: str,
    *,
    project: str,
    entity: str | None = None,
    mode: Mode | None = None,
    tags: Sequence[str] = (),
) -> WandbLogger:
    """Start (or continue) the job's W&B run in `directory` and return Lightning's logger for it.

    The run is called after the job, grouped by sweep, typed by norm, and carries the resolved config with the
    norm's name in `norm.name`. `mode=None` is online where W&B has a key (`wandb login`, `WANDB_API_KEY`), else
    offline; `WANDB_MODE` wins. A server that cannot be reached makes the run an offline one. Call
    `logger.experiment.finish(exit_code=...)` when the job ends.
    """
    import wandb
    from pytorch_lightning.loggers import WandbLogger

    job = config["job"]
    chosen = job["choices"]
    labels = [chosen[group] for group in ("norm", "model", "data") if group in chosen]
    mode = cast("Mode", os.environ.get("WANDB_MODE") or mode or ("online" if logged_in() else "offline"))
    settings: dict[str, Any] = {
        "project": project,
        "entity": entity,
        "id": run_id,
        "resume": "allow",
        "name": job["name"],
        "group": job["sweep"],
        "job_type": chosen.get("norm"),
        "tags": sorted({*labels, *tags}),
        "config": {**config, "norm": {**config.get("norm", {}), "name": chosen.get("norm")}},
        "dir": str(directory),
        "reinit": "finish_previous",
        "settings": wandb.Settings(console="off", silent=True, init_timeout=SECONDS_TO_CONNECT),
    }
    try:
        run = wandb.init(mode="offline" if _unreachable and mode == "online" else mode, **settings)
    except wandb.errors.CommError as error:  # a job must not fail, or wait each time, for its dashboard
        _unreachable.append(str(error))
        log.warning("W&B cannot be reached, so this process logs offline: %s", error)
        wandb.teardown()  # its service still holds the run's id
        run = wandb.init(mode="offline", **settings)
    run.define_metric("trainer/global_step")
    run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
    return WandbLogger(experiment=run, save_dir=directory)


def logged_in() -> bool:
    """Whether W&B has credentials (environment or netrc), found without asking anybody over the network."""
    import wandb

    if any(os.environ.get(name) for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or wandb.Settings().base_url).hostname or ""
    files = [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
    for file in files:
        with contextlib.suppress(FileNotFoundError, netrc.NetrcParseError):
            if netrc.netrc(Path(file).expanduser()).authenticators(host):
                return True
    return False
