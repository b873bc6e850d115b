"""Read the directory of one job: what was set, how it ended, what came out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from bnlight.compare.read.run import Run, mapping, row_of, used, why
from bnlight.run.status import read_status
from bnlight.run.unused import likely

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml is ten times faster


def read_job(folder: Path, place: tuple[str, ...], source: str) -> Run:
    """The job in `folder`; what is broken or missing becomes one of its notes."""
    notes: list[str] = []
    result = _json(folder / "result.json", notes)
    config = _config(folder, result, notes)
    config = config and used(config, _unused(config, result or {}))
    status = _status(folder, notes)
    if status.get("state") == "done" and result is None:
        notes.append("done, but there is no result.json")
    row = row_of(folder.name, config or {}, status, result or {})
    return Run(folder.name, place, source, row, config, folder, status.get("wandb_id"), notes=notes)


def _unused(config: dict[str, Any], result: dict[str, Any]) -> list[str]:
    """The groups that its module does without: as the job says, or, of one that has said nothing, most likely."""
    said = mapping(config.get("job")).get("unused", result.get("unused"))
    if said is not None:
        return list(said)
    overrides = mapping(config.get("job")).get("overrides") or ()
    return likely(mapping(config.get("module")).get("_target_"), map(str, overrides))


def _config(folder: Path, result: dict[str, Any] | None, notes: list[str]) -> dict[str, Any] | None:
    """The config, if it is one of a job; None, with a note, for a broken file."""
    kept = (result or {}).get("config")  # the same, in a form that is read thirty times as fast
    if isinstance(kept, dict) and isinstance(kept.get("job"), dict) and (folder / "config.yaml").exists():
        return kept
    try:
        config = yaml.load((folder / "config.yaml").read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        notes.append("no config.yaml, so it is in no group")
        return None
    except (OSError, ValueError, yaml.YAMLError) as error:
        notes.append(f"config.yaml cannot be read ({why(error)})")
        return None
    if isinstance(config, dict) and isinstance(config.get("job"), dict):
        return config
    notes.append("config.yaml has no job block, so it is in no group")
    return None


def _json(path: Path, notes: list[str]) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it is not a JSON object")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        notes.append(f"{path.name} cannot be read ({why(error)})")
        return {}
    return content


def _status(folder: Path, notes: list[str]) -> dict[str, Any]:
    """The status, a stale `running` read as `interrupted`; empty, with a note, if there is none."""
    try:
        status = read_status(folder)
    except (OSError, ValueError) as error:
        notes.append(f"status.json cannot be read ({why(error)})")
        return {}
    if not status:
        notes.append("no status.json, so its state is unknown and it is in no mean")
    return status
