"""A job's identity and name, from its resolved config: never from job numbers or the clock."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, MissingMandatoryValue, OmegaConf, read_write
from omegaconf.errors import InterpolationToMissingValueError

from bnlight.run import arithmetic
from bnlight.run.groups import NOTHING, without_null
from bnlight.run.unused import is_own, likely
from bnlight.run.weights import fingerprint

# Where things are and what is shown: two jobs that differ only here are the same job.
LIMITS = ("checkpoint_every", "time_limit", "stall_limit", "fail_fast", "dry_run")
NOT_IDENTITY = (
    "hydra",
    "paths",
    "logger",
    "progress",
    "rerun",
    "job",
    "share_devices",
    "keep_checkpoints",
    *LIMITS,
)
# Options that came later, as they are when they are off.
OFF: dict[str, Any] = {
    "sync": {"_target_": None},
    "init_from": None,
    "replace_norm": False,
    "monitor": {"metric": "val/accuracy", "mode": "max"},
}
NO_SHIFT = {"noise": 0, "contrast": 1, "brightness": 0, "blur": 0, "rotate": 0, "invert": False}


def identity(config: DictConfig, complete: bool = True) -> str:
    """The sha256 of the sorted JSON of the resolved config without paths, logger and display options.

    Values may be missing (`???`) if `complete` is False: what a search has yet to choose.
    """
    with _constant_roots(config):
        keys = [key for key in config if key not in NOT_IDENTITY and str(key) in known_keys()]
        kept = {str(key): _plain(config, key, complete) for key in keys}
    without_null(kept)
    _leave_out_what_is_off(kept)
    if kept.get("init_from"):
        kept["init_from"] = fingerprint(kept["init_from"])  # the weights, wherever they lie
    return hashlib.sha256(json.dumps(_in_order(kept)).encode()).hexdigest()


@functools.cache
def known_keys() -> frozenset[str]:
    """The top-level keys of a job's config; another one only matters by the interpolations that use it."""
    import bnlight.conf

    train = yaml.safe_load(Path(bnlight.conf.__path__[0], "train.yaml").read_text(encoding="utf-8"))
    groups = [key for default in train.pop("defaults") if isinstance(default, dict) for key in default]
    return frozenset(key for key in (*train, *groups) if "hydra" not in key)


def _in_order(value: Any) -> Any:
    """Dicts sorted by their keys, which may be of several kinds: those of each kind together, marked with it."""
    if isinstance(value, list):
        return [_in_order(item) for item in value]
    if not isinstance(value, dict):
        return value
    try:
        return {key: _in_order(value[key]) for key in sorted(value)}
    except TypeError:
        marked = {f"{type(key).__name__} {key}": item for key, item in value.items()}
        return _in_order(marked)


@contextlib.contextmanager
def _constant_roots(config: DictConfig) -> Iterator[None]:
    """Each of `config.paths` is its own name for the block; a copy of a config costs more than all else here."""
    paths = config.get("paths")
    if not paths:
        yield
        return
    before = OmegaConf.to_container(paths, resolve=False)
    assert isinstance(before, dict)
    with read_write(paths):
        try:
            paths.update({root: f"<{root!s}>" for root in before})
            yield
        finally:
            paths.update(before)


def _plain(config: DictConfig, key: Any, complete: bool) -> Any:
    """The resolved value of a key, without OmegaConf's classes."""
    if OmegaConf.is_missing(config, key):
        if complete:
            raise MissingMandatoryValue(f"Missing mandatory value: {key}\n    full_key: {key}")
        return "???"
    value = config[key]
    if not OmegaConf.is_config(value):
        return value
    try:
        return OmegaConf.to_container(value, resolve=True, throw_on_missing=complete)
    except InterpolationToMissingValueError:
        if complete:
            raise
        return OmegaConf.to_container(
            value, resolve=False
        )  # what follows from a value that is yet to be chosen


def _leave_out_what_is_off(config: dict[str, Any]) -> None:
    """A job that does not use an option is the job that it was before there was that option."""
    for key, off in OFF.items():
        if config.get(key) == off:
            config.pop(key, None)
    data = config.get("data")
    if isinstance(data, dict) and isinstance(data.get("shift"), dict):
        on = {key: value for key, value in data["shift"].items() if value != NO_SHIFT.get(key)}
        if not on.keys() - {"seed"}:
            config["data"] = {key: value for key, value in data.items() if key != "shift"}


def typed(hydra: DictConfig) -> list[str]:
    """The job's overrides as they were given; read as a config, a `${...}` in them would be resolved."""
    overrides = OmegaConf.to_container(hydra.overrides.task, resolve=False)
    assert isinstance(overrides, list)
    return [str(text) for text in overrides]


def choices(config: DictConfig, hydra: DictConfig) -> dict[str, str]:
    """The option chosen in each config group; a custom option is called after its class."""
    chosen = {}
    options = dict(hydra.runtime.choices.items())
    if options.get("callbacks") is None and config.get("callbacks") is not None:  # Hydra forgets a list
        options["callbacks"] = _callbacks(config, typed(hydra))
    for group, option in options.items():
        if group in NOTHING and config.get(group) is None:
            option = NOTHING[group]
        if "/" in group or option is None:
            continue
        target = OmegaConf.select(config, f"{group}._target_")
        chosen[group] = target.rsplit(".", 1)[-1] if option == "custom" and target else option
    return chosen


def _callbacks(config: DictConfig, given: list[str]) -> str:
    """What a list of options is called: its names as they were typed, else those of the callbacks that it gives."""
    lists = [found[1] for text in given if (found := re.fullmatch(r"\+*callbacks=\[(.*)\]", text))]
    names = lists[-1].split(",") if lists else [str(name) for name in config.get("callbacks") or ()]
    return "+".join(name.strip(" '\"") for name in names) or NOTHING["callbacks"]


def job_name(config: DictConfig, hydra: DictConfig) -> str:
    """Norm, model, data, seed and the identity's first eight digits, such as `renorm-cnn-digits-s1-3fa9c2d1`.

    A module of one's own stands in the model's place, which it may not use, unless a model was chosen as well.
    """
    chosen = choices(config, hydra)
    groups = ["norm", "model", "data"]
    target = OmegaConf.select(config, "module._target_")
    if is_own(target):
        idle = likely(target, typed(hydra))
        groups[1:2] = ["module"] if "model" in idle else ["module", "model"]
    parts = [chosen[group] for group in groups if group in chosen]
    if config.get("seed") is not None:
        parts.append(f"s{config.seed}")
    name = "-".join([*parts, identity(config)[:8]])
    return re.sub(r"[^\w.-]", "_", name)


def _job_name_of_root(_root_: Any) -> str:
    return job_name(_root_, _root_.hydra)


def register() -> None:
    """Make `${bnlight.job:}` (the job's name) and `${bnlight.eval:2 * 3}` known to OmegaConf."""
    arithmetic.add_resolver("bnlight.job", _job_name_of_root)
    arithmetic.register()
