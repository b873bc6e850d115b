"""Config groups that a LightningModule of one's own does without: chosen by default, and built by nothing."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

CHOICES = ("model", "optimizer", "scheduler")  # groups that a module of one's own may do without
OURS = "bnlight."  # begins the targets that take all of them


def typed_keys(overrides: Iterable[str]) -> dict[str, str]:
    """The keys that a command or a sweep has set, such as `optimizer.lr`, and the words for each."""
    return {text.lstrip("+~").split("=")[0].split("@")[0].replace("/", "."): text for text in overrides}


def is_own(target: Any) -> bool:
    """Whether a module's target is the user's."""
    return isinstance(target, str) and not target.startswith(OURS)


def likely(target: Any, overrides: Iterable[str]) -> list[str]:
    """What a module most likely does without, as long as its class has not been looked at: what nobody has chosen."""
    if not is_own(target):
        return []
    typed = {key.split(".")[0] for key in typed_keys(overrides)}
    return [group for group in CHOICES if group not in typed]


def divided(choices: Mapping[str, str], without: Collection[str]) -> tuple[dict[str, str], dict[str, str]]:
    """The choices that say what a job is, and those that say nothing of it. A module takes its model's place."""
    unused = {group: choices[group] for group in without if group in choices}
    used = {group: option for group, option in choices.items() if group not in without}
    if "model" in unused and "module" in used:
        used["model"] = used["module"]
    return used, unused


def filed(job: Mapping[str, Any], without: Collection[str]) -> dict[str, Any]:
    """The `job` block of a config: `choices` without those that its module does without, which are in `unused`."""
    choices, unused = divided({**job["choices"], **(job.get("unused") or {})}, without)
    return {**job, "choices": choices, "unused": unused}
