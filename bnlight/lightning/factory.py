"""What a config with `_partial_` becomes in a job: a factory that knows whether anybody has used it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn


class Factory(functools.partial):  # type: ignore[type-arg]  # generic for type checkers alone
    """A norm(channels), an optimizer(parameters), a scheduler(optimizer): a partial with a memory.

    `called`: whether it was called, or asked for what it calls. `reached`: the names of its keywords that a call has
    left as they are, or that somebody has read.
    """

    called: bool
    reached: set[str]

    def __new__(cls, function: Callable[..., Any]) -> Factory:
        given: Any = function if isinstance(function, functools.partial) else functools.partial(function)
        made = super().__new__(cls, given.func, *given.args, **given.keywords)
        made.called, made.reached = False, set()
        return made

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        self.called = True
        self.reached |= super().keywords.keys() - kwargs.keys()
        return super().__call__(*args, **kwargs)

    @property
    def func(self) -> Any:  # type: ignore[override,unused-ignore]
        """What it calls."""
        self.called = True
        return super().func

    @property
    def keywords(self) -> dict[str, Any]:  # type: ignore[override,unused-ignore]
        """What it calls that with."""
        self.reached |= super().keywords.keys()
        return super().keywords

    def __deepcopy__(self, memo: Any) -> Factory:
        return self  # what a copy does is done by it

    def __reduce__(self) -> Any:  # a pickle is for other processes and times
        function, given = super().func, super().args
        return functools.partial, (function,), (function, given, {**super().keywords}, {})


@dataclass
class Record:
    """The factories that were made of configs, with the config's `_target_`, and the network of a module's own."""

    factories: list[tuple[str, Factory]] = field(default_factory=list)
    network: nn.Module | None = None


current: Record | None = None


@contextlib.contextmanager
def recorded() -> Iterator[Record]:
    """Within it, what `bnlight.lightning.build.instantiate` makes of a `_partial_` is a `Factory` of the record."""
    global current
    before, current = current, Record()
    try:
        yield current
    finally:
        current = before


def watched(built: Any, target: str) -> Any:
    """`built`, as a factory of the record where there is one."""
    if current is None:
        return built
    made = Factory(built)
    current.factories.append((target, made))
    return made
