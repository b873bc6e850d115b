"""Builds objects from plain config dicts; the only place that calls Hydra's `instantiate`."""

from __future__ import annotations

import copy
import functools
import inspect
import re
from collections.abc import Collection, Mapping
from typing import Any

from bnlight.lightning import factory

Config = Mapping[str, Any]
FRAMEWORKS = ("builtins", "torch", "pytorch_lightning", "lightning")


def instantiate(config: Config, *args: Any, **kwargs: Any) -> Any:
    """The object that `config` names in `_target_`, its nested configs built first, lists and dicts left plain.

    `args` and `kwargs` are handed to the target as they are. Within `factory.recorded()`, what `_partial_` makes knows
    whether it was used. Raises what the target raises, with a note that says which one.
    """
    from hydra import utils
    from hydra.errors import InstantiationException
    from omegaconf import OmegaConf

    parts = _literal(_watched(config) if factory.current else config)
    how = {"_convert_": "all", **({"_partial_": True} if kwargs else {})}
    plan = OmegaConf.create({**parts, **how}, flags={"allow_objects": True})
    trust = {"_execution_whitelist_": whitelist} if (whitelist := any_target()) else {}
    try:
        built = utils.instantiate(plan, *args, **trust)
    except InstantiationException as error:
        cause = error.__cause__
        if cause is None:
            raise
        cause.add_note(_note(config))
        raise cause from None
    if kwargs:
        return _called(built, config, kwargs)
    return factory.watched(built, config["_target_"]) if config.get("_partial_") else built


def _watched(config: Config) -> dict[str, Any]:
    """The config with its nested factories built, so that the record has them."""
    if config.get("_recursive_") is False:
        return dict(config)
    return {key: _part(value) for key, value in config.items()}


def _part(value: Any) -> Any:
    if isinstance(value, Mapping):
        return instantiate(value) if value.get("_partial_") and "_target_" in value else _watched(value)
    return [_part(item) for item in value] if isinstance(value, list) else value


def _literal(value: Any) -> Any:
    """A resolved config that Hydra resolves to itself: what is left in it that looks like an interpolation is text."""
    if isinstance(value, Mapping):
        return {key: _literal(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_literal(item) for item in value]
    if isinstance(value, str) and "${" in value:
        return functools.reduce(lambda text, _: literal(text), range(_resolutions()), value)
    return value


@functools.cache
def _resolutions() -> int:
    """How many times Hydra resolves what it instantiates: a value and then the result, once since Hydra 1.4."""
    from hydra import utils
    from omegaconf.errors import InterpolationResolutionError

    trust = {"_execution_whitelist_": whitelist} if (whitelist := any_target()) else {}
    try:
        utils.instantiate(
            {"_target_": "builtins.dict", "text": literal("${text}"), "_convert_": "all"}, **trust
        )
    except InterpolationResolutionError:
        return 2
    return 1


def literal(text: str) -> str:
    """The text with its `${` escaped as OmegaConf wants it."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def call(config: Config) -> Any:
    """What the target of `config` makes of its arguments as they are: nested configs stay configs."""
    from hydra.utils import get_object

    given = {key: value for key, value in config.items() if not key.startswith("_")}
    return _called(get_object(config["_target_"]), config, copy.deepcopy(given))


def _called(target: Any, config: Config, kwargs: dict[str, Any]) -> Any:
    try:
        return target(**kwargs)
    except Exception as error:
        error.add_note(_note(config))
        raise


def _note(config: Config) -> str:
    return f"(while building {config['_target_']} from the config)"


def any_target() -> Any:
    """What tells Hydra 1.4 that a config may name any target, as it is the user's own program; None before."""
    from hydra import utils

    return getattr(utils, "UNSAFE_DISABLE_EXECUTION_CHECKS", None)


def arguments(config: Config) -> dict[str, inspect.Parameter]:
    """The parameters of the class or function that `config` names in `_target_`.

    A class that hands its `**kwargs` on takes what its base classes take. What is left of `**kwargs` then stays
    in the result: the class reads them itself.
    """
    from hydra.utils import get_object

    target = get_object(config["_target_"])
    taken = dict(inspect.signature(target).parameters)
    if not inspect.isclass(target) or not _open(taken) or _of_a_framework(target):
        return taken
    taken = {}
    for base in target.__mro__:
        if "__init__" not in vars(base) or _of_a_framework(base):
            continue
        handed_on = {name: p for name, p in taken.items() if p.kind is not p.VAR_KEYWORD}
        own = list(inspect.signature(vars(base)["__init__"]).parameters.items())[1:]
        taken = {name: p for name, p in own if p.kind is not p.VAR_POSITIONAL} | handed_on
        if not _open(taken):
            break
    return taken


def complete(config: Config, *, named_only: bool = False, **available: Any) -> dict[str, Any]:
    """`config` plus those of `available` that its target takes and `config` does not set itself.

    A target that reads `**kwargs` itself is given all of them, with `named_only` none but those it names.
    """
    taken = arguments(config)
    anything = _open(taken) and not named_only
    return dict(config) | {
        name: value
        for name, value in available.items()
        if config.get(name) is None and (anything or name in taken)
    }


def explicit(config: Config, typed: Collection[str] = ()) -> dict[str, Any]:
    """`config` without the arguments that say what its target's own default is, but with those in `typed`.

    conf/norm/*.yaml list every argument, so only a value that differs, or was typed, was somebody's choice.
    """
    taken = arguments(config)
    return {
        key: value
        for key, value in config.items()
        if key.startswith("_") or key in typed or key not in taken or value != taken[key].default
    }


def model_config(
    model: Config,
    norm: Config,
    weight: Config,
    shapes: Mapping[str, Any],
    replace_norm: Config | None = None,
) -> dict[str, Any]:
    """The model's config with the norm and the data's `shapes` in it: all that is needed to build it again.

    With `replace_norm` the model is built with its own norms, which `bnlight.lightning.replace.with_norm` then
    replaces. Where `weight` names a function, the config is a call of it with the model, which it changes.

    Raises ValueError if the model's class takes no `norm`, as a sweep over norms would change nothing, or needs
    one although its norms are to be replaced.
    """
    if replace_norm is None:
        completed = complete(model, norm=dict(norm), **shapes)
        if "norm" not in completed:
            raise ValueError(takes_no_norm(model, norm))
    else:
        refuse_needed_norm(model)
        built = complete(model, **shapes)
        completed = {"_target_": "bnlight.lightning.replace.with_norm", "model": built, **replace_norm}
    if weight.get("_target_"):
        return {**weight, "model": completed}
    return completed


def takes_no_norm(config: Config, norm: Config) -> str:
    """What to say of a class that the chosen norm would not reach."""
    return (
        f"{config['_target_']} takes no argument `norm`, so the chosen norm ({norm['_target_']}) would have no "
        f"effect. Its arguments are {', '.join(arguments(config)) or 'none'}. Two ways out: replace_norm=true "
        "replaces the norms that it builds itself; or add `norm` to its arguments, a factory that it calls as "
        "norm(channels) wherever it normalizes."
    )


def refuse_needed_norm(config: Config) -> None:
    """Raise ValueError for a class that cannot be built without being told its norm."""
    norm = arguments(config).get("norm")
    if norm is not None and norm.default is norm.empty:
        raise ValueError(
            f"replace_norm is for classes that choose their own norms, but {config['_target_']} needs `norm` as "
            "an argument and so has the chosen one already: leave replace_norm out"
        )


def _open(parameters: Mapping[str, inspect.Parameter]) -> bool:
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())


def _of_a_framework(kind: type) -> bool:
    return kind.__module__.split(".")[0] in FRAMEWORKS  # whose own **kwargs take nothing
