"""Choose layers by the patterns of their paths."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

Patterns = str | Iterable[str] | None
"""A pattern of layers' paths, such as `"features.*"`, or several; `*` matches dots too. None is no choice."""

M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, of one that is compiled or that runs on several devices."""
    while isinstance(model, DistributedDataParallel | DataParallel) or is_compiled(model):
        model = model._modules["_orig_mod" if is_compiled(model) else "module"]  # type: ignore[assignment]
    return model


def is_compiled(module: nn.Module) -> bool:
    """Whether the module is what torch.compile has made of another one."""
    return type(module).__name__ == "OptimizedModule" and "_orig_mod" in module._modules


def plain(path: str) -> str:
    """The path of a layer, or its key in a state dict, as it is where nothing is compiled."""
    return ".".join(part for part in path.split(".") if part != "_orig_mod")


def paths_of(
    model: nn.Module, wanted: tuple[type[M], ...] | Callable[[nn.Module], bool]
) -> dict[M, list[str]]:
    """The model's layers of these classes, or those wanted, each with all its paths."""
    paths: dict[Any, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, wanted) if isinstance(wanted, tuple) else wanted(module):
            paths.setdefault(module, []).append(plain(path))
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


def named_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`model.named_modules()`, with the paths that the layers have where nothing is compiled."""
    return ((plain(path), module) for path, module in model.named_modules())


def fitting(state: Mapping[str, T], wanted: Iterable[str]) -> dict[str, T]:
    """The state dict under the keys that are wanted, whatever is compiled here, or was where it was saved."""
    keys = {plain(key): key for key in wanted}
    return {keys.get(plain(key), key): value for key, value in state.items()}
