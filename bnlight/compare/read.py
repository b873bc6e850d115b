"""Read the job directories of a sweep into two tables: one row per job, and the metrics step by step."""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from bnlight.compare.history import read_histories
from bnlight.run.status import read_status

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml is ten times faster

STATES = ("done", "running", "failed", "diverged", "preempted", "interrupted", "unknown", "duplicate")


@dataclass(frozen=True)
class Runs:
    """The jobs of one sweep directory. Every table is keyed by the job's directory name.

    `runs` has one row per job, whatever became of it: job, state, norm, model, data, seed, batch_size, lr,
    world_size, identity, overrides, every number of `result.json`, seconds, error, directory, log, wandb.
    `history` has the columns directory, job, norm, step, epoch, time and the metrics, one row per step of a
    job. `configs` has the flattened resolved configs. `notes` says what could not be read.
    """

    directory: Path
    runs: pd.DataFrame
    history: pd.DataFrame
    configs: pd.DataFrame
    notes: list[str]


def read_runs(directory: str | Path) -> Runs:
    """Read every job below `directory`; what is broken becomes a note, never an error.

    Raises FileNotFoundError if there is no such directory and ValueError if it holds no job.
    """
    root = Path(directory)
    folders = _folders(root)
    notes: list[str] = []
    rows: list[dict[str, Any]] = []
    configs: dict[str, dict[str, Any]] = {}
    for folder in folders:
        result = _json(folder / "result.json", notes)
        config = _config(folder, result, notes)
        if config is None and not (folder / "status.json").exists():
            notes.append(f"{folder.name}: not a job (no config.yaml with a job block), left out")
            continue
        config = config and _used(config, (result or {}).get("unused") or ())
        row = _row(folder, config or {}, result, notes)
        if config is not None:
            configs[folder.name] = flatten(config, row)
        rows.append(row)
    if not rows:
        raise ValueError(_no_jobs(root, folders))
    history = read_histories([(root / row["directory"], row) for row in rows], notes)
    _mark_duplicates(rows, notes)
    runs = pd.DataFrame(rows).set_index("directory", drop=False).rename_axis(None)
    return Runs(root, runs, history, pd.DataFrame.from_dict(configs, "index", object), notes)


def flatten(config: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    """The config's leaves as `section.key`, its group choices as `group`; lists are one leaf, as JSON."""
    flat: dict[str, Any] = {}

    def visit(prefix: str, value: Any) -> None:
        if isinstance(value, dict) and value:
            for key, child in value.items():
                visit(f"{prefix}.{key}" if prefix else str(key), child)
        elif isinstance(value, (dict, list)):
            flat[prefix] = json.dumps(value, sort_keys=True, default=str)
        else:
            flat[prefix] = value

    visit("", {key: value for key, value in config.items() if key != "job"})
    choices = _mapping(_mapping(config.get("job")).get("choices"))
    flat.update({str(group): choice for group, choice in choices.items() if choice is not None})
    flat["norm"] = row["norm"]
    return flat


def _folders(root: Path) -> list[Path]:
    if not root.is_dir():
        seen = "a file" if root.exists() else "nothing"
        raise FileNotFoundError(
            f"{root}: expected the directory of a sweep, found {seen}. Give the directory that holds one "
            "sub-directory per job, as `bnlight sweep` prints it (by default outputs/<sweep>)."
        )
    return sorted(path for path in root.iterdir() if path.is_dir() and path.name[0] not in "._")


def _no_jobs(root: Path, folders: list[Path]) -> str:
    if (root / "status.json").exists():
        return f"{root} is one job; a comparison takes the sweep's directory. Try its parent: {root.parent}"
    nested = [folder for folder in folders if any(folder.glob("*/status.json"))]
    if nested:
        names = ", ".join(folder.name for folder in nested)
        return f"{root} holds whole sweeps ({names}), not jobs. Compare one of them, e.g. {nested[0]}"
    seen = f"{len(folders)} sub-directories, none of them a job" if folders else "no sub-directory"
    return (
        f"{root}: expected one sub-directory per job with config.yaml and status.json, found {seen}. "
        "Run `bnlight sweep` first, or give the directory it printed (by default outputs/<sweep>)."
    )


def _mapping(value: Any) -> dict[Any, Any]:
    return value if isinstance(value, dict) else {}


def _config(folder: Path, result: dict[str, Any] | None, notes: list[str]) -> dict[str, Any] | None:
    """The config, if it is one of a job; None for a foreign directory and for a broken file."""
    kept = (result or {}).get("config")  # the same, in a form that is read thirty times as fast
    if isinstance(kept, dict) and isinstance(kept.get("job"), dict) and (folder / "config.yaml").exists():
        return kept
    try:
        config = yaml.load((folder / "config.yaml").read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        if (folder / "status.json").exists():
            notes.append(f"{folder.name}: no config.yaml, so it is in no group")
        return None
    except (OSError, ValueError, yaml.YAMLError) as error:
        notes.append(f"{folder.name}: config.yaml cannot be read ({_first_line(error)})")
        return None
    if isinstance(config, dict) and isinstance(config.get("job"), dict):
        return config
    if (folder / "status.json").exists():
        notes.append(f"{folder.name}: config.yaml has no job block, so it is in no group")
    return None


def _json(path: Path, notes: list[str]) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it is not a JSON object")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        notes.append(f"{path.parent.name}: {path.name} cannot be read ({_first_line(error)})")
        return {}
    return content


def _status(folder: Path, notes: list[str]) -> dict[str, Any]:
    """The status, a stale `running` read as `interrupted`; empty, with a note, if there is none."""
    try:
        status = read_status(folder)
    except (OSError, ValueError) as error:
        notes.append(f"{folder.name}: status.json cannot be read ({_first_line(error)})")
        return {}
    if not status:
        notes.append(f"{folder.name}: no status.json, so its state is unknown and it is in no mean")
    return status


def _used(config: dict[str, Any], unused: Collection[str]) -> dict[str, Any]:
    """The config without the parts that the job's own module did not take: they say nothing of it."""
    job = _mapping(config.get("job"))
    choices = {group: option for group, option in _mapping(job.get("choices")).items() if group not in unused}
    if "model" in unused and "module" in choices:
        choices["model"] = choices["module"]
    kept = {key: value for key, value in config.items() if key not in unused}
    return kept | {"job": {**job, "choices": choices}} if unused else config


def _row(
    folder: Path, config: dict[str, Any], result: dict[str, Any] | None, notes: list[str]
) -> dict[str, Any]:
    job = _mapping(config.get("job"))
    choices = _mapping(job.get("choices"))
    status = _status(folder, notes)
    state = status.get("state")
    if state == "done" and result is None:
        notes.append(f"{folder.name}: done, but there is no result.json")
    result = result or {}
    overrides = job.get("overrides")
    row: dict[str, Any] = {
        "job": str(job.get("name") or folder.name),
        "state": state if state in STATES else "unknown",
        "norm": _norm(config) if config else None,
        "model": choices.get("model"),
        "data": choices.get("data"),
        "seed": config.get("seed"),
        "batch_size": _number(_mapping(config.get("data")).get("batch_size")),
        "lr": _number(_mapping(config.get("optimizer")).get("lr")),
        "world_size": _number(result.get("world_size")),
        "identity": job.get("identity"),
        "overrides": " ".join(map(str, overrides)) if isinstance(overrides, list) else "",
        "sweep": job.get("sweep"),
        "attempt": _number(status.get("attempt")),
        "heartbeat": _number(status.get("heartbeat")),
        "seconds": _number(result.get("seconds")),
        "steps": _number(result.get("steps")),
        "epochs": _number(result.get("epochs")),
        "error": _first(status.get("error")) or _last_line(status.get("traceback")),
        "git": result.get("git"),
        "versions": _pairs(result.get("versions")),
        "hardware": _pairs(result.get("hardware")),
        "directory": folder.name,
        "log": f"{folder.name}/job.log",
        "wandb": " ".join(
            sorted(f"{folder.name}/wandb/{p.name}" for p in folder.glob("wandb/offline-run-*"))
        ),
    }
    for name, value in _mapping(result.get("metrics")).items():
        row[str(name) if name not in row else f"result/{name}"] = _number(value)
    return row


def _norm(config: dict[str, Any]) -> str:
    """The norm's name: the option chosen, or the class where the option is `custom` or unknown."""
    choice = _mapping(_mapping(config.get("job")).get("choices")).get("norm")
    section = config.get("norm")
    target = section.get("_target_") if isinstance(section, dict) else section
    if choice not in (None, "custom") or not isinstance(target, str):
        return str(choice or "?")
    return target.rpartition(".")[2]


def _mark_duplicates(rows: list[dict[str, Any]], notes: list[str]) -> None:
    """A copied directory is the same run twice: counting it as another seed would shrink the interval."""
    first: dict[str, str] = {}
    for row in sorted(rows, key=lambda row: (row["job"] != row["directory"], row["directory"])):
        identity = row["identity"]
        if identity in first:
            row["state"] = "duplicate"
            notes.append(f"{row['directory']}: the same run as {first[identity]}, counted once")
        elif isinstance(identity, str):
            first[identity] = row["directory"]


def _number(value: Any) -> float:
    """A finite float, or NaN."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return math.nan
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return math.nan
    return number if math.isfinite(number) else math.nan


def _pairs(value: Any) -> str | None:
    if isinstance(value, dict):
        return ", ".join(f"{name} {item}" for name, item in value.items() if item not in (None, "", [], {}))
    return str(value) if value else None


def _first(error: Any) -> str | None:
    """The first line of an error, which names it; the rest is in the job's log."""
    return next((line.strip() for line in str(error or "").splitlines() if line.strip()), None)


def _last_line(traceback: Any) -> str | None:
    lines = [line.strip() for line in str(traceback or "").splitlines() if line.strip()]
    return lines[-1] if lines else None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
