"""Which modules are norms, and what those of other libraries compute, in terms of torch's and bnlight's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import batchnorm, instancenorm

from bnlight.norm import NORMS, LayerNorm, MeanOnlyBatchNorm, Norm, RMSNorm
from bnlight.norm.batch import BatchStatistics
from bnlight.norm.sample import SampleStatistics
from bnlight.surgery.dress import Dress, own_class

TORCH_NORMS: tuple[type[nn.Module], ...] = (
    *(batchnorm._BatchNorm, instancenorm._InstanceNorm),
    *(nn.GroupNorm, nn.LayerNorm, nn.RMSNorm),
)
ALL_NORMS: tuple[type[nn.Module], ...] = (Norm, *TORCH_NORMS)
"""The base classes of bnlight's and torch's norms."""

KNOWN: frozenset[type[nn.Module]] = frozenset(
    {
        *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, batchnorm._BatchNorm),
        *(nn.LazyBatchNorm1d, nn.LazyBatchNorm2d, nn.LazyBatchNorm3d),
        *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, instancenorm._InstanceNorm),
        *(nn.LazyInstanceNorm1d, nn.LazyInstanceNorm2d, nn.LazyInstanceNorm3d),
        *(nn.GroupNorm, nn.LayerNorm, nn.RMSNorm),
        *(*NORMS.values(), MeanOnlyBatchNorm, BatchStatistics, SampleStatistics, Norm),
    }
)
"""The classes whose behaviour is known; other norms are subclasses of these, registered, or left alone."""

INERT = {
    *(
        "__init__",
        "__doc__",
        "__module__",
        "__qualname__",
        "__annotations__",
        "__annotate__",
        "__signature__",
    ),
    *("__annotate_func__", "__annotations_cache__", "__firstlineno__", "__static_attributes__"),
    *("__constants__", "__parameters__", "__orig_bases__", "__dict__", "__weakref__"),
    *("_check_input_dim", "__repr__", "extra_repr"),
}
"""What a subclass may have of its own without computing anything else."""

Rule = Callable[[Any], nn.Module | None]
"""From a layer of another library to the norm that computes the same, or None for none."""

_RULES: dict[type | str, Rule] = {}
THEN = "_then"
"""Attribute of an `Activated` layer: the names of its children that follow the norm."""


class Known(NamedTuple):
    """What a layer computes: a norm of torch or bnlight, and then the modules behind it, by name."""

    norm: nn.Module
    then: dict[str, nn.Module]


def register_norm(kind: type[nn.Module] | str, rule: Rule | None = None) -> Any:
    """Say what a norm of another library, or of your own, computes; also as a decorator, `@register_norm(Class)`.

    `rule(layer)` returns the norm of torch or bnlight that computes what the layer does, with the layer's own
    Parameters and buffers, so that they stay the same objects. What the layer does afterwards, an activation say,
    follows in a Sequential: `nn.Sequential(norm, layer.act)`; `replace_norm` keeps it behind the new norm, under its
    name. None says that this layer is not understood, and is left. The layer itself must not be changed.

    Then `replace_norm`, `fold_norm`, `freeze_norm`, `norm_parameters`, `norm_penalty`, `constrain_norm`, `NormMonitor`
    and `diagnose` take the class for the norm that it is. Subclasses too, as long as they have only an `__init__`
    of their own. The last registration of a class counts.

    Args:
        kind: the class, or its full name, `"package.module.Class"`, `*` for any text; such a module is not imported.
        rule: see above.

    Raises TypeError for what is no class of modules, for torch's and bnlight's own classes, and, where a layer is
    looked at, if the rule returns anything else.

    >>> class ScaleNorm(nn.Module):
    ...     def __init__(self, size):
    ...         super().__init__()
    ...         self.gain = nn.Parameter(torch.ones(size))
    ...     def forward(self, x):
    ...         return self.gain * x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    >>> @register_norm(ScaleNorm)
    ... def _(layer):
    ...     norm = nn.RMSNorm(len(layer.gain), eps=1e-6)
    ...     norm.weight = layer.gain
    ...     return norm
    >>> is_norm(ScaleNorm(8))
    True
    """
    if rule is None:
        return lambda given: register_norm(kind, given)
    if not isinstance(kind, str) and (not isinstance(kind, type) or not issubclass(kind, nn.Module)):
        raise TypeError(f"register_norm: expected a class of modules, or its full name, got {kind!r}")
    if kind in KNOWN:
        raise TypeError(f"register_norm: {kind} is known already; register a subclass of it")
    _RULES[kind] = rule
    return rule


def base_of(module: nn.Module) -> type[nn.Module] | None:
    """The norm of torch or bnlight that the module's class is or descends from."""
    return next((kind for kind in own_class(module).__mro__ if kind in KNOWN), None)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm of torch or bnlight, or registered as one."""
    return isinstance(module, ALL_NORMS) or registered(module) is not None


def known(module: nn.Module) -> Known | None:
    """What the module computes, if it is a norm: as registered, or else by its class alone."""
    if (found := registered(module)) is not None:
        return found
    if base_of(module) is None:
        return None
    return Known(module, {name: module.get_submodule(name) for name in vars(module).get(THEN, ())})


def registered(module: nn.Module) -> Known | None:
    """What the module computes by the rule that is registered for its class; None without one."""
    rule = _rule(own_class(module))
    if rule is None or isinstance(module, torch.jit.ScriptModule) or (found := rule(module)) is None:
        return None
    norm, *behind = found if isinstance(found, nn.Sequential) else [found]
    if not isinstance(norm, ALL_NORMS):
        raise TypeError(
            f"register_norm: the rule for {own_class(module).__name__} must return a norm of torch or bnlight, or a "
            f"Sequential that begins with one, got {found!r}"
        )
    names = {child: name for name, child in module.named_children()}
    return Known(norm, {names.get(child, f"then{number}"): child for number, child in enumerate(behind)})


def _rule(kind: type) -> Rule | None:
    for ancestor in kind.__mro__:
        if ancestor in KNOWN or ancestor is nn.Module:
            return None
        name = _name(ancestor)
        matching = (key for key in reversed(_RULES) if isinstance(key, str) and fnmatchcase(name, key))
        rule = _RULES.get(ancestor) or _RULES.get(name) or _RULES.get(next(matching, ""))
        if rule is not None or vars(ancestor).keys() - INERT:
            return rule
    return None


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


class Activated(Dress):
    """A norm, and then the children of it that `follow` has named."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The norm's output, and what follows it."""
        y = super().forward(*args, **kwargs)  # type: ignore[misc]
        for name in vars(self)[THEN]:
            y = self._modules[name](y)  # type: ignore[attr-defined]
        return y


def follow(norm: nn.Module, then: dict[str, nn.Module]) -> None:
    """Make these modules children of the norm, which `dress(norm, Activated)` lets follow it."""
    for name, module in then.items():
        norm.add_module(name, module)
    vars(norm)[THEN] = (*then,)


# What timm, torchvision and transformers have.


def by_class(layer: Any) -> nn.Module:
    """torch's norm, as which the layer begins, and its children."""
    return nn.Sequential(_as(_torch_base(layer), layer), *layer.children())


def by_looking(layer: Any) -> nn.Module | None:
    """The norm of single samples, and the children behind it, that give the layer's output for random parameters."""
    base, parameters = _torch_base(layer), {*layer._parameters, *getattr(layer, "parametrizations", ())}
    eps = next((vars(layer)[name] for name in ("eps", "variance_epsilon") if name in vars(layer)), None)
    size = getattr(layer, "num_channels", getattr(layer, "normalized_shape", None))
    if size is None and isinstance(layer._parameters.get("weight"), Tensor):
        size = layer.weight.shape
    size = (size,) if isinstance(size, int) else tuple(size or ())
    of_batches = issubclass(base, batchnorm._BatchNorm | instancenorm._InstanceNorm)
    if of_batches or layer._buffers or not parameters <= {"weight", "bias"} or not eps or len(size) != 1:
        return None
    channels, behind = int(size[0]), [m for name, m in layer.named_children() if name != "parametrizations"]
    given = [name for name in sorted(parameters) if layer._parameters.get(name, layer) is not None]
    plain = [(k, v) for k, v in vars(layer).items() if isinstance(v, int | float | str) and k != "training"]
    question = (own_class(layer), channels, eps, *given, *plain, repr(behind))
    if question not in _ANSWERS:
        _ANSWERS[question] = _looked_at(layer, base, channels, eps, given)
    if (answer := _ANSWERS[question]) is None:
        return None
    kind, axis = answer
    if base is kind and (axis == -1 or kind is nn.GroupNorm):
        return nn.Sequential(_as(base, layer), *behind)
    arguments: Any = {"eps": eps, "affine": bool(given), "bias": "bias" in given, "channel_dim": axis}
    arguments |= {"over": "channels"} if kind is nn.LayerNorm else {}
    norm = (LayerNorm if kind is nn.LayerNorm else RMSNorm)(channels, **arguments, device="meta")
    norm._parameters = {name: layer._parameters.get(name) for name in ("weight", "bias")}
    norm._modules = _as(nn.Module, layer)._modules
    return nn.Sequential(norm.train(layer.training), *behind)


_ANSWERS: dict[tuple[Any, ...], tuple[Any, int] | None] = {}


@torch.no_grad()
def _looked_at(
    layer: nn.Module, base: Any, channels: int, eps: float, given: list[str]
) -> tuple[Any, int] | None:
    """torch's class with the same output, and the axis of the channels; with random parameters on the CPU."""
    random = torch.Generator("cpu").manual_seed(0)
    place: Any = {"generator": random, "device": "cpu", "dtype": torch.float32}
    values = {name: torch.rand(channels, **place) + 0.5 for name in given}
    example = _as(own_class(layer), layer)
    example._parameters = {name: nn.Parameter(value) for name, value in values.items()}
    example._parameters |= {name: None for name in ("weight", "bias") if name not in values}
    example._modules = {
        name: copy.deepcopy(child).eval().to("cpu", torch.float32)
        for name, child in layer.named_children()
        if name != "parametrizations"
    }
    short, long = [size for size in (2, 3, 4) if size != channels][:2]
    for axis, positions in ((1, (short, long)), (-1, (short, long)), (1, (long,)), (-1, (long,))):
        x = torch.randn((2, channels, *positions) if axis == 1 else (2, *positions, channels), **place)
        y = None
        with suppress(Exception):  # no input for it
            y = example.forward(x.clone())
        for kind, formula in _FORMULAS.items():
            if not isinstance(y, Tensor) or (kind is nn.GroupNorm and (base is not kind or axis != 1)):
                continue
            groups = getattr(layer, "num_groups", 1)
            z = formula(x.movedim(axis, -1), values, eps, groups).movedim(-1, axis)
            for child in example.children():
                z = child(z)
            if z.shape == y.shape and torch.allclose(z, y, rtol=1e-4, atol=1e-4):
                return kind, axis
    return None


def _torch_base(layer: nn.Module) -> Any:
    return base_of(layer) or nn.Module


def _layer_formula(x: Tensor, p: dict[str, Tensor], eps: float, groups: int) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], p.get("weight"), p.get("bias"), eps)


def _rms_formula(x: Tensor, p: dict[str, Tensor], eps: float, groups: int) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], p.get("weight"), eps) + p.get("bias", 0)


def _group_formula(x: Tensor, p: dict[str, Tensor], eps: float, groups: int) -> Tensor:
    y = F.group_norm(x.movedim(-1, 1), groups, p.get("weight"), p.get("bias"), eps)
    return y.movedim(1, -1)


_FORMULAS: dict[Any, Callable[..., Tensor]] = {
    nn.GroupNorm: _group_formula,
    nn.LayerNorm: _layer_formula,
    nn.RMSNorm: _rms_formula,
}


def _as(kind: Any, layer: nn.Module) -> nn.Module:
    """The layer's tensors and attributes in another class, without its children."""
    other: nn.Module = kind.__new__(kind)
    vars(other).update(vars(layer))
    other._modules = {n: m for n, m in layer._modules.items() if n == "parametrizations"}
    return other


for _class in ("BatchNormAct2d", "SyncBatchNormAct"):
    register_norm(f"timm.layers.norm_act.{_class}", by_class)
for _library in ("timm", "torchvision", "transformers"):
    register_norm(f"{_library}.*Norm*", by_looking)
