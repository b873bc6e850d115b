"""Measure steps against each other: interleaved times, peak memory, and the machine's copy bandwidth."""

import ctypes
import os
import random
import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from bnlight.run.provenance import cpu_name

Step = Callable[[], None]
Agree = Callable[[float], float]
"""Of a number that may differ between processes makes one for all; they meet here."""

SHORTEST = 4e-3
"""Seconds that one timing lasts at least; a shorter step is repeated within it."""


def hardware(device: torch.device) -> str:
    """The GPU's name, or the processor's and its number of cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {os.cpu_count()} cores"


def keep_freed_memory() -> bool:
    """Let the process keep the memory it frees, as a GPU's allocator does, if its C library is glibc.

    Otherwise large tensors come from the system anew in each step, or not, as chance places them, and their page
    faults take longer than the layers.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except OSError:
        return False
    trim_threshold, mmap_max = -1, -4
    return bool(mallopt(trim_threshold, 2**31 - 1)) and bool(mallopt(mmap_max, 0))


def own(number: float) -> float:
    """`Agree` for a process alone."""
    return number


def interleaved(
    steps: Mapping[str, Step], device: torch.device, rounds: int, budget: float, agree: Agree = own
) -> dict[str, list[float]]:
    """Seconds of each step in each round; every round runs all steps in a new random order.

    Each step first runs twice without being recorded; the second run says how often one timing repeats it.
    There are `rounds` rounds, or as many as `budget` seconds allow, but at least three. Processes that `agree`
    do the same at the same time.
    """
    repeats, cost = {}, 0.0
    for name, step in steps.items():
        step()
        once = agree(timed(step, device, 1))
        repeats[name] = max(1, round(SHORTEST / once))
        cost += once * repeats[name]
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    order, shuffle = list(steps), random.Random(0).shuffle
    for _ in range(max(3, min(rounds, int(budget / cost)))):
        shuffle(order)
        for name in order:
            agree(0.0)
            seconds[name].append(timed(steps[name], device, repeats[name]))
    return seconds


def timed(step: Step, device: torch.device, repeats: int) -> float:
    """Mean seconds of `repeats` runs: by CUDA events on a GPU, by the clock elsewhere."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda.synchronize(device)
        begin.record()
        for _ in range(repeats):
            step()
        end.record()
        torch.cuda.synchronize(device)
        return float(begin.elapsed_time(end)) / 1e3 / repeats
    begun = time.perf_counter()
    for _ in range(repeats):
        step()
    return (time.perf_counter() - begun) / repeats


def copy_seconds(x: Tensor, rounds: int = 9) -> float:
    """Median seconds of a copy of `x` into a tensor that exists: one read and one write."""
    source, target = x.detach(), torch.empty_like(x)

    def copy() -> None:
        target.copy_(source)

    return statistics.median(interleaved({"copy": copy}, x.device, rounds, budget=1.0)["copy"])


def peak_memory(step: Step, device: torch.device) -> int:
    """Bytes that `step` has allocated at its peak beyond what was allocated before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces itself on the terminal
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    results = recorded.profiler.kineto_results if recorded.profiler is not None else None
    changes = [] if results is None else [e for e in results.events() if e.name() == "[memory]"]
    now = peak = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        now += change.nbytes()
        peak = max(peak, now)
    return peak
