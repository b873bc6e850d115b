"""Decide which config keys tell the jobs of a sweep apart, and what part each one plays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

# As in a job's identity: they say where and who, not what.
_IGNORED = ("job", "hydra", "paths", "logger", "progress", "rerun")
_DISPLAY = {"trainer.enable_progress_bar", "trainer.enable_model_summary", "trainer.default_root_dir"}
NULL = "null"  # the value of a setting that is null, which is not one that is absent
_CONTENDERS = ("norm", "weight", "sync")
_TUNED = ("optimizer", "scheduler", "norm")


@dataclass(frozen=True)
class Axes:
    """The keys that vary, seeds aside.

    `contenders` are what is compared (the norm; weight and sync if they vary; every key where none of them
    does). `tuned` keys are settings each contender may choose for itself (learning rate, the norm's options).
    `conditions` are the circumstances (batch size, model, devices): contenders meet within one condition.
    `averaged` keys vary too, but were left out of what was asked for: means go over them. `asked` is `by` and `tune`.
    `values` has one row per job with a readable config and one column per key.
    """

    contenders: list[str]
    tuned: list[str]
    conditions: list[str]
    values: pd.DataFrame
    labels: dict[str, str] = field(default_factory=dict)
    searched: bool = False
    averaged: list[str] = field(default_factory=list)
    asked: tuple[Sequence[str] | None, Sequence[str] | None] = (None, None)

    @property
    def keys(self) -> list[str]:
        return [*self.conditions, *self.contenders, *self.tuned]

    def label(self, key: str) -> str:
        return self.labels.get(key, key)

    def contender(self, settings: dict[str, Any]) -> str:
        """The name of a contender: `renorm`, `batch + sync=world`, or `lr=0.1, momentum=0.9`."""
        if "norm" not in self.contenders:
            return ", ".join(f"{self.label(key)}={shown(settings[key])}" for key in self.contenders)
        extra = [(self.label(key), shown(settings[key])) for key in self.contenders if key != "norm"]
        return " + ".join(
            [shown(settings["norm"]), *(f"{k}={v}" for k, v in extra if v not in ("none", NULL, "-"))]
        )

    def condition(self, settings: dict[str, Any]) -> str:
        """The circumstances in words: `batch size = 32, devices = 2`; empty where there is only one."""
        return ", ".join(f"{self.label(key)} = {shown(settings[key])}" for key in self.conditions)


def varying_keys(runs: pd.DataFrame, configs: pd.DataFrame) -> list[str]:
    """Compare the resolved configs of all jobs, key by key.

    A key is shown if it varies and was typed in the sweep (it is among the overrides), or if the keys found
    before it do not determine it; so what follows from the choice of norm (`norm.r_max`) stays out. Keys that
    follow the seed alone are repetitions, not settings. A group that is no part of the config (`experiment`) stands
    for what it sets: where that is another norm, weight or sync, it is no key itself.
    """
    runs = runs.loc[configs.index]
    typed = _typed(runs["overrides"])
    names = [str(key) for key in configs]
    choices = {key for key in names if "." not in key}
    varying = [key for key in names if _is_setting(key, configs[key], runs["job"])]
    if any(key in varying for key in _CONTENDERS):
        bundles = {key for key in choices if _is_bundle(key, names, runs["overrides"])}
        varying = [key for key in varying if key not in bundles]
    seeds = _codes(runs["seed"])
    repeated = len(set(seeds)) < len(seeds)
    groups = np.zeros(len(configs), dtype=np.int64)
    keys: list[str] = []
    for key in sorted(varying, key=lambda key: _rank(key, typed, choices)):
        codes = _codes(configs[key])
        follows_seed = key not in typed and repeated and _count(seeds, codes) == len(set(seeds))
        if key in typed or (not follows_seed and _count(groups, codes) > len(set(groups))):
            keys.append(key)
            groups = _codes(pd.Series(list(zip(groups, codes, strict=True))))
    return keys


def assign(
    keys: Sequence[str],
    configs: pd.DataFrame,
    searched: bool = False,
    by: Sequence[str] | None = None,
    tune: Sequence[str] | None = None,
) -> Axes:
    """Give each key its part; `by` and `tune` are full keys.

    `by` names the contenders and conditions: what varies beside them and is not tuned is averaged over. The norm,
    weight and sync are contenders, any other key is a condition, an option such as `norm.momentum` too; where `by`
    names no contender they stay what is compared, and where they do not vary, their options in `by` are, or all of
    `by`. `tune` names the tuned keys instead of
    the default: what `optimizer`, `scheduler` and `norm` hold, or, in a search (`searched`), every key that
    is no contender. A key cannot be both (ValueError).
    """
    both = [key for key in by or () if key in (tune or ())]
    if both:
        raise ValueError(
            f"{', '.join(both)}: asked for in both by and tune; a tuned setting is chosen, not grouped by"
        )
    every = [*keys, *(key for key in [*(by or ()), *(tune or ())] if key not in keys)]
    natural = [key for key in _CONTENDERS if key in every]
    if tune is not None:
        tuned = [key for key in every if key in tune]
    elif natural or by is not None:
        free = [key for key in every if key not in natural and key not in (by or ())]
        tuned = [key for key in free if searched or key.split(".")[0] in _TUNED]
    else:
        tuned = []
    asked = list(by) if by is not None else [key for key in every if key not in tuned]
    options = [key for key in asked if key.split(".")[0] in _CONTENDERS]
    contenders = options
    if by is not None:
        contenders = [key for key in asked if key in _CONTENDERS]
        contenders = contenders or [key for key in natural if key not in tuned] or options
    contenders = contenders or asked or ["norm"]
    conditions = [key for key in asked if key not in contenders]
    used = [*conditions, *contenders, *tuned]
    averaged = [key for key in keys if key not in used]
    values = configs.reindex(columns=used)
    labels = _labels([*used, *averaged])
    return Axes(contenders, tuned, conditions, values, labels, searched, averaged, (by, tune))


def shown(value: Any) -> str:
    """A setting in six digits: `0.1`, `32` (also for 32.0), `null`, and `-` for a key this job does not have."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


def sortable(value: Any) -> tuple[int, float, str]:
    """A sort key for settings: numbers by size, then words, then null and missing ones."""
    text = shown(value)
    try:
        return (0, float(text), "")
    except ValueError:
        return (2, 0.0, text) if text in ("-", NULL) else (1, 0.0, text)


def _typed(overrides: pd.Series) -> set[str]:
    words = {word for text in overrides.unique() for word in str(text).split() if "=" in word}
    keys = {word.split("=")[0].lstrip("+~").split("@")[0] for word in words}
    return {key for key in keys if not key.endswith("_target_")}


def describes(key: str) -> bool:
    """Whether a config key says what a job computes, not where, by whom, how it is shown or with which seed."""
    return not (key.replace("/", ".").split(".")[0] in _IGNORED or key in _DISPLAY or key.endswith("seed"))


def _is_setting(key: str, values: pd.Series, jobs: pd.Series) -> bool:
    if not describes(key):
        return False
    if (
        values.replace(NULL, np.nan).nunique(dropna=False) < 2
    ):  # another version may have left out what is null
        return False
    return not any(isinstance(v, str) and job in v for v, job in zip(values, jobs, strict=True))


def _is_bundle(key: str, names: Sequence[str], overrides: pd.Series) -> bool:
    """Whether a key is a group that was chosen with `+`, as it is no part of the config but sets parts of it."""
    added = any(word.startswith(f"+{key}=") for text in overrides.unique() for word in str(text).split())
    return added and not any(name.startswith(f"{key}.") for name in names)


def follows(key: str, axes: Axes, configs: pd.DataFrame) -> bool:
    """Whether a key that is none of the axes changes with the contender, and with it alone."""
    contenders = configs[axes.contenders]
    groups = _codes(pd.Series(list(contenders.itertuples(index=False, name=None)), index=configs.index))
    codes = _codes(configs[key])
    return _count(groups, codes) == len(set(groups.tolist())) and len(set(codes.tolist())) > 1


def _rank(key: str, typed: set[str], choices: set[str]) -> tuple[int, int]:
    contender = _CONTENDERS.index(key) if key in _CONTENDERS else len(_CONTENDERS)
    return contender, 0 if key in choices else 1 if key in typed else 2


def _codes(values: pd.Series) -> np.ndarray:
    return pd.factorize(values, use_na_sentinel=False)[0]


def _count(groups: np.ndarray, codes: np.ndarray) -> int:
    return len(set(zip(groups.tolist(), codes.tolist(), strict=True)))


def _labels(keys: list[str]) -> dict[str, str]:
    """The shortest tail of each key that no other key has: `data.batch_size` is `batch size`."""
    labels = {}
    for key in keys:
        parts = key.split(".")
        tails = [".".join(parts[-length:]) for length in range(1, len(parts) + 1)]
        alone = (t for t in tails if not any(k != key and (k == t or k.endswith("." + t)) for k in keys))
        labels[key] = next(alone, key).replace("_", " ")
    return labels
