"""From a name or a factory to a new layer for the place of an old one."""

import difflib
import functools
import inspect
from collections.abc import Callable
from contextlib import nullcontext
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from bnlight.norm import NORMS, BatchRenorm, FullNorm, GroupNorm, LayerNorm, NoNorm, Norm
from bnlight.norm.base import chosen_arguments
from bnlight.norm.batch import BatchStatistics
from bnlight.surgery.dress import own_class
from bnlight.surgery.replace_kinds import CHANNELS_LAST, channel_dim, channels, settings

NormFactory = Callable[..., nn.Module]

_ANYWHERE = ("eps", "affine", "bias")
"""Settings that mean the same in every norm."""

_OURS = ("weight_init", "bias_init", "channel_dim", "virtual_batch_size", "small_batch", "jitter", "over")
"""Settings that mean the same in all of bnlight's layers that have them."""


class Factory:
    """Calls `norm(channels, ...)` with the settings of the old layer that it takes and has no value for."""

    def __init__(self, norm: str | NormFactory) -> None:
        made = _named(norm) if isinstance(norm, str) else norm
        if isinstance(made, nn.Module) or not callable(made):
            raise TypeError(
                "replace_norm: norm must be a name, or be called as norm(channels), like bnlight.norm.BatchNorm or "
                f"functools.partial(torch.nn.GroupNorm, 8); got {norm!r}"
            )
        self.norm: NormFactory = made
        partial = made if isinstance(made, functools.partial) else functools.partial(made)
        self.kind = partial.func if isinstance(partial.func, type) else None
        self.explicit = chosen_arguments(partial)
        self.takes: set[str] = set()
        try:
            named = [p.name for p in inspect.signature(made).parameters.values() if p.kind != p.VAR_KEYWORD]
            self.explicit |= {*inspect.signature(partial.func).bind_partial(*partial.args).arguments}
        except (TypeError, ValueError):  # written in C, or called wrongly, which the call will say
            named = []
        self.takes = {*named[1:]} - self.explicit

    def make(self, old: nn.Module, model: nn.Module) -> nn.Module:
        """The new layer, without any of the old one's state."""
        placed = _placement(old, model)
        arguments = self.arguments(old) | {
            name: value for name, value in placed.items() if name in self.takes
        }
        device = placed["device"]
        with torch.device(device) if "device" not in self.explicit else nullcontext():
            new = self.norm(channels(old), **arguments)
        if not isinstance(new, nn.Module):
            raise TypeError(f"{self.norm!r} made a {type(new).__name__}, which is no torch.nn.Module")
        missing = {name: placed[name] for name in placed if name not in self.takes | self.explicit}
        return new.to(**missing) if missing else new

    def arguments(self, old: nn.Module) -> dict[str, Any]:
        """The settings of the old layer that are the new one's too."""
        old_kind, kind, known = own_class(old), self.kind or nn.Module, settings(old)
        names = {*known} if kind is old_kind else {*_ANYWHERE}
        if issubclass(kind, Norm):
            names |= {*_OURS}
        if momentum_of(kind) is momentum_of(old_kind) is not None:
            names.add("momentum")
        if momentum_of(kind) is BatchStatistics:
            names.add("track_running_stats")
        if issubclass(kind, GroupNorm):
            names.add("num_groups")
        # Without normalization there is no scale to restore.
        if kind is not old_kind and (
            issubclass(kind, NoNorm) or (isinstance(old, NoNorm) and not old.affine)
        ):
            names -= {"affine", "bias"}
        known = {"channel_dim": channel_dim(old)} | known
        if issubclass(kind, LayerNorm) and known["channel_dim"] == -1:
            known.setdefault("over", "channels")
        if not issubclass(kind, Norm) and "channel_dim" in self.takes:
            names.add("channel_dim")
        if "elementwise_affine" in self.takes and "affine" in known:
            known["elementwise_affine"] = known["affine"]
            names.add("elementwise_affine")
        return {name: value for name, value in known.items() if name in names & self.takes}


def momentum_of(kind: type) -> type | None:
    """The class that stands for what `momentum` means in this one."""
    meanings = BatchRenorm, FullNorm, BatchStatistics, _InstanceNorm
    found = next((meaning for meaning in meanings if issubclass(kind, meaning)), None)
    return BatchStatistics if issubclass(kind, _BatchNorm) else found


def wrong_axis(old: nn.Module, new: nn.Module) -> str | None:
    """What is wrong if the layers look for the channels on different axes, as far as that is known."""
    before = channel_dim(old)
    if isinstance(new, (Norm, _BatchNorm, _InstanceNorm, nn.GroupNorm, *CHANNELS_LAST)):
        after = channel_dim(new)
        if before != after and not isinstance(old, nn.BatchNorm1d):  # whose input may be (N, C)
            return (
                f"has its channels on axis {before}, but {type(new).__name__} on axis {after}; exclude it, or give a "
                "factory norm(channels, channel_dim=d), such as bnlight's layers"
            )
    return None


def _named(name: str) -> type[Norm]:
    if name not in NORMS:
        near = difflib.get_close_matches(name.lower(), NORMS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"replace_norm: unknown norm {name!r}{hint} Choose one of {', '.join(NORMS)}, or give a factory"
        )
    return NORMS[name]


def _placement(old: nn.Module, model: nn.Module) -> dict[str, Any]:
    """Device and dtype of the old layer's parameters, or else its buffers, or else the model's."""
    tensors = chain.from_iterable(chain(m.parameters(), m.buffers()) for m in (old, model))
    like = next((tensor for tensor in tensors if tensor.is_floating_point()), torch.empty(0))
    return {"device": like.device, "dtype": like.dtype}
