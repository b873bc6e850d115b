"""What Hydra says of a config that cannot be composed, with the choices that there are and the job that it is about."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException, HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bnlight.run.check import list_choices
from bnlight.run.groups import GROUPS, option_keys, options
from bnlight.run.launch.listed import each_job
from bnlight.run.launch.search import installed

if TYPE_CHECKING:
    from bnlight.run.application import Primary


def explain(error: Exception, texts: Sequence[str], primary: Primary) -> str:
    """Hydra's error, or for a key that does not exist the keys that do, and the options that have it."""
    if "hydra/sweeper/optuna" in str(error) and not installed():
        return "a search needs Hydra's Optuna sweeper: pip install 'bnlight[optuna]'"
    text = "\n".join(str(part) for part in (error, error.__cause__) if part is not None and str(part))
    missing = re.search(r"Missing mandatory value.*?full_key: (\S+)", text, re.DOTALL)
    if missing:
        return f"{missing.group(1)} has no value: give one on the command line, {missing.group(1)}=..."
    unknown = re.search(r"Could not find '(\w+)/", text)
    if unknown and unknown.group(1) not in (*GROUPS, "hydra"):
        text += f"\nThe folder that holds your {unknown.group(1)}/ is named by --config-dir=FOLDER"
    if "Cannot merge DictConfig with ListConfig" in text:
        text += "\nA group, callbacks too, is a block of names and values, not a list"
    if "Error parsing override" in text and "${" in text:
        text += "\nA value with ${...} in it is put into quotes of its own: 'optimizer.lr=\"${...}\"'"
    key = re.search(r"Key '([^']*)' is not in struct.*?full_key: (\S+)", text, re.DOTALL)
    if not isinstance(error, ConfigCompositionException) or key is None:
        return text
    *parents, last = key.group(2).split(".")
    place = ".".join(parents)
    try:
        jobs = _jobs(texts, primary)
        found = [_place(tuple(_choices(job, key.group(2))), key.group(2), primary) for job in jobs]
    except (HydraException, OmegaConfBaseException):
        return text
    wrong = next((number for number, one in enumerate(found) if last not in one.known), None)
    if wrong is None:
        return text
    there = sorted({one.option for one in found if last in one.known and one.option})
    if there and (option := found[wrong].option):
        group = parents[0]
        others = " and ".join(f"{group}={name}" for name in there)
        return (
            f"Job {wrong + 1} of {len(jobs)} ({' '.join(jobs[wrong])}): there is no key '{last}' in {group}={option}; "
            f"{others} has it. A grid gives each key to every job. List the jobs instead:\n  hydra/sweeper=list "
            f'\'hydra.sweeper.jobs=["{group}={there[0]} {_given(texts, key.group(2))}","{group}={option}"]\''
        )
    where = f" in '{place}'" if parents else ""
    have = (
        [name for name in options(parents[0]) if last in option_keys(parents[0], name)]
        if len(parents) == 1
        else []
    )
    if have:
        where += f", but in {', '.join(f'{place}={name}' for name in have)}"
    return f"There is no key '{last}'{where}.\n{list_choices(last, set(found[wrong].known))}"


class _Place(NamedTuple):
    """The keys where one was looked for, and the option of the config group that they are in."""

    known: frozenset[str]
    option: str | None


@functools.cache
def _place(chosen: tuple[str, ...], path: str, primary: Primary) -> _Place:
    config = primary.compose(list(chosen), return_hydra_config=True)
    *parents, _ = path.split(".")
    option = config.hydra.runtime.choices.get(parents[0]) if parents else None
    part = OmegaConf.select(config, ".".join(parents)) if parents else config
    known = {str(key) for key in part} if isinstance(part, DictConfig) else set()
    return _Place(frozenset(known if parents else known - {"hydra"}), option)


def _choices(job: Sequence[str], path: str) -> list[str]:
    """Those of a job's overrides that choose options of groups, or may; not what set the path."""
    keys = {text: text.partition("=")[0] for text in job}
    return [text for text, key in keys.items() if "." not in key and key != path and key[:5] != "hydra"]


def _jobs(texts: Sequence[str], primary: Primary) -> list[list[str]]:
    """The overrides of each job that the command has, one where it is no sweep."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    hydras = [text for text in texts if text.startswith(("hydra.", "hydra/"))]
    sweeper = primary.compose(hydras, return_hydra_config=True).hydra.sweeper
    given = [*(f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()), *texts]
    parsed = OverridesParser.create().parse_overrides(given)
    last = list({override.get_key_element(): override for override in parsed}.values())
    if sweeper.get("jobs"):
        return each_job(sweeper.jobs, last)
    (jobs,) = BasicSweeper.split_arguments(last, None)
    return [list(job) for job in jobs]


def _given(texts: Sequence[str], path: str) -> str:
    return next((text for text in texts if text.startswith(f"{path}=")), f"{path}=...")
