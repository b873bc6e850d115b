"""Which accelerators a job may use while others run on the same machine: leases that die with their holder.

A lease is a kernel lock on a small file per device, so a crashed job's devices are free at once. Whoever needs n
devices takes a ticket and, when it is first in line, waits until n are free together: first come, first served, and
nobody holds some while waiting for more. Nothing here imports torch before it is needed.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from bnlight.run.survive.held import held

MADE_UP = "BNLIGHT_DEVICES"  # ids to lease instead of the machine's, such as a,b,c: for tests without a GPU
LEASED = "BNLIGHT_LEASED"  # what the Trainer of a job is given as `devices`
FOLDER = "BNLIGHT_LEASES"  # where the locks are; one folder per machine and user
SECONDS_BETWEEN_LOOKS = 0.2
SECONDS_TO_SAY = 1.0  # a wait that is shorter than this needs no words


class WrongDevices(ValueError):
    """`trainer.devices` is not a number of devices."""


@dataclass
class Lease:
    """The devices of one job: their ids as in CUDA_VISIBLE_DEVICES, and their places in the visible list."""

    ids: list[str]
    places: list[int]
    made_up: bool = False
    locks: list[IO[str]] = field(default_factory=list, repr=False)

    def for_new_processes(self) -> dict[str, str]:
        """The environment in which processes that are started now see these devices and no others."""
        return {"CUDA_VISIBLE_DEVICES": ",".join(self.ids), LEASED: json.dumps(len(self.ids))}

    def for_this_process(self) -> dict[str, str]:
        """The environment that tells the Trainer of this process, which may have initialized CUDA long ago."""
        return {} if self.made_up else {LEASED: json.dumps(self.places)}


def leased_devices(wanted: Any) -> Any:
    """The Trainer's `devices`: what the lease says, else what the config wants."""
    leased = os.environ.get(LEASED)
    return json.loads(leased) if leased else wanted


def devices_of(trainer: Mapping[str, Any]) -> int | list[int]:
    """How many devices the trainer's config wants, or which places of the visible list: `[0, 2]`, or `0,2`.

    Raises WrongDevices for anything else.
    """
    devices = trainer.get("devices", 1)
    if str(devices) in ("auto", "-1"):
        import torch

        return max(1, torch.cuda.device_count()) if trainer.get("accelerator") != "cpu" else 1
    places = (
        [part for part in devices.split(",") if part]
        if isinstance(devices, str) and "," in devices
        else devices
    )
    listed = isinstance(places, list | tuple)
    texts = [str(one).strip() for one in places] if listed else [str(places).strip()]
    numbers = [int(text) for text in texts if text.isdecimal()]
    if len(numbers) != len(texts) or not (len({*numbers}) == len(numbers) > 0 if listed else numbers[0] > 0):
        raise WrongDevices(
            f"trainer.devices={devices} is not a number of devices: expected 1, 2, ..., 'auto', or a list of GPUs "
            "such as [0,2]"
        )
    if listed and trainer.get("accelerator") == "cpu":
        raise WrongDevices(
            f"trainer.devices={devices} lists GPUs, and trainer.accelerator=cpu has none: give their number"
        )
    return numbers if listed else numbers[0]


def visible_devices(accelerator: str) -> list[str]:
    """The ids of the GPUs this process may use, as CUDA_VISIBLE_DEVICES has them; empty for another accelerator."""
    if os.environ.get(MADE_UP):
        return _split(os.environ[MADE_UP])
    if accelerator not in ("auto", "gpu", "cuda"):
        return []
    import torch

    count = torch.cuda.device_count()  # asks NVML, so CUDA stays uninitialized
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return _split(given)[:count] if given is not None else [str(place) for place in range(count)]


@contextlib.contextmanager
def lease(
    wanted: int | Sequence[int],
    accelerator: str,
    share: int | None = 1,
    say: Callable[[str], None] = print,
    holder: str = "",
) -> Iterator[Lease | None]:
    """Hold `wanted` devices (a number, or places in the visible list) for the block, waiting until they are free.

    Up to `share` jobs may hold a device at the same time; `share=None` leases nothing, and neither does a machine
    without GPUs. `say` is told once whom the job waits for. Raises ValueError when there are not as many devices.
    """
    visible = visible_devices(accelerator) if share is not None else []
    if not visible or share is None:
        yield None
        return
    if share < 1:
        raise ValueError(
            f"share_devices={share}: expected 1 (a device has one job), 2, ..., or null (no leases)"
        )
    places = range(len(visible)) if isinstance(wanted, int) else list(wanted)
    number = wanted if isinstance(wanted, int) else len(places)
    if number > len(visible) or any(not 0 <= place < len(visible) for place in places):
        raise ValueError(f"trainer.devices wants {wanted}, but the visible devices are {', '.join(visible)}")
    names = _names(visible)
    with _in_turn() as turn:
        got = _wait(turn, {place: names[place] for place in places}, number, share, say, holder)
    try:
        yield Lease([visible[p] for p in got], list(got), MADE_UP in os.environ, list(got.values()))
    finally:
        for file in got.values():
            _release(file)


def _wait(
    first: Callable[[], bool],
    names: dict[int, str],
    number: int,
    share: int,
    say: Callable[[str], None],
    holder: str,
) -> dict[int, IO[str]]:
    begun, said = time.monotonic(), False
    while True:
        if first():
            got = _take(names, number, share)
            if len(got) == number:
                for file in got.values():
                    file.truncate(0)
                    file.write(f"process {os.getpid()}{f' ({holder})' if holder else ''}")
                    file.flush()
                return got
            for file in got.values():
                _release(file)
        if not said and time.monotonic() - begun > SECONDS_TO_SAY:
            said = True
            say(f"waits for {number} of the devices {', '.join(names.values())}: {_holders(names, share)}")
        time.sleep(SECONDS_BETWEEN_LOOKS)


def _take(names: dict[int, str], number: int, share: int) -> dict[int, IO[str]]:
    """As many of `number` devices as are free now, the least used first."""
    got: dict[int, IO[str]] = {}
    for slot in range(share):
        for place, name in names.items():
            if len(got) < number and place not in got:
                file = _lock_device(name, slot, share)
                if file is not None:
                    got[place] = file
    return got


def _lock_device(name: str, slot: int, share: int) -> IO[str] | None:
    """One of the device's `share` slots. A job that does not share needs them all: its lock is on the whole."""
    whole = _lock(folder() / name, fcntl.LOCK_EX if share == 1 else fcntl.LOCK_SH)
    if whole is None or share == 1:
        return whole
    part = _lock(folder() / f"{name}.{slot}", fcntl.LOCK_EX)
    if part is None:
        _release(whole)
        return None
    _whole_of[part] = whole
    return part


_whole_of: dict[IO[str], IO[str]] = {}  # a slot's lock keeps the lock on its device


def _lock(path: Path, kind: int) -> IO[str] | None:
    file = path.open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    held.add(file)
    return file


def _release(file: IO[str]) -> None:
    for lock in (file, _whole_of.pop(file, None)):
        if lock is not None:
            held.discard(lock)
            lock.close()


@contextlib.contextmanager
def _in_turn() -> Iterator[Callable[[], bool]]:
    """A place in the line; yields a function that tells whether it is the first one. The dead lose theirs."""
    tickets = folder() / "line"
    tickets.mkdir(exist_ok=True)
    with (folder() / "gate").open("a+") as gate:
        fcntl.flock(gate, fcntl.LOCK_EX)  # for an instant: numbers are given to one at a time
        number = max((int(path.name) for path in tickets.iterdir()), default=0) + 1
        mine = tickets / str(number)
        ticket = _lock(mine, fcntl.LOCK_EX)
    assert ticket is not None

    def first() -> bool:
        return not any(int(path.name) < number and _alive(path) for path in tickets.iterdir())

    try:
        yield first
    finally:
        mine.unlink(missing_ok=True)
        _release(ticket)


def _alive(ticket: Path) -> bool:
    try:
        with ticket.open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            ticket.unlink(missing_ok=True)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _holders(names: dict[int, str], share: int) -> str:
    """Who has the devices, as far as the lock files tell."""
    told = []
    for name in names.values():
        for path in sorted(folder().glob(f"{name}*")):
            with contextlib.suppress(OSError):
                text = path.read_text(encoding="utf-8").strip()
                if text and _lock_is_held(path):
                    told.append(f"{name} has {text}")
    return "; ".join(told) or "others came first"


def _lock_is_held(path: Path) -> bool:
    file = _lock(path, fcntl.LOCK_EX)
    if file is None:
        return True
    _release(file)
    return False


def folder() -> Path:
    """The folder of the locks: of this machine and user, and inside a SLURM allocation of that allocation."""
    # Not in $TMPDIR: all must agree.
    root = Path(os.environ.get(FOLDER) or f"/tmp/bnlight-devices-{os.getuid()}")
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    if root.stat().st_uid != os.getuid():
        raise PermissionError(f"{root} belongs to another user; set {FOLDER} to a folder of your own")
    allocation = os.environ.get("SLURM_JOB_ID")  # its device 0 may be another one's device 3
    path = root / (f"slurm-{allocation}" if allocation else "machine")
    path.mkdir(exist_ok=True)
    return path


def _names(visible: list[str]) -> list[str]:
    """One name per physical device, the same in every process: its UUID where numbers and UUIDs may both be used."""
    uuids = {} if os.environ.get(MADE_UP) else _uuids()
    names = []
    for device in visible:
        full = [uuid for uuid in uuids.values() if not device.isdigit() and uuid.startswith(device)]
        name = uuids.get(device) or (full[0] if len(full) == 1 else device)
        names.append(name.replace("/", "_"))
    return names


@functools.cache
def _uuids() -> dict[str, str]:
    """The UUID of each GPU by its number, where nvidia-smi is there to tell."""
    if not shutil.which("nvidia-smi"):
        return {}
    command = ["nvidia-smi", "--query-gpu=index,uuid", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    lines = done.stdout.strip().splitlines() if done.returncode == 0 else []
    return {number.strip(): uuid.strip() for number, uuid in (line.split(",", 1) for line in lines)}


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
