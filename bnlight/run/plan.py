"""`--dry-run`: the jobs of a command and what would be done with each, nothing run and nothing written."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from bnlight.run import sweep
from bnlight.run.application import run_hydra
from bnlight.run.job import FINISHED, check_command
from bnlight.run.launch.submitted import has_begun, submitted
from bnlight.run.status import read_status
from bnlight.run.survive.lock import owner

looking = False  # this process shows a plan
CHOOSES_ITSELF = "{sweeper} chooses each job by the results of those before, so none can be listed."


class _Enough(BaseException):
    """The sweeper cannot be asked for its jobs."""


def show_plan(arguments: list[str], config_name: str, folder: Path | None) -> None:
    """Print a line for each job of the command: its name, its state, and what would happen.

    Jobs are composed here, one after another, whatever launcher the sweep has. A sweeper that needs results to
    choose the next job is named instead. Raises CommandError as a run would.
    """
    given = [one for one in arguments if not one.startswith(("hydra/launcher=", "hydra.launcher."))]
    given.append("hydra/launcher=basic")
    counts: dict[str, int] = {}

    def look(config: DictConfig) -> None:
        _look(config, counts)

    with contextlib.suppress(_Enough), _looking():
        run_hydra(given, config_name, folder, task=look)
        if not counts:  # the sweeper has said why
            return
        total = sum(counts.values())
        print(f"{total} jobs: " + ", ".join(f"{count} {what}" for what, count in counts.items()))


@contextlib.contextmanager
def _looking() -> Iterator[None]:
    global looking
    looking = True
    try:
        yield
    finally:
        looking = False


def _look(config: DictConfig, counts: dict[str, int]) -> None:
    hydra: Any = HydraConfig.get()
    directory = Path(hydra.runtime.output_dir)
    with contextlib.suppress(OSError):
        directory.rmdir()  # Hydra has made it; one that holds anything stays
    check_command(config, hydra)
    sweeper = hydra.sweeper._target_.rsplit(".", 1)[-1]
    if hydra.mode.name == "MULTIRUN" and sweeper not in ("BasicSweeper", "List"):
        print(CHOOSES_ITSELF.format(sweeper=sweeper))
        raise _Enough
    state, what, why = _outlook(directory, config.rerun)
    counts[what] = counts.get(what, 0) + 1
    label = sweep.current.label(hydra.job.num) if sweep.current else ""
    print(f"{label} {directory.name}: {state}, {what}{f' ({why})' if why else ''}".strip(), flush=True)


def _outlook(directory: Path, rerun: str | None) -> tuple[str, str, str]:
    """The job's state, what a run would do with it, and why."""
    try:
        status = read_status(directory)
    except ValueError as error:
        return "unreadable", "fails", str(error)
    state = status.get("state", "new")
    if state == "running":
        who = owner(directory)
        return state, "runs elsewhere", f"process {who.get('pid')} on {who.get('host')}"
    number = submitted(directory)
    if number and not has_begun(directory, number):
        return "submitted", "is waited for", f"SLURM job {number}"
    if rerun == "all" and state != "new":
        return state, "starts again", "--force"
    if state in FINISHED:
        return state, "is skipped", str(status.get("error") or "")
    if state == "failed":
        reason = (status.get("error") or "for an unknown reason").splitlines()[0]
        if rerun == "failed":
            return state, "runs again", reason
        return state, "is left", f"--retry-failed runs it: {reason}"
    if (directory / "checkpoints" / "last.ckpt").exists():
        return state, "continues", str(status.get("stopped") or f"step {status.get('step', '?')}")
    return state, "runs", ""
