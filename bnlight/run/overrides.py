"""Changes to a finished job's config, `key=value` as on Hydra's command line: where it is tested, not what it is."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bnlight.data.shift import Shift
from bnlight.lightning.build import arguments
from bnlight.run import identity, searchpath
from bnlight.run.application import Primary
from bnlight.run.check import list_choices
from bnlight.run.job import CommandError

CHANGEABLE = ("data", "trainer", "threads")


def overridden(config: Mapping[str, Any], texts: Sequence[str]) -> dict[str, Any]:
    """The config with `data=fashion_mnist`, `data.shift.noise=0.2`, `trainer.accelerator=cpu` and the like applied.

    Raises CommandError for what cannot be parsed, for keys that do not exist, with those that do, and for parts
    of the config that the checkpoint decides.
    """
    identity.register()
    changed = copy.deepcopy(dict(config))
    parsed = [_parsed(text) for text in texts]
    chosen = [override for override in parsed if override.key_or_group == "data"]
    if chosen:
        mine = [override for override in parsed if _top(override) == "data"]
        changed["data"] = _other_data(changed["paths"], [str(override.input_line) for override in mine])
        parsed = [override for override in parsed if _top(override) != "data"]
    for override in parsed:
        _set(changed, override)
    return changed


def _parsed(text: str) -> Override:
    try:
        (override,) = OverridesParser.create().parse_overrides([text])
    except HydraException as error:
        raise CommandError(f"'{text}' is no key=value: {error}") from error
    if override.is_sweep_override() or override.is_delete():
        raise CommandError(f"'{text}': one value for a key, please")
    if _top(override) not in CHANGEABLE:
        raise CommandError(
            f"'{text}' would change what was trained; a test can change {', '.join(CHANGEABLE)}, such as "
            "data=fashion_mnist, data.shift.noise=0.2 or trainer.accelerator=cpu"
        )
    return override


def _top(override: Override) -> str:
    return str(override.key_or_group).partition(".")[0]


def _other_data(paths: Mapping[str, Any], texts: list[str]) -> dict[str, Any]:
    identity.register()
    searchpath.register()
    try:
        config = Primary("train", None).compose(texts)
        OmegaConf.update(config, "paths", paths)
        data: Any = OmegaConf.to_container(config.data, resolve=True, throw_on_missing=False)
    except (HydraException, OmegaConfBaseException) as error:
        raise CommandError(f"{' '.join(texts)}: {error}") from error
    if data["_target_"] == "???":
        raise CommandError("data._target_ has no value: give one on the command line, data._target_=...")
    return dict(data)


def _set(config: dict[str, Any], override: Override) -> None:
    *parents, last = str(override.key_or_group).split(".")
    place: Any = config
    for depth, name in enumerate(parents):
        if name == "shift" and depth == 1 and "shift" in _known(place, ""):
            place[name] = dict(place.get(name) or {})
        if not isinstance(place.get(name), dict):
            raise CommandError(_unknown(override, name, ".".join(parents[:depth]), _known(place, "")))
        place = place[name]
    known = _known(place, parents[-1] if parents else "")
    if parents and last not in known:
        raise CommandError(_unknown(override, last, ".".join(parents), known))
    place[last] = _resolved(override, config)


def _resolved(override: Override, config: Mapping[str, Any]) -> Any:
    """The value with its interpolations, such as `${bnlight.eval:...}`, resolved among those of the config."""
    if "${" not in str(override.input_line):
        return override.value()
    try:
        value = OmegaConf.create({**config, "": override.value()})[""]
        return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    except OmegaConfBaseException as error:
        raise CommandError(f"{override.input_line}: {error}") from error


def _known(place: Mapping[str, Any], name: str) -> set[str]:
    known = {str(key) for key in place}
    if place.get("_target_"):
        known |= arguments(place).keys()
    return known | ({field.name for field in fields(Shift)} if name == "shift" else set())


def _unknown(override: Override, name: str, where: str, known: set[str]) -> str:
    return (
        f"'{override.input_line}': there is no key '{name}'{f' in {where!r}' if where else ''}.\n"
        + list_choices(name, {key for key in known if not key.startswith("_")})
    )
