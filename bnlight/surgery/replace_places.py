"""Where a model holds its layers, and others in their places."""

from collections.abc import Iterable
from types import MethodType
from typing import Any

from torch import nn

from bnlight.norm.paths import is_compiled

NewOf = dict[int, nn.Module]
"""The new layers by the ids of the old ones."""


def exchange(modules: Iterable[nn.Module], new_of: NewOf) -> None:
    """Put the new layers wherever these modules hold the old ones.

    That is as children, attributes, by their methods, and in lists, dicts, tuples and sets, however deep.
    """
    seen: set[int] = set()
    for module in [*modules]:
        _in_place(vars(module), new_of, seen)
        if is_compiled(module) and any(module._modules["_orig_mod"] is new for new in new_of.values()):
            vars(module).pop("forward")  # is bound to the old layer
            module.__setstate__(vars(module))  # type: ignore[no-untyped-call]


def _in_place(held: Any, new_of: NewOf, seen: set[int]) -> None:
    if id(held) in seen:
        return
    seen.add(id(held))
    if isinstance(held, set):
        old = [inner for inner in held if id(inner) in new_of]
        held.difference_update(old)
        held.update(new_of[id(inner)] for inner in old)
        return
    places = [*held.items()] if isinstance(held, dict) else [*enumerate(held)]
    for place, inner in places:
        if (other := _instead(inner, new_of, seen)) is not inner:
            held[place] = other


def _instead(value: Any, new_of: NewOf, seen: set[int]) -> Any:
    """What belongs in the place of `value`: itself, if it holds no old layer or could be changed in place."""
    if id(value) in new_of:
        return new_of[id(value)]
    if isinstance(value, MethodType) and id(value.__self__) in new_of:
        return getattr(new_of[id(value.__self__)], value.__name__, value)
    if isinstance(value, dict | list | set):
        _in_place(value, new_of, seen)
    elif isinstance(value, tuple):
        others = [_instead(inner, new_of, seen) for inner in value]
        if any(other is not inner for other, inner in zip(others, value, strict=True)):
            return type(value)(*others) if hasattr(value, "_fields") else tuple(others)
    return value
