"""What W&B has written into a job's directory: one piece per attempt, all of one run.

Offline, W&B cannot go on with a run: each attempt starts another piece, `wandb/offline-run-TIME-ID`. A piece is a log
of protobuf records in LevelDB's framing; one whose process was killed ends anywhere, also inside a record.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BLOCK, HEADER = 32768, 7  # LevelDB's; the file's own header has 7 bytes too
WHOLE, FIRST, LAST = 1, 2, 4  # a record in one part; the first and the last of several
GLOBAL_STEP = "trainer/global_step"  # Lightning's name of the optimizer step
STATE = "bnlight/state"  # in a run's summary: how the job has ended
REASON = "bnlight/diverged"  # and why its training has diverged
# Of these a run's summary has the best and the last value: `val/loss.min`, `val/loss.last`.
KNOWN = {"train/loss": "min", "val/loss": "min", "train/accuracy": "max", "val/accuracy": "max"}


@dataclass
class Piece:
    """One attempt's part of a run.

    `first` and `last` are W&B's own steps, `logged` the last optimizer step at which each metric was logged.
    `exit_code` is None where the process was killed (or still runs); `broken` says why nothing can be read.
    """

    directory: Path
    run_id: str = ""
    name: str = ""
    project: str = ""
    started: float = 0.0
    config: dict[str, Any] = field(default_factory=dict)
    first: int | None = None
    last: int | None = None
    logged: dict[str, int] = field(default_factory=dict)
    exit_code: int | None = None
    broken: str = ""

    @property
    def online(self) -> bool:
        """Whether W&B has sent it to its server while it was written."""
        return not self.directory.name.startswith("offline-")

    @property
    def synced(self) -> bool:
        """Whether `wandb sync` has uploaded it."""
        return any(self.directory.glob("*.wandb.synced"))

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(path.stat().st_size for path in self.directory.rglob("*") if path.is_file())


def pieces(directory: Path) -> list[Piece]:
    """The pieces in the `wandb` folder of the job in `directory`, in the order in which they were begun."""
    folders = (path for path in directory.glob("wandb/*run-*") if path.is_dir() and not path.is_symlink())
    return sorted(map(read_piece, folders), key=lambda piece: (piece.started, piece.directory.name))


def read_piece(directory: Path) -> Piece:
    """The piece in `directory`, such as `wandb/offline-run-20250101_120000-1a2b3c4d`; a broken one says so."""
    piece = Piece(directory)
    files = sorted(directory.glob("run-*.wandb"))
    if not files:
        piece.broken = "it holds no run-*.wandb"
        return piece
    for kind, content in records(files[0]):
        if kind == "run":
            piece.run_id, piece.name, piece.project = content.run_id, content.display_name, content.project
            piece.started = content.start_time.ToMicroseconds() / 1e6
        if kind in ("run", "config"):
            updated = content.config if kind == "run" else content
            piece.config |= {item.key: json.loads(item.value_json) for item in updated.update if item.key}
        elif kind == "history":
            _add(piece, content)
        elif kind == "exit":
            piece.exit_code = content.exit_code
    if not piece.run_id:
        piece.broken = (
            f"{files[0].name} ({files[0].stat().st_size} bytes) names no run: it was killed at its start"
        )
    return piece


def records(path: Path) -> Iterator[tuple[str, Any]]:
    """Each record's kind and content, up to the file's end or the first that is cut off."""
    from google.protobuf.message import DecodeError
    from wandb.proto import wandb_internal_pb2

    for part in _framed(path.read_bytes()):
        record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
        try:
            record.ParseFromString(part)
        except DecodeError:
            return
        kind = record.WhichOneof("record_type")
        if kind:
            yield kind, getattr(record, kind)


def _framed(data: bytes) -> Iterator[bytes]:
    position, parts = HEADER, b""
    while position + HEADER <= len(data):
        left = BLOCK - position % BLOCK
        if left < HEADER:  # the rest of a block is filled up
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        body = data[position + HEADER : position + HEADER + length]
        if len(body) < length or not WHOLE <= kind <= LAST:
            return
        parts = body if kind in (WHOLE, FIRST) else parts + body
        position += HEADER + length
        if kind in (WHOLE, LAST):
            yield parts


def _add(piece: Piece, history: Any) -> None:
    row = {item.key or ".".join(item.nested_key): item.value_json for item in history.item}
    step = int(float(row.get("_step", history.step.num)))
    piece.first = step if piece.first is None else piece.first
    piece.last = step
    if GLOBAL_STEP in row:
        at = int(float(row[GLOBAL_STEP]))
        piece.logged |= {key: at for key in row if not key.startswith("_") and key != GLOBAL_STEP}
