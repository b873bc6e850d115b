"""The most memory that a job of this process has used, apart from what the jobs before it did."""

from __future__ import annotations

import re
from pathlib import Path

import torch

PROCESS = Path("/proc/self")
RESET_PEAK = "5"  # man 5 proc, clear_refs: the peak becomes what is resident now


def reset_peak_memory() -> bool:
    """Start to measure; False where the kernel does not let a process reset its peak."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        for device in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(device)
    try:
        (PROCESS / "clear_refs").write_text(RESET_PEAK)
    except OSError:
        return False
    return True


def peak_memory(device: torch.device, since_reset: bool) -> int | None:
    """Bytes at the peak: what torch has allocated on a GPU, else what was resident of this process.

    None on the CPU where the peak was not reset, since it would be that of an earlier job.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if not since_reset:
        return None
    found = re.search(r"^VmHWM:\s+(\d+) kB$", (PROCESS / "status").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else None
