"""Ranks that somebody else has started (torchrun, srun, submitit): who they are, whether they fit, when they go.

Every rank finds its own place in the environment. What only one of them can decide (whether the job is to run at all,
and where the ranks meet) rank 0 writes into the job's directory, and the others wait for it.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bnlight.run.status import read_json, write_json

SECONDS_TO_DECIDE = 300.0  # rank 0 may import from a slow disk, or wait for the directory's lock
SECONDS_BETWEEN_LOOKS = 0.1
SECONDS_TO_RECORD = 15.0
FAILED = "failed-{}.json"
OURS_TO_MEET = ("srun", "submitit")  # these start processes and leave it to them to find each other


class WrongRanks(ValueError):
    """The ranks that were started are not those that the job wants."""


@dataclass(frozen=True)
class Started:
    """This process's place among the ranks, and what started them."""

    by: str  # torchrun, srun, submitit or another
    launch: str  # the same on all ranks of one launch and on no others
    variable: str  # the environment variable that has the number of ranks
    world_size: int
    rank: int
    local_rank: int
    per_node: str  # ranks on each node as SLURM writes it, such as 2(x2); empty where nobody says

    def nodes(self) -> list[int]:
        """The number of ranks on each node."""
        counts = []
        for part in filter(None, self.per_node.split(",")):
            number, times = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part).groups()  # type: ignore[union-attr]
            counts += [int(number)] * int(times or 1)
        return counts


def started() -> Started | None:
    """This process's place, or None if it was started alone and starts the ranks of its jobs itself."""
    env = os.environ
    if "TORCHELASTIC_RUN_ID" in env:
        port, restart = env.get("MASTER_PORT", ""), env.get("TORCHELASTIC_RESTART_COUNT", "0")
        return _by_torch_names("torchrun", f"{env['TORCHELASTIC_RUN_ID']}-{port}-{restart}")
    if env.get("SUBMITIT_EXECUTOR") == "local" and int(env.get("SUBMITIT_LOCAL_NTASKS", "1")) > 1:
        tasks, rank = env["SUBMITIT_LOCAL_NTASKS"], int(env["SUBMITIT_LOCAL_GLOBALID"])
        launch = f"submitit-{env['SUBMITIT_LOCAL_JOB_ID']}"
        return Started("submitit", launch, "SUBMITIT_LOCAL_NTASKS", int(tasks), rank, rank, tasks)
    if _in_step_of_several_tasks():
        restart = env.get("SLURM_RESTART_COUNT", "0")
        return Started(
            by="srun",
            launch=f"slurm-{env['SLURM_JOB_ID']}-{env.get('SLURM_STEP_ID', '0')}-{restart}",
            variable="SLURM_STEP_NUM_TASKS",
            world_size=int(env["SLURM_STEP_NUM_TASKS"]),
            rank=int(env["SLURM_PROCID"]),
            local_rank=int(env["SLURM_LOCALID"]),
            per_node=env.get("SLURM_STEP_TASKS_PER_NODE", ""),
        )
    if "LOCAL_RANK" in env and int(env.get("WORLD_SIZE", "1")) > 1:
        return _by_torch_names(
            "the environment", f"{env.get('MASTER_ADDR', '')}-{env.get('MASTER_PORT', '')}"
        )
    return None


def check_ranks(trainer: Mapping[str, Any], devices: int) -> None:
    """Refuse, on every rank alike and before anybody waits, a number of ranks that the trainer does not want.

    Raises WrongRanks with one sentence that names the variable, its value, and the value wanted.
    """
    nodes = int(trainer.get("num_nodes") or 1)
    wanted, place = devices * nodes, started()
    keys = f"trainer.devices={devices} x trainer.num_nodes={nodes}"
    if place is None:
        if nodes > 1:
            tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "unset")
            seen = f"SLURM_STEP_NUM_TASKS={tasks}" if "SLURM_JOB_ID" in os.environ else "WORLD_SIZE=unset"
            raise WrongRanks(
                f"the ranks of this job were not started on {nodes} nodes: wanted {wanted} ({keys}), seen {seen}; "
                f"start the same command with `srun --nodes={nodes} --ntasks-per-node={devices}`, or with torchrun "
                "on each node"
            )
        return
    how = {
        "srun": f"srun --nodes={nodes} --ntasks-per-node={devices}",
        "torchrun": f"torchrun --nnodes={nodes} --nproc-per-node={devices}",
        "submitit": f"hydra.launcher.tasks_per_node={devices}",
    }.get(place.by, f"{place.variable}={wanted}")
    if place.world_size != wanted:
        raise WrongRanks(
            f"{place.variable}={place.world_size}, but {keys} wants {wanted}: start {wanted} with `{how}`, or set "
            f"the trainer to the {place.world_size} that were started"
        )
    if place.nodes() and place.nodes() != [devices] * nodes:
        raise WrongRanks(
            f"SLURM_STEP_TASKS_PER_NODE={place.per_node}, but {keys} wants {devices} on each of {nodes}: "
            f"start them with `{how}`"
        )


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
            write_json(
                folder / FAILED.format(place.rank), {"what": what, "traceback": traceback.format_exc()}
            )
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


def meeting(directory: Path) -> dict[str, str]:
    """The environment in which torch's ranks find each other; empty where it is set already."""
    place = started()
    if place is None or not _is_ours_to_meet(place):
        return {}
    said = read_json(_folder(directory, place) / "0.json")
    return {
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


def cluster_environment(plugins: list[Any]) -> list[Any]:
    """What Lightning must be given so that it does not take SLURM's variables for its own orders.

    It would refuse `--ntasks`, wait for ranks nobody starts, and requeue jobs by itself.
    """
    from lightning_fabric.plugins.environments.lightning import LightningEnvironment

    given = any("Environment" in str(plugin) for plugin in plugins)
    ours = "SLURM_JOB_ID" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ
    return [LightningEnvironment()] if ours and not given else []


def _in_step_of_several_tasks() -> bool:
    """Whether srun started this process beside others.

    SLURM_NTASKS does not tell: a batch script has it too, and runs once. The job's name does not either: `srun`
    without sbatch calls a job after its command. In a step with a terminal (`srun --pty`) only one task is used.
    """
    env = os.environ
    return (
        int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1
        and "SLURM_PROCID" in env
        and "SLURM_PTY_PORT" not in env
    )


def _by_torch_names(by: str, launch: str) -> Started:
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    local = int(os.environ.get("LOCAL_RANK", str(rank)))
    return Started(by, re.sub(r"[^\w.-]", "_", launch), "WORLD_SIZE", world, rank, local, "")


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
