"""Reads what an offline W&B run holds: protobuf records in LevelDB's log framing."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

BLOCK = 32768
LAST_PART = (1, 4)  # a record in one part, or the end of one in several


def records(path: Path) -> Iterator[Record]:
    data, position, parts = path.read_bytes(), 7, b""  # the file's own header has 7 bytes
    while position + 7 <= len(data):
        if BLOCK - position % BLOCK < 7:
            position += BLOCK - position % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in LAST_PART:
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def read_run(directory: Path) -> dict[str, Any]:
    """The run's id, name, group, job type, tags, config, exit code and steps logged."""
    (path,) = directory.glob("run-*.wandb")
    run: dict[str, Any] = {"config": {}, "steps": 0, "metrics": set(), "exit_code": None}
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run |= {
                "id": record.run.run_id,
                "name": record.run.display_name,
                "group": record.run.run_group,
                "job_type": record.run.job_type,
                "tags": list(record.run.tags),
                "project": record.run.project,
            }
            run["config"] |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "config":
            run["config"] |= {item.key: json.loads(item.value_json) for item in record.config.update}
        elif kind == "history":
            run["steps"] += 1
            run["metrics"] |= {item.key or ".".join(item.nested_key) for item in record.history.item}
        elif kind == "exit":
            run["exit_code"] = record.exit.exit_code
    return run
