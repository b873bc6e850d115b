"""Give single modules another behaviour, and take it back: by their class, so that nothing else about them changes."""

from functools import cache
from typing import Any

from torch import nn
from torch.nn.utils import parametrize


class Dress:
    """A behaviour that `dress` puts over a module's own class; its subclasses override methods of nn.Module.

    The module stays the same object, with its parameters, buffers, hooks, attributes and train flag, and is an
    instance of its own class as before, unless the dress says otherwise (`over`). Several dresses can be worn at
    once; the newest is asked first. A lazy module that becomes another class keeps what it wears.
    """

    @classmethod
    def over(cls, plain: Any) -> tuple[Any, ...]:
        """The classes that the dress is put over: the module's own."""
        return (plain,)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Classes made at run time cannot be found by name.
        return _new, (worn(self), plain_class(self)), self.__getstate__()


def dress(module: nn.Module, behaviour: type[Dress]) -> None:
    """Let the module behave so from now on; once is as good as twice."""
    if not isinstance(module, behaviour):
        module.__class__ = _dressed((behaviour, *worn(module)), plain_class(module))


def undress(module: nn.Module, behaviour: type[Dress]) -> None:
    """Let the module behave as if it had never been dressed so."""
    if isinstance(module, behaviour):
        kept = tuple(other for other in worn(module) if other is not behaviour)
        module.__class__ = _dressed(kept, plain_class(module)) if kept else plain_class(module)


def plain_class(module: object) -> Any:
    """The module's own class, without what it wears."""
    return _made(module).get("_plain", type(module))


def own_class(module: object) -> Any:
    """The class as its author wrote it, without what the module wears and without parametrization."""
    kind = plain_class(module)
    return kind.__bases__[0] if kind.__module__ == parametrize.__name__ else kind


def worn(module: object) -> tuple[type[Dress], ...]:
    """What the module wears, the newest first."""
    return _made(module).get("_worn", ())  # type: ignore[no-any-return]


def _made(module: object) -> Any:
    """The namespace of a class that was made here; RuntimeError if another has been put over it."""
    kind = type(module)
    if isinstance(module, Dress) and "_worn" not in kind.__dict__:
        raise RuntimeError(
            f"{kind.__name__} was made from a class that bnlight had changed (by sync_norm or freeze_norm), as "
            "parametrize does: take that back first, or parametrize before"
        )
    return kind.__dict__


@cache
def _dressed(dresses: tuple[type[Dress], ...], plain: Any) -> Any:
    space = {
        "_worn": dresses,
        "_plain": plain,
        "__module__": plain.__module__,
        "__qualname__": plain.__qualname__,
    }
    becomes = getattr(plain, "cls_to_become", None)  # of lazy modules
    if becomes is not None:
        space["cls_to_become"] = _dressed(dresses, becomes)
    bases = next((over for d in dresses if (over := d.over(plain)) != (plain,)), (plain,))
    return type(plain.__name__, (*dresses, *bases), space)


def _new(dresses: tuple[type[Dress], ...], plain: Any) -> Any:
    kind = _dressed(dresses, plain)
    return object.__new__(kind)
