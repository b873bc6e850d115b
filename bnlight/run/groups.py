"""The config groups of a job: the option that `null` stands for, and what a group's part of the config must be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override
from hydra.errors import HydraException
from omegaconf import DictConfig

# The option that does nothing, in each group that has one; what is left has to be chosen.
NOTHING = {
    "norm": "none",
    "weight": "none",
    "sync": "none",
    "scheduler": "none",
    "callbacks": "none",
    "logger": "csv",
}
GROUPS = (*NOTHING, "model", "module", "data", "optimizer", "trainer")


def as_option(text: str) -> str:
    """An override as Hydra takes it: `scheduler=null` is `scheduler=none`, and `norm=1` the option called 1.

    Options are files, so that is what a value is the name of; Hydra's error for one that is not there lists them.
    """
    try:
        (override,) = OverridesParser.create().parse_overrides([text])
    except HydraException:
        return text  # it will be refused with Hydra's own words
    if override.get_key_element() not in GROUPS:
        return text
    value = override.value()
    values = value.list if isinstance(value, ChoiceSweep) else [None if value == [] else value]
    if not any(one is None or isinstance(one, int | float) for one in values):
        return text
    return f"{override.key_or_group}={','.join(_named(override.key_or_group, one) for one in values)}"


def nothing(group: str) -> dict[str, Any]:
    """The config of the option that `null` stands for."""
    return _option(group, NOTHING[group])


def options(group: str) -> list[str]:
    """The names of a group's options, of those that bnlight has; none if it has no such group."""
    import bnlight.conf

    return sorted(file.stem for file in Path(bnlight.conf.__path__[0], group).glob("*.yaml"))


def option_keys(group: str, option: str) -> set[str]:
    """The keys that an option of bnlight's has."""
    return {str(key) for key in _option(group, option)}


def without_null(config: dict[Any, Any]) -> None:
    """Put the option that it stands for where a group of a resolved config is null."""
    for group in NOTHING:
        if group in config and config[group] is None:
            config[group] = nothing(group)


def wrong_group(config: DictConfig) -> str | None:
    """What is wrong with a part of the config that nothing can be built from; None if all is well."""
    for group in GROUPS:
        part = config.get(group)
        if part is None and group in NOTHING:
            continue
        if group == "callbacks" and isinstance(part, DictConfig):
            for name, callback in part.items():
                if callback is not None and not _builds(callback):
                    return (
                        f"callbacks.{name!s}={callback}: expected what builds a callback, such as "
                        f"+callbacks.{name!s}._target_=my_package.MyCallback, or null"
                    )
        elif not _builds(part, or_nothing=group in NOTHING and group != "norm"):
            seen = f"{group} is {part}" if not isinstance(part, DictConfig) else f"{group} names no _target_"
            return f"{seen}: expected one of its options ({', '.join(options(group))}), or a block with a _target_"
    return None


def _builds(part: Any, or_nothing: bool = False) -> bool:
    if not isinstance(part, DictConfig) or "_target_" not in part:
        return False
    target = part._get_node("_target_")
    return or_nothing or not (target is None or target._is_none())


def _named(group: str, value: Any) -> str:
    if value is None:
        return NOTHING.get(group, "'null'")
    if isinstance(value, int | float):
        return f"'{str(value).lower()}'"
    return Override._get_value_element_as_str(value)


def _option(group: str, option: str) -> dict[str, Any]:
    import bnlight.conf

    file = Path(bnlight.conf.__path__[0], group, f"{option}.yaml")
    return dict(yaml.safe_load(file.read_text(encoding="utf-8")))
