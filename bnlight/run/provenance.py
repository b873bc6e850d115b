"""What a result depends on beside its config: the code's commit, the versions, the machine."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import subprocess
from pathlib import Path


@functools.cache
def git_commit() -> str | None:
    """The commit of the working directory, with `-dirty` when files differ from it; None outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


@functools.cache
def versions() -> dict[str, str]:
    """The versions of Python and of what a result depends on."""
    packages = ("bnlight", "torch", "pytorch-lightning", "torchmetrics", "hydra-core", "wandb")
    return {"python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in packages
    }


@functools.cache
def cpu_name() -> str:
    """The processor's model, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
