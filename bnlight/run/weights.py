"""Which file `init_from` means, and its content's hash: found without torch, as a job's identity needs it."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path


def weights_file(given: str | Path) -> Path:
    """The file itself, or of a job's directory the best checkpoint, failing that the last.

    Raises FileNotFoundError, naming what is there.
    """
    path = Path(given).expanduser()
    if path.is_dir():
        for name in ("best", "last"):
            if (path / "checkpoints" / f"{name}.ckpt").is_file():
                return path / "checkpoints" / f"{name}.ckpt"
        there = ", ".join(sorted(p.name for p in path.iterdir())[:10]) or "nothing"
        raise FileNotFoundError(
            f"{path}: expected a job's directory with checkpoints/best.ckpt or checkpoints/last.ckpt; it holds {there}"
        )
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: expected a state dict, a checkpoint or a job's directory"
        )
    return path


def fingerprint(given: str | Path) -> str:
    """The sha256 of the file's content: weights are what they are, wherever they lie."""
    path = weights_file(given).resolve()
    state = path.stat()
    return _fingerprint(path, state.st_mtime_ns, state.st_size)


@functools.cache
def _fingerprint(path: Path, modified: int, size: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
