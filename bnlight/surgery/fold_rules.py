"""Which norms are a scale and a shift in evaluation, which layers can take them over, and how."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils import parametrize, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from bnlight.norm import BatchNorm, BatchRenorm, FullNorm, MeanOnlyBatchNorm, NoNorm, Norm
from bnlight.norm.batch import BatchStatistics
from bnlight.surgery import known as norms
from bnlight.surgery.dress import own_class

LAYERS: tuple[type[nn.Module], ...] = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
FIXED: tuple[type[Norm], ...] = (BatchNorm, BatchRenorm, FullNorm, MeanOnlyBatchNorm, NoNorm)
RANKS = {"1d": 1, "2d": 2, "3d": 3}
EVALUATION = ("forward", "normalize", "normalize_batch", "by_running_statistics", "running_statistics")


class Affine(NamedTuple):
    """`scale * x + shift` in each channel, `(C,)` each, float64 on the CPU."""

    scale: Tensor
    shift: Tensor

    def then(self, other: Affine) -> Affine:
        """First this map, then the other."""
        return Affine(other.scale * self.scale, other.scale * self.shift + other.shift)


class FoldedNorm(nn.Identity):
    """Stands where a norm of (N, C) was whose work a Linear does: for input of any other rank it would be wrong."""

    def __init__(self, path: str, description: str) -> None:
        super().__init__()
        self.path, self.description = path, description

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 2:
            raise ValueError(
                f"fold_norm: '{self.path}', {self.description}, was folded into a Linear for input (N, C), and got "
                f"{tuple(x.shape)}, where its channels are axis 1 and the Linear's the last; "
                f"fold_norm(model, exclude='{self.path}') leaves it out"
            )
        return x

    def extra_repr(self) -> str:
        return self.description


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm, of torch or bnlight or registered, that does something."""
    return norms.is_norm(module) and not (
        isinstance(module, NoNorm) and module.weight is None and module.bias is None
    )


def is_layer(module: nn.Module) -> bool:
    """Whether a module is a linear map that a norm can be folded into."""
    return isinstance(module, LAYERS)


def behind(norm: nn.Module) -> nn.Module:
    """What a norm does besides normalizing, to be left in its place: timm's have dropout and an activation."""
    found = norms.known(norm)
    return nn.Sequential(*found.then.values()) if found is not None and found.then else nn.Identity()


def core_of(norm: nn.Module) -> nn.Module:
    """The norm of torch or bnlight that does the normalizing."""
    found = norms.known(norm)
    return norm if found is None else found.norm


def norm_problem(norm: nn.Module) -> str | None:
    """Why a norm is no fixed scale and shift in evaluation, None if it is."""
    kind, norm = own_class(norm), core_of(norm)
    own = own_class(norm)
    if isinstance(norm, Norm):
        base: Any = next((known for known in FIXED if isinstance(norm, known)), None)
        if base is None and isinstance(norm, BatchStatistics):
            return f"{kind.__name__} looks at each sample in evaluation too"
        methods: tuple[str, ...] = EVALUATION
    else:
        # A synchronized SyncBatchNorm is no instance of its class.
        base = nn.SyncBatchNorm if issubclass(own, nn.SyncBatchNorm) else _BatchNorm
        base = _InstanceNorm if isinstance(norm, _InstanceNorm) else base
        base = base if issubclass(own, base) else None
        methods = ("forward",)
    if base is None or (isinstance(norm, _InstanceNorm) and not norm.track_running_stats):
        return "it normalizes each sample by its own statistics"
    if changed := _overridden(norm, own, base, methods):
        return f"{kind.__name__} has a {changed} of its own"
    if not isinstance(norm, NoNorm) and norm.running_mean is None:
        return "it has no running statistics, so it normalizes by the batch in evaluation too"
    if getattr(norm, "example_weight", None) is not None:
        return "bnlight.correct_inference is on, so it looks at each sample in evaluation too"
    return None


def layer_problem(layer: nn.Module) -> str | None:
    """Why nothing can be folded into a layer, None if something can."""
    kind = own_class(layer)
    base = next(known for known in LAYERS if isinstance(layer, known))
    if changed := _overridden(layer, kind, base, ("forward", "_conv_forward")):
        return f"is a {kind.__name__}, which has a {changed} of its own"
    weight = layer.weight
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.is_meta:
        return "has no real numbers as weights"
    return None


def channels_problem(norm: nn.Module, layer: nn.Module, *, after: bool) -> str | None:
    """Why the norm's channels are not the layer's outputs (`after` it) or inputs, None if they are."""
    linear, norm = isinstance(layer, nn.Linear), core_of(norm)
    name = own_class(norm).__name__
    if getattr(norm, "channel_dim", 1) == -1:
        if not linear:
            return f"its channels are the last axis, those of {own_class(layer).__name__} axis 1"
    elif linear and (RANKS.get(name[-2:], 1) > 1 or isinstance(norm, _InstanceNorm)):
        return f"the channels of {name} are axis 1, those of Linear the last"
    elif isinstance(layer, _ConvNd) and RANKS.get(name[-2:], len(layer.kernel_size)) != len(
        layer.kernel_size
    ):
        return f"{name} is not for what {own_class(layer).__name__} returns"
    channels = sizes(layer)[1 if after else 0]
    if channels != norm.num_features:
        return f"it has {norm.num_features} channels, {own_class(layer).__name__} {channels}"
    return None


def padding_problem(layer: nn.Module, shift: Tensor) -> str | None:
    """Why a shift before the layer is not one constant behind it, None if it is."""
    if isinstance(layer, nn.Linear) or not shift.any():
        return None
    if isinstance(layer, _ConvTransposeNd):
        return "the edges of a transposed convolution see less of its shift"
    assert isinstance(layer, _ConvNd)
    padded = layer.padding if isinstance(layer.padding, str) else any(layer.padding)
    if layer.padding_mode == "zeros" and padded and padded != "valid":
        return "the layer behind it pads with zeros, which its shift does not reach"
    return None


def sizes(layer: Any) -> tuple[int, int]:
    """Number of channels in and out."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return layer.in_channels, layer.out_channels


def needs_rows(norm: nn.Module, layer: nn.Module) -> bool:
    """Whether the norm's channels are the layer's for input (N, C) only."""
    return isinstance(layer, nn.Linear) and getattr(core_of(norm), "channel_dim", 1) == 1


def affine_of(norm: Any) -> Affine:
    """The norm's scale and shift in evaluation."""
    norm = core_of(norm)
    if isinstance(norm, BatchStatistics):
        assert norm.running_mean is not None
        statistics = norm.running_statistics(norm.running_mean)
        mean, var = (_exact(value) for value in statistics)
    elif isinstance(norm, NoNorm):
        mean = torch.zeros(norm.num_features, dtype=torch.float64)
        var = torch.ones_like(mean)
    else:
        mean, var = _exact(norm.running_mean), _exact(norm.running_var)
    scale = (var + (0 if isinstance(norm, NoNorm) else norm.eps)).rsqrt()
    if norm.weight is not None:
        scale = scale * _exact(norm.weight)
    shift = -scale * mean
    return Affine(scale, shift if norm.bias is None else shift + _exact(norm.bias))


def rescale(layer: Any, before: Affine | None, after: Affine | None) -> None:
    """Give the layer the weights that do the work of the norms on both sides of it, too."""
    weight, like = _exact(layer.weight), layer.weight
    groups = getattr(layer, "groups", 1)
    transposed = isinstance(layer, _ConvTransposeNd)
    # (groups, outputs of a group, inputs of a group, positions)
    rows = (
        weight.reshape(groups, -1, *weight.shape[1:]).flatten(3)
        if weight.dim() > 2
        else weight[None, ..., None]
    )
    rows = rows.transpose(1, 2) if transposed else rows
    bias = torch.zeros(sizes(layer)[1], dtype=torch.float64) if layer.bias is None else _exact(layer.bias)
    if before is not None:
        bias = bias + (rows.sum(3) @ before.shift.view(groups, -1, 1)).flatten()
        rows = rows * before.scale.view(groups, 1, -1, 1)
    if after is not None:
        bias = bias * after.scale + after.shift
        rows = rows * after.scale.view(groups, -1, 1, 1)
    rows = rows.transpose(1, 2) if transposed else rows
    layer.weight = nn.Parameter(rows.reshape(weight.shape).to(like), requires_grad=like.requires_grad)
    if layer.bias is not None or bias.any():
        trained = (like if layer.bias is None else layer.bias).requires_grad
        layer.bias = nn.Parameter(bias.to(like), requires_grad=trained)


def materialize(layer: nn.Module) -> None:
    """Make weights that are computed from others plain parameters."""
    if parametrize.is_parametrized(layer):
        # Not by torch's remove_parametrizations: it changes the class, which a copied layer shares with the original.
        values = {name: getattr(layer, name) for name in layer.parametrizations}  # type: ignore[union-attr]
        del layer.parametrizations
        layer.__class__ = own_class(layer)
        for name, value in values.items():
            layer.register_parameter(name, nn.Parameter(value.detach().clone()))
    for hook in [*layer._forward_pre_hooks.values()]:
        if isinstance(hook, WeightNorm | SpectralNorm):
            remove = remove_weight_norm if isinstance(hook, WeightNorm) else remove_spectral_norm
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                remove(layer, hook.name)


def _overridden(module: nn.Module, kind: Any, base: Any, methods: tuple[str, ...]) -> str | None:
    if "forward" in vars(module):
        return "forward"
    changed = (m for m in methods if getattr(kind, m, None) is not getattr(base, m, None))
    return next(changed, None)


def _exact(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64)
