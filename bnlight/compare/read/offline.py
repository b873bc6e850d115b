"""Read what W&B has written offline: `.wandb` files, which need neither its server nor anything around them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bnlight.compare.read.run import COMPARISON, Run
from bnlight.compare.read.tracked import Tracked, run_of
from bnlight.run.tracking.pieces import records


@dataclass
class _Piece:
    """One file: a run, or what was written of it between a start and an end."""

    run_id: str = ""
    job_type: str = ""
    name: str = ""
    project: str = ""
    place: tuple[str, ...] = ()
    started: float = 0.0
    git: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, float]] = field(default_factory=list)
    heartbeat: float = 0.0
    exit_code: int | None = None


def read_offline(paths: Iterable[Path], source: str, notes: list[str]) -> Iterator[Run]:
    """The runs in `paths`, folders or files of W&B; the pieces of one run are joined in the order of their starts."""
    by_run: dict[tuple[str, str], dict[float, _Piece]] = {}
    for path in paths:
        for file in sorted(path.glob("*.wandb")) if path.is_dir() else [path]:
            try:
                piece = _read(file)
            except (OSError, ValueError) as error:
                notes.append(f"{file}: cannot be read ({error})")
                continue
            if not piece.run_id:
                notes.append(f"{file} ({file.stat().st_size} bytes): no run, it was killed at its start")
                continue
            if piece.job_type == COMPARISON:
                continue
            pieces = by_run.setdefault((piece.project, piece.run_id), {})
            known = pieces.get(piece.started)
            if known is None or len(known.rows) < len(piece.rows):  # of a file and its copy, the whole one
                pieces[piece.started] = piece
    for pieces in by_run.values():
        yield run_of(_joined([pieces[started] for started in sorted(pieces)], source))


def _joined(pieces: list[_Piece], source: str) -> Tracked:
    last = pieces[-1]
    code = last.exit_code
    tracked = Tracked(last.run_id, last.name or last.run_id, last.project, last.place, source, git=last.git)
    tracked.state = "running" if code is None else "failed" if code else "finished"
    tracked.heartbeat = last.heartbeat
    tracked.attempts = len(pieces)
    for attempt, piece in enumerate(pieces, start=1):
        tracked.config |= piece.config
        tracked.summary |= piece.summary
        for row in piece.rows:
            row["attempt"] = float(attempt)
        tracked.rows += piece.rows
    return tracked


def _read(file: Path) -> _Piece:
    """What `file` holds, up to its end or to where a kill has cut it off."""
    piece, summary = _Piece(), dict[str, str]()
    for kind, content in records(file):
        if kind == "history":
            row = {_name(item): _number(item.value_json) for item in content.item}
            piece.rows.append({name: value for name, value in row.items() if value is not None})
            piece.heartbeat = piece.rows[-1].get("_timestamp") or piece.heartbeat
        elif kind == "summary":
            summary |= {_name(item): item.value_json for item in content.update}
        elif kind == "stats":
            piece.heartbeat = content.timestamp.ToMicroseconds() / 1e6
        elif kind == "run":
            piece.run_id, piece.name = content.run_id, content.display_name
            piece.job_type = content.job_type
            piece.project = content.project or "uncategorized"
            where = (content.entity, piece.project, content.run_group)
            piece.place = tuple(part for part in where if part)
            piece.started = piece.heartbeat = content.start_time.ToMicroseconds() / 1e6
            piece.git = content.git.commit or None
            _update(piece.config, content.config)
        elif kind == "config":
            _update(piece.config, content)
        elif kind == "exit":
            piece.exit_code = content.exit_code
    piece.summary = {name: json.loads(value) for name, value in summary.items()}
    return piece


def _update(config: dict[str, Any], change: Any) -> None:
    for item in change.update:
        *outer, key = item.nested_key or [item.key]
        section = config
        for name in outer:
            if not isinstance(section.get(name), dict):
                section[name] = {}
            section = section[name]
        section[key] = json.loads(item.value_json)
    for item in change.remove:
        config.pop(item.key, None)


def _name(item: Any) -> str:
    nested = item.nested_key
    return nested[0] if len(nested) == 1 else ".".join(nested) or item.key


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # a word, a list, a histogram
        return None
