"""One run as a source shows it, and the row of the table of runs that it becomes."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bnlight.compare.axes import NULL, describes
from bnlight.run.unused import divided

STATES = ("done", "running", "failed", "diverged", "preempted", "interrupted", "unknown", "duplicate")
COMPARISON = "comparison"  # W&B's type of a run that holds a comparison, and is none of its runs


@dataclass
class Run:
    """A run of one source.

    `place` is where it was seen, from the outside in: the parts of the path of a sweep's folder, or W&B's entity,
    project and group. `folder` is the job's directory, None for a run of W&B; `wandb_id` is W&B's name of it.
    `lines` are the metrics of a run of W&B, those of a job are in its directory. `notes` say what could not be read.
    """

    name: str
    place: tuple[str, ...]
    source: str
    row: dict[str, Any]
    config: dict[str, Any] | None = None
    folder: Path | None = None
    wandb_id: str | None = None
    project: str | None = None
    lines: list[dict[str, float]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    key: str = ""


def row_of(
    name: str, config: Mapping[str, Any], status: Mapping[str, Any], result: Mapping[str, Any]
) -> dict[str, Any]:
    """The row of a run: what was set, how it ended (`status.json`), what came out (`result.json`)."""
    job = mapping(config.get("job"))
    state, overrides = status.get("state"), job.get("overrides")
    row: dict[str, Any] = {
        "job": str(job.get("name") or name),
        "state": state if state in STATES else "unknown",
        "norm": _norm(config) if config else None,
        "model": _choice(config, "model"),
        "data": _choice(config, "data"),
        "seed": _word(config.get("seed")),
        "batch_size": number(_setting(config, "data.batch_size", "batch_size")),
        "lr": number(_setting(config, "optimizer.lr", "lr", "learning_rate")),
        "world_size": number(result.get("world_size")),
        "identity": job.get("identity"),
        "overrides": " ".join(map(str, overrides)) if isinstance(overrides, list) else "",
        "sweep": job.get("sweep"),
        "attempt": number(status.get("attempt")),
        "heartbeat": number(status.get("heartbeat")),
        "seconds": number(result.get("seconds")),
        "steps": number(result.get("steps")),
        "epochs": number(result.get("epochs")),
        "peak_memory": number(result.get("peak_memory")),
        "error": first_line(status.get("error")) or _last_line(status.get("traceback")),
        "git": result.get("git"),
        "versions": _pairs(result.get("versions")),
        "hardware": _pairs(result.get("hardware")),
        "url": result.get("wandb_url") or status.get("wandb_url"),
    }
    metrics = mapping(result.get("metrics"))
    if lost := [str(name) for name, value in metrics.items() if _not_finite(value)]:
        row["not_finite"] = " ".join(lost)
    for metric, value in metrics.items():
        row[str(metric) if metric not in row else f"result/{metric}"] = number(value)
    return row


def flatten(config: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """The config's leaves as `section.key`, its group choices as `group`; lists are one leaf, as JSON.

    A setting that is null is `null`: a missing value stands for a key that there is not.
    """
    flat: dict[str, Any] = {}

    def visit(prefix: str, value: Any) -> None:
        if isinstance(value, dict) and value:
            for key, child in value.items():
                visit(f"{prefix}.{key}" if prefix else str(key), child)
        elif isinstance(value, (dict, list)):
            flat[prefix] = json.dumps(value, sort_keys=True, default=str)
        else:
            flat[prefix] = NULL if value is None and describes(prefix) else value

    visit("", {key: value for key, value in config.items() if key != "job"})
    choices = mapping(mapping(config.get("job")).get("choices"))
    flat.update({str(group): choice for group, choice in choices.items() if choice is not None})
    flat["norm"] = row["norm"]
    return flat


def used(config: dict[str, Any], without: Collection[str]) -> dict[str, Any]:
    """The config without the groups that the job's own module does without: they say nothing of it."""
    if not without:
        return config
    job = mapping(config.get("job"))
    choices, _ = divided(mapping(job.get("choices")), without)
    kept = {key: value for key, value in config.items() if key not in without}
    return kept | {"job": {**job, "choices": choices}}


def mapping(value: Any) -> dict[Any, Any]:
    return value if isinstance(value, dict) else {}


def number(value: Any) -> float:
    """A finite float, or NaN."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return math.nan
    try:
        found = float(value)
    except (ValueError, OverflowError):
        return math.nan
    return found if math.isfinite(found) else math.nan


def _not_finite(value: Any) -> bool:
    """Whether this is what is left of a NaN or an infinity; a job's files have null."""
    try:
        return value is None or not math.isfinite(float(value))
    except (TypeError, ValueError, OverflowError):
        return False


def first_line(error: Any) -> str | None:
    """The first line of an error, which names it; the rest is in the job's log."""
    return next((line.strip() for line in str(error or "").splitlines() if line.strip()), None)


def why(error: Exception) -> str:
    """The first line of an exception, or its type."""
    return first_line(error) or type(error).__name__


def _setting(config: Mapping[str, Any], *names: str) -> Any:
    """The first of the dotted `names` that the config has."""
    for name in names:
        section, _, key = name.rpartition(".")
        found = (mapping(config.get(section)) if section else config).get(key)
        if found is not None:
            return found
    return None


def _choice(config: Mapping[str, Any], group: str) -> Any:
    """The option chosen for a group; of a config that is not bnlight's, its word, or its `name`, for it."""
    section = config.get(group)
    named = section.get("name") if isinstance(section, dict) else section
    return _word(mapping(mapping(config.get("job")).get("choices")).get(group, named))


def _word(value: Any) -> Any:
    """A setting that is one value; None for a list or a section."""
    return None if isinstance(value, (dict, list)) else value


def _norm(config: Mapping[str, Any]) -> str:
    """The norm's name: the option chosen, or the class where the option is `custom` or unknown."""
    choice, section = _choice(config, "norm"), config.get("norm")
    target = section.get("_target_") if isinstance(section, dict) else section
    if choice not in (None, "custom", target) or not isinstance(target, str):
        return str(choice or "?")
    return target.rpartition(".")[2]


def _pairs(value: Any) -> str | None:
    if isinstance(value, dict):
        return ", ".join(f"{name} {item}" for name, item in value.items() if item not in (None, "", [], {}))
    return str(value) if value else None


def _last_line(traceback: Any) -> str | None:
    lines = [line.strip() for line in str(traceback or "").splitlines() if line.strip()]
    return lines[-1] if lines else None
