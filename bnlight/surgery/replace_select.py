"""Which norms of a model are meant."""

import sys
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from bnlight.norm.paths import is_compiled, matching
from bnlight.surgery.dress import own_class
from bnlight.surgery.known import known
from bnlight.surgery.replace_kinds import resembles_norm

Selector = str | type[nn.Module] | Callable[[str, nn.Module], bool]
"""A pattern of paths, a class, or a function of path and layer."""

_SHARDED = (
    ("torch.distributed.fsdp", "FSDPModule"),
    ("torch.distributed.fsdp", "FullyShardedDataParallel"),
    ("torch.distributed.tensor", "DTensor"),
)


class _Nothing:
    pass


def norms_of(root: nn.Module) -> dict[nn.Module, list[str]]:
    """Every norm with all its paths; ValueError if the model is one."""
    if known(root) is not None:
        raise ValueError(
            f"replace_norm: the model is itself a norm, {type(root).__name__}, which cannot be exchanged in place; "
            "put it into a torch.nn.Sequential, or make the new layer instead"
        )
    norms: dict[nn.Module, list[str]] = {}
    for path, module in _norms(root, "", ()):
        norms.setdefault(module, []).append(path)
    return norms


def _norms(module: nn.Module, path: str, above: tuple[nn.Module, ...]) -> Iterator[tuple[str, nn.Module]]:
    """Every norm at every path, without what torch.compile puts into them."""
    if resembles_norm(module):
        yield path, module
    elif module not in above and not isinstance(module, parametrize.ParametrizationList):
        for name, child in module._modules.items():
            if child is not None:
                inner = path if is_compiled(module) else f"{path}.{name}".lstrip(".")
                yield from _norms(child, inner, (*above, module))


def refuse_sharded(model: nn.Module) -> None:
    """ValueError if parameters of the model are in pieces on several processes."""
    kinds = tuple(getattr(sys.modules.get(home), name, _Nothing) for home, name in _SHARDED)
    for path, module in model.named_modules():
        if isinstance(module, kinds) or any(isinstance(p, kinds) for p in module._parameters.values()):
            raise ValueError(
                f"replace_norm: {path or 'the model'!r} is sharded over processes ({type(module).__name__}); replace "
                "the norms before FSDP or parallelize_module take the model"
            )


def chosen(norms: dict[nn.Module, list[str]], include: Any, exclude: Any) -> set[nn.Module]:
    """The norms that are included and not excluded; ValueError for a pattern that matches none."""

    def meant(argument: str, selectors: Any) -> set[nn.Module]:
        found: set[nn.Module] = set()
        for selector in [selectors] if isinstance(selectors, str) or callable(selectors) else selectors:
            if isinstance(selector, type):
                found |= {layer for layer in norms if issubclass(own_class(layer), selector)}
            elif callable(selector):
                found |= {layer for layer, paths in norms.items() if any(selector(p, layer) for p in paths)}
            else:
                found |= matching(f"replace_norm: {argument}", norms, selector)
        return found

    return (set(norms) if include is None else meant("include", include)) - (
        set() if exclude is None else meant("exclude", exclude)
    )
