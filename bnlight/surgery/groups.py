"""Process groups of some of the ranks, for statistics that need not travel far."""

import os
import socket
from typing import Literal

import torch.distributed as dist

from bnlight.norm.sync import ProcessGroup

Group = Literal["world", "node"] | int
"""All ranks, those of one machine, or that many consecutive ones."""


def check_group(group: Group) -> None:
    """ValueError for what is no group."""
    number = isinstance(group, int) and not isinstance(group, bool) and group > 0
    if not number and group not in ("world", "node"):
        raise ValueError(
            f'a group of ranks is "world" (all), "node" (those of one machine) or a number of consecutive ranks, '
            f"got {group!r}"
        )


def process_group(group: Group) -> ProcessGroup:
    """This rank's process group; every rank must call this, for all of them make all groups.

    "node" goes by host name and by the node's rank that torchrun, Lightning or SLURM have set in the environment.

    Raises ValueError, on every rank, if `group` is a number that does not divide the number of ranks, and
    RuntimeError without an initialized process group (except for "world", which is looked up when it is needed).
    """
    check_group(group)
    if group == "world":
        return "world"
    if not dist.is_initialized():
        raise RuntimeError(f"group={group!r} needs ranks: call torch.distributed.init_process_group before")
    size = dist.get_world_size()
    if group == "node":
        places: list[object] = [None] * size
        dist.all_gather_object(places, _node())
    elif size % group:
        divisors = [number for number in range(1, size + 1) if size % number == 0]
        raise ValueError(f"group={group} does not divide the {size} ranks; choose one of {divisors}")
    else:
        places = [rank // group for rank in range(size)]
    blocks = [[rank for rank in range(size) if places[rank] == place] for place in dict.fromkeys(places)]
    if len(blocks) == 1:
        return "world"
    mine: ProcessGroup = dist.new_subgroups_by_enumeration(blocks)[0]  # type: ignore[no-untyped-call]
    return mine


def _node() -> tuple[str, str | None]:
    ranks = (os.environ.get(name) for name in ("GROUP_RANK", "NODE_RANK", "SLURM_NODEID"))
    return socket.gethostname(), next((rank for rank in ranks if rank is not None), None)
