"""Give single modules another behaviour, and take it back: by their class, so that nothing else about them changes."""

from functools import cache
from typing import Any

from torch import nn


class Dress:
    """A behaviour that `dress` puts over a module's own class; its subclasses override methods of nn.Module.

    The module stays the same object, with its parameters, buffers, hooks, attributes and train flag, and is an
    instance of its own class as before. Several dresses can be worn at once; the newest is asked first.
    """

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Classes made at run time cannot be found by name.
        return _new, (worn(self), plain_class(self)), self.__getstate__()


def dress(module: nn.Module, behaviour: type[Dress]) -> None:
    """Let the module behave so from now on; once is as good as twice."""
    if not isinstance(module, behaviour):
        module.__class__ = _dressed((behaviour, *worn(module)), plain_class(module))


def undress(module: nn.Module, behaviour: type[Dress]) -> None:
    """Let the module behave as if it had never been dressed so."""
    kept = tuple(other for other in worn(module) if other is not behaviour)
    module.__class__ = _dressed(kept, plain_class(module)) if kept else plain_class(module)


def plain_class(module: object) -> Any:
    """The module's own class, without what it wears."""
    return next(base for base in type(module).__mro__ if not issubclass(base, Dress))


def worn(module: object) -> tuple[type[Dress], ...]:
    """What the module wears, the newest first."""
    return type(module).__dict__.get("_worn", ()) if isinstance(module, Dress) else ()


@cache
def _dressed(dresses: tuple[type[Dress], ...], plain: Any) -> Any:
    space = {"_worn": dresses, "__module__": plain.__module__, "__qualname__": plain.__qualname__}
    return type(plain.__name__, (*dresses, plain), space)


def _new(dresses: tuple[type[Dress], ...], plain: Any) -> Any:
    kind = _dressed(dresses, plain)
    return object.__new__(kind)
