"""What goes from an old norm layer to the one in its place: state, flags, hooks, dress."""

import inspect
import weakref
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from bnlight.norm import BatchRenorm, FullNorm
from bnlight.norm.batch import BatchStatistics
from bnlight.norm.sync import Meeting
from bnlight.surgery.dress import dress, own_class, worn
from bnlight.surgery.freeze import Frozen
from bnlight.surgery.known import Activated, Known, base_of, follow
from bnlight.surgery.replace_kinds import STATISTICS, attributes, channels, settings
from bnlight.surgery.synchronized import Synchronized, synchronize

_HOOKS = (
    "_backward_pre_hooks",
    "_backward_hooks",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_CORRECTION = ("example_weight", "example_var")  # of bnlight.correct_inference

Copies = dict[int, nn.Parameter]
"""What stands for an old parameter where its dtype or device has changed, so that shared ones stay shared."""


def carry_state(
    layer: nn.Module, known: Known, new: nn.Module, explicit: set[str], copies: Copies
) -> tuple[list[str], list[str]]:
    """Give the new norm all it can have of the old layer's, which stays as it is; what was carried, and dropped."""
    carried: list[str] = []
    old = known.norm
    same = own_class(new) is own_class(old)
    computed = [*getattr(old, "parametrizations", {})]
    for name in ("weight", "bias") if not same else [*new._parameters]:
        mine, theirs = old._parameters.get(name), new._parameters.get(name)
        given = name in explicit and name != "bias"  # which says whether there is one
        if mine is not None and theirs is not None and mine.shape == theirs.shape and not given:
            new.register_parameter(name, _fitting(mine, theirs, copies))
            carried.append(name)
        elif name in computed and theirs is not None and theirs.shape == (channels(old),):
            _carry_parametrization(old, new, name)
            carried.append(f"{name} (parametrized)")
    for name in _buffers_for(old, new, same):
        buffer, other = old._buffers.get(name), new._buffers.get(name)
        if buffer is not None and name not in explicit and (name in _CORRECTION or other is not None):
            if other is not None and other.shape != buffer.shape and not same:
                continue
            new._buffers[name] = buffer if other is None else buffer.to(other.device, other.dtype)
            carried.append(name)
    frozen = [*old.parameters()] and not any(parameter.requires_grad for parameter in old.parameters())
    for parameter in new.parameters() if frozen else ():
        parameter.requires_grad_(False)
    new.train(old.training)
    if known.then:
        follow(new, known.then)
        carried += known.then
    for name, value in attributes(layer).items():
        if same or not hasattr(new, name):
            vars(new)[name] = value
            carried.append(name)
    state = [
        name for kind in (old._parameters, old._buffers) for name, value in kind.items() if value is not None
    ]
    dropped = [name for name in state if name not in carried]
    dropped += [f"{name} (parametrized)" for name in computed if f"{name} (parametrized)" not in carried]
    return carried, dropped


def _fitting(mine: nn.Parameter, theirs: nn.Parameter, copies: Copies) -> nn.Parameter:
    if (mine.device, mine.dtype) == (theirs.device, theirs.dtype):
        return mine
    if id(mine) not in copies:
        copy = mine.detach().to(theirs.device, theirs.dtype)
        copies[id(mine)] = nn.Parameter(copy, requires_grad=mine.requires_grad)
    return copies[id(mine)]


def _buffers_for(old: nn.Module, new: nn.Module, same: bool) -> list[str]:
    if same:
        return [*old._buffers]
    if not isinstance(old, BatchStatistics | _BatchNorm):
        return []
    corrected = isinstance(new, BatchStatistics) and not isinstance(new, BatchRenorm | FullNorm)
    return [*STATISTICS, *_CORRECTION] if corrected else [*STATISTICS]


def _carry_parametrization(old: nn.Module, new: nn.Module, name: str) -> None:
    """Let the new layer's tensor be computed as the old one's is, from the same parameters."""
    ways = old.get_submodule(f"parametrizations.{name}")
    with torch.no_grad():
        # The first makes the layer a parametrized one; then all are the old ones.
        parametrize.register_parametrization(new, name, nn.Identity())
    new.get_submodule("parametrizations").register_module(name, ways)


def carry_settings(old: nn.Module, new: nn.Module) -> tuple[list[str], list[str]]:
    """Which of the old norm's settings the new one has too, and which not: those that say something."""
    base = base_of(old)
    assert base is not None
    usual = {name: p.default for name, p in inspect.signature(base).parameters.items()}
    carried, dropped = [], []
    for name, value in settings(old).items():
        if name in ("affine", "bias", "channel_dim", "over"):
            continue
        telling = name in ("eps", "momentum", "num_groups") or value != usual.get(name, value)
        if telling and getattr(new, name, inspect.Parameter.empty) == value:
            carried.append(name)
        elif telling:
            dropped.append(f"{name}={value}")
    if vars(old).get("_compiled_call_impl") is not None:
        dropped.append("compile()")
    return carried, dropped


def carry_hooks(old: nn.Module, new: nn.Module) -> None:
    """Every hook, in the old layer's own dictionaries, so that a handle still removes its hook."""
    for kind in _HOOKS:
        hooks: dict[int, Any] = getattr(old, kind)
        hooks.update(getattr(new, kind))
        setattr(new, kind, hooks)
        for hook in hooks.values():
            if getattr(hook, "with_module", False):
                hook.module = weakref.ref(new)
    new._is_full_backward_hook = old._is_full_backward_hook


def number_of_hooks(module: nn.Module) -> int:
    """How many hooks the layer has, of every kind."""
    return sum(
        len(getattr(module, kind)) for kind in _HOOKS if not kind.endswith(("_with_kwargs", "_called"))
    )


def carry_dress(old: nn.Module, known: Known, new: nn.Module) -> None:
    """The behaviour that the old layer was given in place: `freeze_norm`'s, and those that are not known here."""
    if known.then:
        dress(new, Activated)
    for behaviour in reversed(worn(old)):
        if behaviour in (Activated, Synchronized):
            continue
        if behaviour is Frozen:
            mode, flags = vars(old)["_thawed"]
            names = [name for name, _ in new.named_parameters()]
            trained = {name: flags.get(name, any(flags.values())) for name in names}
            vars(new)["_thawed"] = mode, trained if flags else {}
        dress(new, behaviour)


def carry_meeting(old: nn.Module, new: nn.Module) -> bool | None:
    """Let the new layer meet the other ranks where the old one did; False if it cannot, None if that did not."""
    if isinstance(old, BatchStatistics | Synchronized):
        group, timeout = old.meeting.group, old.meeting.timeout
    else:
        group, timeout = (old.process_group or "world" if isinstance(old, nn.SyncBatchNorm) else None), None
    if group is None:
        return None
    meeting = Meeting(group, timeout=timeout)
    if isinstance(new, BatchStatistics):
        new.meeting = meeting
    elif isinstance(new, _BatchNorm):
        synchronize(new, meeting)
    return isinstance(new, BatchStatistics | _BatchNorm)
