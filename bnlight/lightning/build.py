"""Builds objects from plain config dicts; the only place that calls Hydra's `instantiate`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

Config = Mapping[str, Any]


def instantiate(config: Config, *args: Any, **kwargs: Any) -> Any:
    """The object that `config` names in `_target_`, its nested configs built first, lists and dicts left plain.

    Raises what the target raises, with a note that says which one.
    """
    from hydra import utils
    from hydra.errors import InstantiationException

    if whitelist := any_target():
        kwargs["_execution_whitelist_"] = whitelist
    try:
        return utils.instantiate(dict(config), *args, _convert_="all", **kwargs)
    except InstantiationException as error:
        cause = error.__cause__
        if cause is None:
            raise
        cause.add_note(f"(while building {config['_target_']} from the config)")
        raise cause from None


def any_target() -> Any:
    """What tells Hydra 1.4 that a config may name any target, as it is the user's own program; None before."""
    from hydra import utils

    return getattr(utils, "UNSAFE_DISABLE_EXECUTION_CHECKS", None)


def arguments(config: Config) -> Mapping[str, inspect.Parameter]:
    """The parameters of the class or function that `config` names in `_target_`."""
    from hydra.utils import get_object

    return inspect.signature(get_object(config["_target_"])).parameters


def complete(config: Config, **available: Any) -> dict[str, Any]:
    """`config` plus those of `available` that its target takes and `config` does not set itself."""
    taken = arguments(config)
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
    return dict(config) | {
        name: value
        for name, value in available.items()
        if config.get(name) is None and (anything or name in taken)
    }


def model_config(
    model: Config, norm: Config, weight: Config, input_shape: tuple[int, ...], num_classes: int
) -> dict[str, Any]:
    """The model's config with the norm and the data's shape in it: all that is needed to build it again.

    Where `weight` names a function, the config is a call of it with the model, which it changes and returns.

    Raises ValueError if the model's class takes no `norm`: a sweep over norms would change nothing.
    """
    completed = complete(model, norm=dict(norm), input_shape=list(input_shape), num_classes=num_classes)
    if "norm" not in completed:
        raise ValueError(
            f"{model['_target_']} takes no argument `norm`, so the chosen norm ({norm['_target_']}) would have no "
            f"effect. Its arguments are {', '.join(arguments(model))}. Add `norm` to them, a factory that your "
            "model calls as norm(channels) wherever it normalizes."
        )
    if weight.get("_target_"):
        return {**weight, "model": completed}
    return completed
