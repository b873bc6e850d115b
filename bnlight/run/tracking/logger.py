"""One Weights & Biases run per job."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import logging
import netrc
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast
from urllib.parse import urlsplit

from bnlight.run.tracking.pieces import STATE

if TYPE_CHECKING:
    from bnlight.run.tracking.job import JobLogger

log = logging.getLogger(__name__)
SECONDS_TO_CONNECT = 30.0
SECONDS_BETWEEN_FLUSHES = 1.0
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
    log_model: Literal["best"] | None = None,
) -> JobLogger:
    """Start (or continue) the job's W&B run in `directory` and return Lightning's logger for it.

    The run is called after the job, grouped by sweep, typed by norm, and carries the resolved config with the
    norm's name in `norm.name`. `mode=None` is online where W&B has a key (`wandb login`, `WANDB_API_KEY`), else
    offline; `WANDB_MODE` wins. A server that cannot be reached makes the run an offline one, which goes on at the
    step where the last one of this directory has ended. `log_model="best"` makes the best checkpoint the run's
    artifact, offline too; ValueError for anything else but None. Call `finish_run(logger.experiment, ...)`
    when the job ends.
    """
    if log_model not in (None, "best"):
        raise ValueError(f"logger.log_model is null or best, got {log_model!r}")
    import wandb

    from bnlight.run.tracking.agent import of_agent
    from bnlight.run.tracking.continued import ContinuedLogger
    from bnlight.run.tracking.job import JobLogger
    from bnlight.run.tracking.pieces import pieces

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
        "settings": wandb.Settings(
            console="off",
            silent=True,
            init_timeout=SECONDS_TO_CONNECT,
            x_save_requirements=False,
            **_flushing(wandb.Settings),
        ),
    }
    if of_agent():  # it has begun the run, in the sweep's project
        for name in ("project", "entity", "id"):
            del settings[name]
    earlier = pieces(directory)
    if mode == "offline":  # the logs of W&B's service too; online, downloads are to be kept for all
        os.environ.setdefault("WANDB_CACHE_DIR", str(directory.absolute() / "wandb" / ".cache"))
    try:
        run = wandb.init(mode="offline" if _unreachable and mode == "online" else mode, **settings)
    except wandb.errors.CommError as error:  # a job must not fail, or wait each time, for its dashboard
        _unreachable.append(str(error))
        log.warning("W&B cannot be reached, so this process logs offline: %s", error)
        wandb.teardown()  # its service still holds the run's id
        run = wandb.init(mode="offline", **settings)
    if mode != "disabled":
        _save_requirements(run)
    monitor = config.get("monitor") or {"metric": None, "mode": "max"}
    given = (run, directory, monitor["metric"], monitor["mode"], log_model)
    if run.offline and earlier:
        return ContinuedLogger(*given, earlier=earlier)
    return JobLogger(*given)


def run_url(run: Any) -> str | None:
    """Where the run is seen in a browser; None offline, and for another tracker than W&B."""
    if not hasattr(run, "offline"):
        return None
    return None if run.offline or run.disabled else run.url


def finish_run(run: Any, state: str, measures: Mapping[str, Any]) -> None:
    """End the run; its summary then has the job's state, which W&B's own words do not tell apart, and `measures`.

    `state` is `done`, `diverged`, or, for the exit code 1, `failed`, `preempted` or `interrupted`.
    """
    import wandb

    known = {name: value for name, value in measures.items() if value is not None}
    if not hasattr(run, "offline"):  # another tracker than W&B, which Lightning has ended
        return
    try:
        if wandb.run is not None and wandb.run is not run:  # one that the module has begun
            wandb.finish()
        run.summary.update({STATE: state, **known})
        run.finish(exit_code=0 if state in ("done", "diverged") else 1)
    except Exception as error:  # SLURM's SIGTERM reaches W&B's process too, which then is gone
        log.warning("W&B could not be told of the end: %s", error)


def _flushing(settings: Any) -> dict[str, Any]:
    """A killed process loses what W&B has not yet written: stock up to 15 s. Older releases have no such setting."""
    known = "x_transaction_log_flush_interval" in settings.model_fields
    return {"x_transaction_log_flush_interval": SECONDS_BETWEEN_FLUSHES} if known else {}


def _save_requirements(run: Any) -> None:
    """The installed packages, as W&B itself saves them; it would look for them again at each run, for 0.15 s."""
    path = Path(run.dir) / "requirements.txt"
    path.write_text(_requirements(), encoding="utf-8")
    run.save(str(path), base_path=run.dir, policy="now")


@functools.cache
def _requirements() -> str:
    found = {f"{d.metadata['Name']}=={d.version}" for d in importlib.metadata.distributions()}
    return "\n".join(sorted(found, key=str.lower)) + "\n"


def server() -> str:
    """The address of W&B's server, as the environment or W&B's settings say."""
    import wandb

    return os.environ.get("WANDB_BASE_URL") or str(wandb.Settings().base_url)


def logged_in() -> bool:
    """Whether W&B has credentials (environment or netrc), found without asking anybody over the network."""
    if any(os.environ.get(name) for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")):
        return True
    host = urlsplit(server()).hostname or ""
    files = [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
    for file in files:
        with contextlib.suppress(FileNotFoundError, netrc.NetrcParseError):
            if netrc.netrc(Path(file).expanduser()).authenticators(host):
                return True
    return False
