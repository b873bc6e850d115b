"""What ranks that somebody else has started tell each other, by files beside the job's directory.

What only one of them can decide (whether the job is to run at all, and where the ranks meet) rank 0 writes there, and
the others wait for it; a rank that fails writes that, and all end.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bnlight.run.ranks.started import Started, WrongRanks, started
from bnlight.run.status import read_json, write_json

SECONDS_TO_DECIDE = 300.0  # rank 0 may import from a slow disk, or wait for the directory's lock
SECONDS_BETWEEN_LOOKS = 0.1
SECONDS_TO_RECORD = 15.0
FAILED = "failed-{}.json"
OURS_TO_MEET = ("srun", "submitit")  # these start processes and leave it to them to find each other


@contextlib.contextmanager
def leading(directory: Path) -> Iterator[None]:
    """On rank 0, around the job: if the block leaves before `go`, the other ranks are told to leave as well."""
    place = started()
    if place is None:
        yield
        return
    folder = _folder(directory, place)
    try:
        yield
    except BaseException:
        write_json(folder / FAILED.format(0), {})
        raise
    else:
        if (folder / "0.json").exists():  # the others have read it long ago
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        if folder.exists() and not (folder / "0.json").exists():
            write_json(folder / "0.json", {"go": False})


def go(directory: Path, identity: str) -> None:
    """On rank 0: the job is trained now. Waits for the other ranks and tells them where to meet.

    Raises WrongRanks if a rank has another config, or says nothing for `SECONDS_TO_DECIDE`.
    """
    place = started()
    if place is None:
        return
    folder, deadline = _folder(directory, place), time.monotonic() + SECONDS_TO_DECIDE
    for rank in range(1, place.world_size):
        theirs = _said_by(folder, rank, deadline).get("identity")
        if theirs != identity:
            raise WrongRanks(
                f"rank {rank} has the config {str(theirs)[:8]}, but rank 0 has {identity[:8]}: all ranks must be "
                "started with the same command and files"
            )
    here = {"address": _address(place), "port": _free_port()} if _is_ours_to_meet(place) else {}
    write_json(folder / "0.json", {"go": True, **here})


def follow(directory: Path, identity: str) -> bool:
    """On the other ranks: whether rank 0 trains this job now.

    Raises WrongRanks if rank 0 says nothing for `SECONDS_TO_DECIDE`.
    """
    place = started()
    assert place is not None
    folder = _folder(directory, place)
    write_json(folder / f"{place.rank}.json", {"identity": identity})
    return bool(_said_by(folder, 0, time.monotonic() + SECONDS_TO_DECIDE)["go"])


@contextlib.contextmanager
def together(directory: Path, record: Callable[[str, str], Any]) -> Iterator[None]:
    """While the ranks train: if one fails, all end, and rank 0 records why (`record(error, traceback)`).

    torchrun does that for the ranks it has started; srun leaves the others in a collective that never comes.
    """
    place = started()
    if place is None:
        yield
        return
    folder, over = _folder(directory, place), threading.Event()
    watch = threading.Thread(
        target=_watch, args=(folder, place, over, record), daemon=True, name="bnlight ranks"
    )
    watch.start()
    try:
        yield
    except Exception as error:
        if place.rank > 0:
            what = "".join(traceback.format_exception_only(error)).strip()
            said = {"what": what, "traceback": traceback.format_exc()}
            write_json(folder / FAILED.format(place.rank), said)
            # Until rank 0 has written it down; then this process ends as others do.
            watch.join(SECONDS_TO_RECORD)
        raise
    finally:
        over.set()


def _watch(folder: Path, place: Started, over: threading.Event, record: Callable[[str, str], Any]) -> None:
    """End this process when another rank has failed."""
    others = range(1, place.world_size) if place.rank == 0 else range(1)
    while not over.wait(SECONDS_BETWEEN_LOOKS * 5):
        for rank in others:
            if not (path := folder / FAILED.format(rank)).exists():
                continue
            if place.rank == 0:
                said = read_json(path)
                record(f"rank {rank}: {said.get('what')}", str(said.get("traceback")))
                write_json(folder / FAILED.format(0), {})
            sys.stdout.flush()
            os._exit(1)


def meet(directory: Path) -> None:
    """Have the environment say where torch's ranks find each other, unless who has started them did.

    What a script has exported is none of a process that was started alone: jobs side by side would take one port.
    """
    place = started()
    if place is None:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)
    elif _is_ours_to_meet(place):
        said = read_json(_folder(directory, place) / "0.json")
        os.environ |= {
            "RANK": str(place.rank),
            "LOCAL_RANK": str(place.local_rank),
            "WORLD_SIZE": str(place.world_size),
            "NODE_RANK": os.environ.get("SLURM_NODEID", "0"),
            "MASTER_ADDR": str(said["address"]),
            "MASTER_PORT": str(said["port"]),
        }


def _is_ours_to_meet(place: Started) -> bool:
    """Whether nobody else has told the ranks where to find each other."""
    return place.by in OURS_TO_MEET or (place.by != "torchrun" and "MASTER_ADDR" not in os.environ)


def forget_earlier(parent: Path, place: Started) -> None:
    """Remove what ranks have left that were killed in an earlier launch of the same name."""
    shutil.rmtree(_talk(parent, place), ignore_errors=True)


def _folder(directory: Path, place: Started) -> Path:
    """Where the ranks of this launch talk: beside the job's directory, whose name depends on the config."""
    return _talk(directory.parent, place)


def _talk(parent: Path, place: Started) -> Path:
    return parent / ".ranks" / place.launch


def _said_by(folder: Path, rank: int, deadline: float) -> dict[str, Any]:
    while not (said := read_json(folder / f"{rank}.json")):
        if time.monotonic() > deadline:
            raise WrongRanks(f"rank {rank} has not come within {SECONDS_TO_DECIDE:.0f} s (in {folder})")
        time.sleep(SECONDS_BETWEEN_LOOKS)
    return said


def _address(place: Started) -> str:
    """Where the other ranks find this one."""
    if len(place.nodes()) == 1:
        return "127.0.0.1"
    with contextlib.suppress(OSError, KeyError):
        socket.getaddrinfo(os.environ["SLURMD_NODENAME"], None)
        return os.environ["SLURMD_NODENAME"]
    return socket.gethostname()


def _free_port() -> int:
    """A port that is free now, and below those that systems give to outgoing connections in the next seconds."""
    for port in random.SystemRandom().sample(range(15_000, 32_000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
    raise OSError("found no free port between 15000 and 32000 for the ranks to meet at")
