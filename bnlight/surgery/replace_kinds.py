"""What there is to know of a norm layer: its channels, its settings, and what it does beyond the norm."""

import inspect
import re
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import batchnorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from bnlight.norm import MeanOnlyBatchNorm, Norm, NormLSTM
from bnlight.surgery.dress import own_class
from bnlight.surgery.known import INERT, THEN, base_of, known, registered
from bnlight.surgery.parameters import is_named_norm, is_scripted_norm

MADE = "_made_by_replace_norm"
"""Attribute of the modules of foreign classes that factories have made, whose insides are nobody's business."""

CHANNELS_LAST = (nn.LayerNorm, nn.RMSNorm)
_ELSEWHERE = {"_compiled_call_impl", "_sync", "_thawed", THEN}
"""Attributes that are carried, or reported, in a way of their own."""

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_STATE = ("_parameters", "_buffers", "_modules")


def resembles_norm(module: nn.Module) -> bool:
    """Whether the module is a known norm, or looks like another library's: by name, parameters and buffers."""
    if isinstance(module, torch.jit.ScriptModule):
        return is_scripted_norm(module)
    if known(module) is not None or isinstance(module, NormLSTM) or MADE in vars(module):
        return True
    if not is_named_norm(own_class(module).__name__):
        return False
    inside = any(base_of(child) is not None for child in module.modules())
    state = [*module._parameters.values(), *module._buffers.values()]
    flat = any(tensor is not None and not is_lazy(tensor) and tensor.dim() <= 1 for tensor in state)
    return flat and not inside


def core_of(new: nn.Module) -> nn.Module:
    """The one known norm in what a factory has made, as in a norm with an activation; else the module itself."""
    inside = [] if base_of(new) is not None else [m for m in new.modules() if base_of(m) is not None]
    return inside[0] if len(inside) == 1 else new


def channel_dim(module: nn.Module) -> int:
    """Which axis of its input holds the layer's channels: 1 or -1."""
    if isinstance(module, Norm):
        return module.channel_dim
    # A subclass LayerNorm2d is taken for one of images, over their channels.
    return (
        -1 if isinstance(module, CHANNELS_LAST) and not re.search(r"\dd", own_class(module).__name__) else 1
    )


def channels(module: nn.Module) -> int:
    """The number of channels; 0 of a lazy layer that has seen no input."""
    if isinstance(module, nn.GroupNorm):
        return module.num_channels
    if isinstance(module, CHANNELS_LAST):
        return module.normalized_shape[-1]
    return int(module.num_features)  # type: ignore[arg-type]


def settings(module: nn.Module) -> dict[str, Any]:
    """The layer's settings, under the names of bnlight's arguments."""
    if isinstance(module, Norm):
        return _own_settings(module)
    bias = _has(module, "bias")
    found: dict[str, Any] = {"eps": module.eps, "affine": _has(module, "weight") or bias}
    if found["affine"]:
        found["bias"] = bias
    if isinstance(module, batchnorm._BatchNorm):
        found |= {"momentum": module.momentum, "track_running_stats": module.running_mean is not None}
    if isinstance(module, nn.GroupNorm):
        found["num_groups"] = module.num_groups
    if isinstance(module, CHANNELS_LAST):
        found["over"] = "channels"
    if found["eps"] is None:  # of torch's RMSNorm: the machine epsilon of the input's dtype
        del found["eps"]
        if any(parameter.dtype == torch.float64 for parameter in module.parameters()):
            found["eps"] = torch.finfo(torch.float64).eps
    return found


def _has(module: nn.Module, name: str) -> bool:
    """Whether there is such a parameter, be it computed from others, without computing it."""
    return module._parameters.get(name) is not None or parametrize.is_parametrized(module, name)


def _own_settings(module: Norm) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in inspect.signature(own_class(module)).parameters:
        if name == "bias":
            found[name] = _has(module, name) or not module.affine
            continue
        value = getattr(module, name, inspect.Parameter.empty)
        if name not in ("num_features", "device", "dtype") and value is not inspect.Parameter.empty:
            found[name] = value
    for name, initial in (("alpha", "initial_alpha"), ("r_max", "first_bounds"), ("d_max", "first_bounds")):
        if name in found and hasattr(module, initial):  # the live values are state
            value = getattr(module, initial)
            found[name] = value[name == "d_max"] if isinstance(value, tuple) else value
    if isinstance(module, MeanOnlyBatchNorm):
        found.pop("eps", None)
    return {name: value for name, value in found.items() if not isinstance(value, Tensor)}


def obstacle(module: nn.Module) -> str | None:
    """Why no layer of another kind could stand here, if so."""
    if isinstance(module, torch.jit.ScriptModule):
        return "it is scripted"
    if isinstance(module, NormLSTM):
        return "its steps are built for their norm: make another NormLSTM(norm=...)"
    if MADE in vars(module):
        return "made by the factory of an earlier call, of a class that is not known"
    if (found := known(module)) is None:
        return "a norm of another library, of which only the name is known"
    module = found.norm
    if isinstance(module, CHANNELS_LAST) and len(module.normalized_shape) > 1:
        return f"it normalizes over {len(module.normalized_shape)} axes, {tuple(module.normalized_shape)}"
    if (
        isinstance(module, batchnorm._BatchNorm)
        and module.running_mean is not None
        and not module.track_running_stats
    ):
        return (
            "its track_running_stats was switched off later: it evaluates by averages that it does not move"
        )
    return None


def is_unseen(module: nn.Module) -> bool:
    """Whether the layer is lazy and has seen no input, so that the number of its channels is unknown."""
    return isinstance(module, LazyModuleMixin) and channels(module) == 0


def beyond(module: nn.Module) -> list[str]:
    """What the layer does or has that its known base does not: it would be lost."""
    if registered(module) is not None:
        return []
    base, kind = base_of(module), own_class(module)
    assert base is not None
    bases, found = set(base.__mro__), dict[str, None]()
    for ancestor in kind.__mro__:
        if ancestor not in bases:
            names = vars(ancestor).keys() - INERT
            found |= {f"{name}()" if callable(vars(ancestor)[name]) else name: None for name in sorted(names)}
    for name in sorted(vars(module).keys() - _reference(base)):
        if callable(getattr(kind, name, None)):
            found[f"{name}() of the instance"] = None
    usual = {"parametrizations", *getattr(module, "parametrizations", ())}
    usual |= {*vars(module).get(THEN, ())}
    for state in _STATE:
        names = getattr(module, state).keys() - _reference_state(base, state) - usual
        found |= dict.fromkeys(sorted(names))
    return [*found]


def attributes(module: nn.Module) -> dict[str, Any]:
    """What somebody has set on the layer beside the attributes that its base has; nothing if that is not known."""
    base, kind = base_of(module), own_class(module)
    if base is None:
        return {}
    names = vars(module).keys() - _reference(base) - _ELSEWHERE
    return {name: vars(module)[name] for name in sorted(names) if not callable(getattr(kind, name, None))}


@cache
def _example(base: Any) -> nn.Module:
    arguments = (
        (1, 1) if issubclass(base, nn.GroupNorm) else () if issubclass(base, LazyModuleMixin) else (1,)
    )
    example: nn.Module = base(*arguments, device="meta")
    return example


def _reference(base: Any) -> set[str]:
    return set(vars(_example(base)))


def _reference_state(base: Any, state: str) -> set[str]:
    optional = {"_parameters": {"weight", "bias"}, "_buffers": {*STATISTICS}, "_modules": set[str]()}
    return {*getattr(_example(base), state)} | optional[state]
