"""Choose layers by the patterns of their paths."""

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import TypeVar

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

Patterns = str | Iterable[str] | None
"""A pattern of layers' paths, such as `"features.*"`, or several; `*` matches dots too. None is no choice."""

M = TypeVar("M", bound=nn.Module)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, of one that is compiled or that runs on several devices."""
    while isinstance(model, DistributedDataParallel | DataParallel) or is_compiled(model):
        model = model._modules["_orig_mod" if is_compiled(model) else "module"]  # type: ignore[assignment]
    return model


def is_compiled(module: nn.Module) -> bool:
    """Whether the module is what torch.compile has made of another one."""
    return type(module).__name__ == "OptimizedModule" and "_orig_mod" in module._modules


def paths_of(model: nn.Module, kinds: tuple[type[M], ...]) -> dict[M, list[str]]:
    """The model's layers of these kinds, each with all its paths."""
    paths: dict[M, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, kinds):
            paths.setdefault(module, []).append(path)
    return paths


def chosen(what: str, paths: dict[M, list[str]], include: Patterns, exclude: Patterns) -> dict[M, str]:
    """The layers with a path that `include` matches, without those with one that `exclude` does.

    Raises ValueError, in the name of `what`, for a pattern without a match, and if no layer is left.
    """
    wanted = set(paths) if include is None else matching(what, paths, include)
    if exclude is not None:
        wanted -= matching(what, paths, exclude)
    if not wanted:
        raise ValueError(f"{what}: include={include!r} and exclude={exclude!r} leave no layer")
    return {layer: names[0] for layer, names in paths.items() if layer in wanted}


def matching(what: str, paths: dict[M, list[str]], patterns: str | Iterable[str]) -> set[M]:
    """The layers with a path that one of the patterns matches; ValueError for a pattern without a match."""
    found = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        hits = {layer for layer, names in paths.items() if any(fnmatchcase(n, pattern) for n in names)}
        if not hits:
            every = [name for names in paths.values() for name in names]
            more = f" and {len(every) - 12} more" if len(every) > 12 else ""
            raise ValueError(f"{what}: {pattern!r} matches none of the layers {', '.join(every[:12])}{more}")
        found |= hits
    return found
