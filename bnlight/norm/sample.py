"""The layers whose statistics come from one sample, in training as in evaluation, and the one without any."""

import math
import warnings
from typing import ClassVar, Literal, Unpack

import torch
from torch import Tensor

from bnlight.norm.arrange import (
    affine,
    by_channel,
    by_position,
    in_channels_last,
    one_by_one,
    standardized,
)
from bnlight.norm.base import Norm, Placement, Shared
from bnlight.norm.core import (
    Plan,
    can_read_values,
    moments,
    normalize,
    per_channel,
    statistics_dtype,
)
from bnlight.norm.layout import keep_layout, memory_layout


class SampleStatistics(Norm):
    """Base of the layers that normalize each sample by itself."""

    _warned = False

    def by_groups(self, x: Tensor, valid: Tensor | None, groups: int) -> Tensor:
        """Normalize each of a sample's groups of channels over its valid values."""
        self.warn_if_alone(x, math.prod(x.shape[1:]) // groups)
        return by_groups(x, valid, groups, *self.full_affine(x), self.eps)

    def warn_if_alone(
        self,
        x: Tensor,
        values: int,
        output: str = "the bias whatever the input is",
        instead: str = "Use fewer groups, or NoNorm at this place",
    ) -> None:
        """Warn, once per layer, when each group has one value, so that the output says little about `x`."""
        if not can_read_values() or values != 1 or x.numel() == 0 or self._warned:
            return
        self._warned = True
        warnings.warn(
            f"{self}: in input of shape {tuple(x.shape)} each group has one value, so the output is {output}. "
            f"{instead}",
            stacklevel=2,
        )


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Layer norm of each position over its channels, in x's memory layout."""
    if one_by_one(x) and x.is_contiguous():
        return affine(by_position(lambda rows: standardized(rows, eps), x), weight, bias)
    last = x if x.dim() == 2 else x.movedim(1, -1)
    y = torch.layer_norm(last, (x.size(1),), *native(x, weight, bias), eps).to(x.dtype)
    return y if last is x else keep_layout(y.movedim(-1, 1), x)


def instance_norm(x: Tensor, valid: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Instance norm over the valid positions, in x's memory layout."""
    if valid is None and one_by_one(x) and in_channels_last(x):
        rows = (vector.expand(x.shape[:2]) for vector in (weight, bias))
        return by_channel(lambda sample, *rest: standardized(sample, eps, *rest), x, *rows)
    # Group norm with C groups is the same, and in float32 twice as fast as torch's instance norm.
    return by_groups(x, valid, x.size(1), weight, bias, eps)


def by_groups(
    x: Tensor, valid: Tensor | None, groups: int, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """Group norm over the valid values, in x's memory layout."""
    if valid is None or x.numel() == 0:
        return group_norm(x, groups, *native(x, weight, bias), eps).to(x.dtype)
    # A sample's group becomes a channel of a batch of one.
    values = x.to(statistics_dtype(x.dtype)).reshape(1, x.size(0) * groups, -1)
    with torch.no_grad():
        batch = moments(values, valid.expand_as(x).reshape(values.shape))
        plan = Plan(batch.mean, batch.var, share=1 / torch.as_tensor(batch.number).clamp(min=1))
    ones, zeros = torch.ones_like(plan.mean), torch.zeros_like(plan.mean)
    y = normalize(values, ones, zeros, plan, eps).view(x.shape)
    return keep_layout((y * per_channel(weight, x) + per_channel(bias, x)).to(x.dtype), x)


def native(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias in the dtype torch's kernels take beside `x`: full on CPU, x's own elsewhere."""
    return (weight, bias) if x.device.type == "cpu" else (weight.to(x.dtype), bias.to(x.dtype))


def group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`torch.group_norm` in x's memory layout, without the weak spots of its channels-last kernel on CPU."""
    if x.device.type != "cpu" or x.is_contiguous() or torch.compiler.is_compiling():
        return keep_layout(torch.group_norm(x, groups, weight, bias, eps), x)
    # Narrow groups are slow there, in half precision up to ten times slower than by way of contiguous.
    narrowest = 32 if x.element_size() == 2 else 16
    if memory_layout(x) is not None and x.size(1) // groups * x.element_size() >= narrowest:
        n, c = x.shape[:2]
        y, mean, invstd = torch.native_group_norm(x, weight, bias, n, c, x.numel() // (n * c), groups, eps)
        # The kernel's variance is E[x^2] - E[x]^2, which is lost when the mean is far from zero.
        if not bool(((mean * invstd).square() > 16).any()):
            return y
    return keep_layout(torch.group_norm(x.contiguous(), groups, weight, bias, eps), x)


class LayerNorm(SampleStatistics):
    """Layer normalization: each sample, or each of its positions, by its own mean and variance.

    `y = (x - mean) / sqrt(var + eps) * weight + bias`

    Training and evaluation are the same. `over="sample"` takes mean and variance over a sample's channels and
    positions, as group norm with one group; `over="channels"` over the channels at each position, as
    transformers do. For `(N, C)` both are the same. See `Norm` for shapes, masks and their errors; ValueError
    for another `over`. Warns once if there is one value to normalize.

    Source: Ba et al. 2016 (arXiv 1607.06450), section 3; over the sample: Wu and He 2018 (arXiv 1803.08494),
    section 3.

    >>> layer = LayerNorm(2, over="channels", channel_dim=-1)
    >>> layer(torch.tensor([[[1.0, 3.0], [5.0, 9.0]]])).detach().round(decimals=2)
    tensor([[[-1.,  1.],
             [-1.,  1.]]])
    """

    def __init__(
        self,
        num_features: int,
        *,
        over: Literal["sample", "channels"] = "sample",
        **shared: Unpack[Shared],
    ) -> None:
        super().__init__(num_features, **shared)
        if over not in ("sample", "channels"):
            raise ValueError(f"LayerNorm: over must be 'sample' or 'channels', got {over!r}")
        self.over = over

    def normalize(self, x: Tensor, valid: Tensor | None) -> Tensor:
        if self.over == "sample" and x.dim() > 2:
            return self.by_groups(x, valid, 1)
        self.warn_if_alone(x, self.num_features)
        return layer_norm(x, *self.full_affine(x), self.eps)


class GroupNorm(SampleStatistics):
    """Group normalization: each group of consecutive channels of a sample by its own mean and variance.

    `y = (x - mean) / sqrt(var + eps) * weight + bias`

    Training and evaluation are the same. `num_groups=None` takes the largest divisor of C not above `min(32,
    C // 4)`, at least 1: the paper's 32 groups where C allows it, and at least four channels in each. See
    `Norm` for shapes, masks and their errors; ValueError if `num_groups` does not divide C. Warns once if a
    group has one value.

    Source: Wu and He 2018 (arXiv 1803.08494), section 3.

    >>> GroupNorm(96).num_groups
    24
    >>> GroupNorm(4, num_groups=2)(torch.tensor([[1.0, 3.0, 10.0, 30.0]])).detach().round(decimals=2)
    tensor([[-1.,  1., -1.,  1.]])
    """

    def __init__(
        self,
        num_features: int,
        *,
        num_groups: int | None = None,
        **shared: Unpack[Shared],
    ) -> None:
        super().__init__(num_features, **shared)
        divisors = [d for d in range(1, num_features + 1) if num_features % d == 0]
        if num_groups is None:
            num_groups = max(d for d in divisors if d <= max(1, min(32, num_features // 4)))
        if num_groups not in divisors:
            raise ValueError(
                f"GroupNorm: num_groups={num_groups} does not divide num_features={num_features}; "
                f"use one of {divisors}"
            )
        self.num_groups = num_groups

    def normalize(self, x: Tensor, valid: Tensor | None) -> Tensor:
        return self.by_groups(x, valid, self.num_groups)


class InstanceNorm(SampleStatistics):
    """Instance normalization: each channel of each sample by its own mean and variance.

    `y = (x - mean) / sqrt(var + eps) * weight + bias`

    Training and evaluation are the same: there are no running statistics. See `Norm` for shapes, masks and
    their errors; ValueError for `(N, C)`, which has one value per channel. Warns once if there is one
    position.

    Source: Ulyanov et al. 2016 (arXiv 1607.08022), section 2.

    >>> InstanceNorm(1)(torch.tensor([[[1.0, 3.0]], [[10.0, 30.0]]])).detach().round(decimals=2).flatten()
    tensor([-1.,  1., -1.,  1.])
    """

    cancels_bias: ClassVar[bool] = True

    def normalize(self, x: Tensor, valid: Tensor | None) -> Tensor:
        self.warn_if_alone(x, math.prod(x.shape[2:]))
        return instance_norm(x, valid, *self.full_affine(x), self.eps)

    def _check(self, x: Tensor, mask: Tensor | None) -> None:
        super()._check(x, mask)
        if x.dim() == 2:
            raise ValueError(
                f"{self}: expected input with positions, (N, C, *) or (N, *, C), got shape {tuple(x.shape)}, "
                "one value per channel and sample; use LayerNorm or GroupNorm here"
            )


class NoNorm(Norm):
    """No normalization: `y = x`, or `y = x * weight + bias` with `affine=True`.

    Training and evaluation are the same. The result is a tensor of its own, as every norm's, so that an in-place
    activation behind it leaves `x` as it is, which a residual connection may read. It takes the arguments of the
    other layers, so that it can stand where they stand; `eps` is unused. See `Norm` for shapes, masks and their errors.

    >>> NoNorm(2)(torch.tensor([[1.0, 3.0]]))
    tensor([[1., 3.]])
    """

    def __init__(
        self,
        num_features: int,
        *,
        affine: bool = False,
        eps: float = 1e-5,
        **placement: Unpack[Placement],
    ) -> None:
        super().__init__(num_features, affine=affine, eps=eps, **placement)

    def normalize(self, x: Tensor, valid: Tensor | None) -> Tensor:
        return keep_layout(affine(x, *self.full_affine(x)), x) if self.affine else x.clone()
