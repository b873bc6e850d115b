"""Read the runs of a project from W&B's server, through the public API of its client."""

from __future__ import annotations

import contextlib
import inspect
import math
import os
import queue
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from bnlight.compare.read.run import COMPARISON, Run, why
from bnlight.compare.read.tracked import Tracked, run_of
from bnlight.run.tracking.logger import logged_in, server
from bnlight.run.tracking.offline import unreachable

SECONDS_TO_ANSWER = 60
RUNS_PER_PAGE = 100
HISTORIES_AT_A_TIME = 8
_WORDS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}  # numbers that JSON has not


def read_online(source: str) -> Iterator[Run]:
    """The runs of `wandb:entity/project`, or those of one group: `wandb:entity/project/group`.

    WANDB_BASE_URL says which server. A history that cannot be read becomes a note of its run. Raises ValueError for
    another form, a project that does not exist, or one without such runs; PermissionError without a key, or with one
    that is refused; ConnectionError if the server cannot be reached or does not answer in time.
    """
    entity, project, group = ([*source.partition(":")[2].split("/", 2), "", ""])[:3]
    if not (entity and project):
        raise ValueError(f"{source!r}: expected wandb:entity/project or wandb:entity/project/group")
    if not logged_in():
        raise PermissionError(
            f"{source}: there is no key for {server()}. Run `wandb login`, or set WANDB_API_KEY; WANDB_BASE_URL "
            "names a server of your own"
        )
    if silent := unreachable():
        raise ConnectionError(f"{source}: {silent}. Check the network, and WANDB_BASE_URL")
    found = _list(source, entity, project, group)
    if not found:
        wanted = f"of group {group!r}" if group else "yet"
        raise ValueError(f"{source}: the project {entity}/{project} has no run {wanted}")
    for run, history in zip(found, _histories(found), strict=True):
        read = run_of(_tracked(run, [] if isinstance(history, Exception) else history, source))
        if isinstance(history, Exception):
            read.notes.append(f"its history cannot be read ({why(history)}), its summary is")
        yield read


def _list(source: str, entity: str, project: str, group: str) -> list[Any]:
    """The client's runs but comparisons, with config and summary."""
    import wandb

    try:
        api = wandb.Api(timeout=SECONDS_TO_ANSWER)
    except wandb.errors.AuthenticationError as error:
        raise PermissionError(
            f"{source}: {server()} does not let the key in ({why(error)}). Try again, or `wandb login --relogin`"
        ) from error
    options: dict[str, Any] = {"filters": {"group": group} if group else {}, "per_page": RUNS_PER_PAGE}
    if "lazy" in inspect.signature(api.runs).parameters:
        options["lazy"] = False  # or each run's config is asked for by itself
    try:
        with _folder_of_the_client():
            # list() would ask for the length first, and take a TypeError there for "none"
            return [run for run in api.runs(f"{entity}/{project}", **options) if run.job_type != COMPARISON]
    except ValueError as error:
        raise ValueError(
            f"{source}: {server()} shows no project {entity}/{project} to this key ({why(error)})"
        ) from error
    except Exception as error:  # those of the client have no class in common
        raise ConnectionError(f"{source}: {server()} has not answered as it should ({why(error)})") from error


@contextlib.contextmanager
def _folder_of_the_client() -> Iterator[None]:
    """A folder that is removed again: the client makes an empty one in it for each run that it lists."""
    before = os.environ.get("WANDB_DIR")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["WANDB_DIR"] = folder
        try:
            yield
        finally:
            del os.environ["WANDB_DIR"]
            if before is not None:
                os.environ["WANDB_DIR"] = before


def _histories(runs: Sequence[Any]) -> list[list[dict[str, Any]] | Exception]:
    """All rows of each run, several runs at a time, or why they cannot be read.

    The client waits for a history without a limit, so the threads are such as keep nobody from leaving.
    """
    outcomes: list[list[dict[str, Any]] | Exception] = [
        TimeoutError(f"no answer within {SECONDS_TO_ANSWER} s") for _ in runs
    ]
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    answered: queue.SimpleQueue[tuple[int, list[dict[str, Any]] | Exception]] = queue.SimpleQueue()
    for index in range(len(runs)):
        waiting.put(index)

    def read() -> None:
        while not waiting.empty():
            try:
                index = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                answered.put((index, list(runs[index].scan_history())))
            except Exception as error:  # becomes the run's note
                answered.put((index, error))

    for _ in range(min(HISTORIES_AT_A_TIME, len(runs))):
        threading.Thread(target=read, daemon=True).start()
    for _ in runs:
        try:
            index, outcome = answered.get(timeout=SECONDS_TO_ANSWER)
        except queue.Empty:
            break
        outcomes[index] = outcome
    return outcomes


def _tracked(run: Any, history: Sequence[Mapping[str, Any]], source: str) -> Tracked:
    beat = getattr(run, "heartbeat_at", None)
    place = [run.entity, run.project, *([run.group] if run.group else [])]
    return Tracked(
        run.id,
        run.name or run.id,
        run.project,
        tuple(place),
        source,
        state=run.state,
        config=run.config,
        summary=run.summary_metrics,
        rows=[_numbers(row) for row in history],
        heartbeat=datetime.fromisoformat(beat).replace(tzinfo=UTC).timestamp() if beat else math.nan,
        git=run.commit,
        url=run.url,
    )


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    numbers = {}
    for name, value in row.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            numbers[name] = float(value)
        elif isinstance(value, str) and value in _WORDS:
            numbers[name] = _WORDS[value]
    return numbers
