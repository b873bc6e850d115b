"""Ranks that somebody else has started compare their configs before anything else happens.

Each has composed its own from its command line, its files and its environment. Trained with different ones they would
report success and mean nothing, wait for each other for ever, or write into two directories.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from bnlight.run.ranks.started import Started, WrongRanks, started
from bnlight.run.ranks.talk import forget_earlier

SECONDS_FOR_ALL = 300.0  # a rank may import from a slow disk
SHOWN = 5  # differences in the message


def agree(config: Mapping[str, Any], folder: Path) -> None:
    """Return when all ranks have come with the same resolved config; nothing to do for a process started alone.

    They meet in torchrun's store, or else in a file in `folder`, which all ranks must see.

    Raises WrongRanks, on every rank alike, with the keys that differ and both values, or naming the ranks that have
    not come in time.
    """
    place = started()
    if place is None or place.world_size == 1:
        return
    store = _store(place, folder)
    store.set(f"config {place.rank}", json.dumps(config, sort_keys=True, default=str))
    if place.rank == 0:
        verdict = _verdict(store, place.world_size)
        forget_earlier(folder, place)  # while all wait for the verdict
        store.set("verdict", verdict)
    try:
        verdict = store.get("verdict").decode()
    except Exception as error:
        raise WrongRanks(f"rank 0 has not compared the configs within {SECONDS_FOR_ALL:.0f} s") from error
    if verdict:
        raise WrongRanks(verdict)


def _store(place: Started, folder: Path) -> Any:
    dist: Any = importlib.import_module("torch.distributed")
    patience = timedelta(seconds=SECONDS_FOR_ALL)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store: Any = dist.TCPStore(address, port, is_master=False, timeout=patience)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        store = dist.FileStore(str(folder / f".ranks-{place.launch}"), place.world_size)
        store.set_timeout(patience)
    return dist.PrefixStore(f"bnlight {place.launch}", store)


def _verdict(store: Any, world_size: int) -> str:
    """On rank 0: what is wrong, or nothing."""
    configs: list[dict[str, Any]] = []
    for rank in range(world_size):
        try:
            configs.append(json.loads(store.get(f"config {rank}")))
        except Exception:
            return f"rank {rank} of {world_size} has not come within {SECONDS_FOR_ALL:.0f} s"
    for rank, config in enumerate(configs):
        if config != configs[0]:
            return (
                f"rank {rank} has another config than rank 0, so nothing was started:\n"
                f"{differences(configs[0], config, rank)}\n"
                "Start all ranks with the same command, files and environment."
            )
    return ""


def differences(first: Mapping[str, Any], other: Mapping[str, Any], rank: int) -> str:
    """The first keys in which two configs differ, each with both values."""
    left, right = _flat(first), _flat(other)
    absent = "(no such key)"
    keys = [key for key in sorted({*left, *right}) if left.get(key, absent) != right.get(key, absent)]
    keys = [key for key in keys if not key.startswith("job.")] or keys
    lines = [f"  {key}: rank 0 {left.get(key, absent)}, rank {rank} {right.get(key, absent)}" for key in keys]
    more = [f"  and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return "\n".join([*lines[:SHOWN], *more])


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
    return flat
