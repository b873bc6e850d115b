"""A run as W&B knows it, in the shape of a job: what was set, how it ended, what came out, step by step."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bnlight.compare.read.run import Run, mapping, number, row_of, used
from bnlight.run.survive.lock import STALE_SECONDS
from bnlight.run.tracking.pieces import GLOBAL_STEP, REASON, STATE

_INDEX = {"step", "epoch", "time", "attempt"}  # of a line, which is no metric
# By a module of the user's own; W&B is not told of them.
_PERHAPS_UNUSED = ("model", "optimizer", "scheduler")
STATES = {
    "finished": "done",
    "failed": "failed",
    "crashed": "interrupted",  # no heartbeat any more
    "killed": "interrupted",
    "running": "running",
    "preempting": "preempted",
    "preempted": "preempted",
}


@dataclass
class Tracked:
    """`rows` are the numbers of the history in order, with W&B's own `_step`, `_timestamp` and `_runtime`; `state` is
    W&B's word for it, `heartbeat` unix seconds.
    """

    run_id: str
    name: str
    project: str
    place: tuple[str, ...]
    source: str
    state: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, float]] = field(default_factory=list)
    attempts: int = 1
    heartbeat: float = math.nan
    git: str | None = None
    url: str | None = None


def run_of(tracked: Tracked) -> Run:
    """The run in the shape of a job; what makes it of little use is one of its notes."""
    config = _config(tracked.config)
    lines = _lines(tracked.rows)
    state, error = _ended(tracked, lines)
    metrics = _metrics(lines, config if state == "done" else {})
    for name, value in tracked.summary.items():
        value = value.get("last") if isinstance(value, dict) else value
        if name not in metrics and name[:1] != "_" and not math.isnan(number(value)):
            metrics[name] = number(value)
    for name in (GLOBAL_STEP, *_INDEX):
        metrics.pop(name, None)
    own = {name: metrics.pop(name, None) for name in ("world_size", "seconds", "peak_memory")}
    result = {
        "metrics": metrics,
        "world_size": own["world_size"] or _world_size(config),
        "seconds": own["seconds"] or (tracked.rows[-1].get("_runtime") if tracked.rows else None),
        "peak_memory": own["peak_memory"],
        "steps": lines[-1]["step"] if lines else None,
        "git": tracked.git,
        "wandb_url": tracked.url,
    }
    status = {"state": state, "error": error, "attempt": tracked.attempts, "heartbeat": tracked.heartbeat}
    row = row_of(tracked.name, config, status, result)
    row["norm"], row["sweep"] = row["norm"] or "?", row["sweep"] or tracked.place[-1]
    run = Run(tracked.name, tracked.place, tracked.source, row, config, lines=lines)
    run.wandb_id, run.project = tracked.run_id, tracked.project
    if row["norm"] == "?":
        run.notes.append("its W&B config has no norm (norm, or norm.name)")
    if not metrics:
        run.notes.append("no metric in W&B")
    return run


def _config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config without what W&B, and bnlight for W&B, have added."""
    kept = {key: value for key, value in config.items() if not key.startswith("_")}
    choices = mapping(mapping(kept.get("job")).get("choices"))
    if choices and isinstance(kept.get("norm"), dict):
        kept["norm"] = {key: value for key, value in kept["norm"].items() if key != "name"}
    return used(kept, [group for group in _PERHAPS_UNUSED if group in choices and group not in kept])


def _lines(rows: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """The history's lines of metrics; their step is the optimizer's where that is logged at all, else W&B's."""
    steps = GLOBAL_STEP if any(GLOBAL_STEP in row for row in rows) else "_step"
    lines, step = [], 0
    for row in rows:
        at = row.get(steps, math.nan)
        step = int(at) if math.isfinite(at) else step
        line = {name: value for name, value in row.items() if name[:1] != "_" and name != GLOBAL_STEP}
        if not line.keys() <= _INDEX:
            line["step"], line["time"] = step, row.get("_timestamp", math.nan)
            lines.append(line)
    return lines


def _ended(tracked: Tracked, lines: Sequence[Mapping[str, Any]]) -> tuple[str, str | None]:
    """The state; a training that was stopped because its loss is no number ends without a failure.

    What the job has said of its end tells apart what W&B does not: a later attempt that was killed has said nothing.
    """
    state, told = STATES.get(tracked.state, "unknown"), tracked.summary.get(STATE)
    if state == "failed" and told in ("preempted", "interrupted"):
        state = str(told)
    if state == "running" and time.time() - tracked.heartbeat > STALE_SECONDS:
        state = "interrupted"
    if state != "done" or told == "done":
        return state, None
    if told == "diverged" and REASON in tracked.summary:
        return "diverged", str(tracked.summary[REASON])
    last = {name: (value, line["step"]) for line in lines for name, value in line.items()}
    for name, (value, step) in last.items():
        if name.endswith(("/loss", "_loss")) and not math.isfinite(value):
            return "diverged", f"{name} is {value} at step {step}"
    return "diverged" if told == "diverged" else state, None


def _metrics(lines: Sequence[Mapping[str, Any]], config: Mapping[str, Any]) -> dict[str, float]:
    """The last value of each metric; what was validated is of the checkpoint that the config asks to test."""
    metrics: dict[str, float] = {}
    for line in lines:
        metrics |= line
    monitor = mapping(config.get("monitor"))
    name, sign = str(monitor.get("metric")), -1 if monitor.get("mode") == "min" else 1
    scored = [(sign * line[name], line["step"]) for line in lines if math.isfinite(line.get(name, math.nan))]
    if scored:
        best = max(scored, key=lambda pair: pair[0])[1]  # the first of equal ones, as a checkpoint is kept
        for line in lines:
            if line["step"] <= best:
                metrics |= {key: line[key] for key in line if key.startswith("val") or key == name}
    return metrics


def _world_size(config: Mapping[str, Any]) -> int | None:
    """The number of processes, where the config says it as a number."""
    trainer = mapping(config.get("trainer"))
    devices, nodes = trainer.get("devices"), trainer.get("num_nodes", 1)
    known = isinstance(devices, int) and isinstance(nodes, int) and devices > 0
    return devices * nodes if known else None
