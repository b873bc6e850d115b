"""Groups of large samples that lie between each other: virtual batches in channels last.

No kernel takes such a group as it lies. But its sums are sums over its samples, each of which is a batch as it lies
in memory, and the rest is one line per channel.
"""

from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from bnlight.norm.core import (
    Moments,
    Plan,
    WayBack,
    channel_sums,
    corrected,
    moments,
    normalized,
    through_statistics,
    uncorrected,
)
from bnlight.norm.first_order import first_order
from bnlight.norm.layout import keep_layout

LARGE = 2**17
"""Bytes in a sample beyond which calls of its own cost less than the copy that avoids them."""


def worth_it(x: Tensor) -> bool:
    """Whether `x`, in channels last, takes less time sample by sample than in a copy."""
    return x.device.type == "cpu" and x[0].numel() * x.element_size() > LARGE


def moments_by_sample(x: Tensor, groups: int) -> Moments:
    """Moments `(K, C)` of K groups of equally many samples, sample n in group n mod K; not differentiable."""
    parts = zip(*(moments(sample)[:2] for sample in _samples(x)), strict=True)
    means, variances = (torch.stack(vectors).view(-1, groups, x.size(1)) for vectors in parts)
    mean = means.mean(0)
    var = (variances + (means - mean).square_()).mean(0)
    return Moments(mean, var, x.numel() // mean.numel(), x.size(0) // groups)


def normalize_by_sample(
    x: Tensor, weight: Tensor, bias: Tensor, plan: Plan, eps: float, way_back: WayBack | None
) -> Tensor:
    """`core.normalize` of each group by its part of the plan `(K, C)`; weight and bias are `(C,)`."""
    y: Tensor = _BySample.apply(x, weight, bias, plan, eps, way_back)  # type: ignore[no-untyped-call]
    return y


class _BySample(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        plan: Plan,
        eps: float,
        way_back: WayBack | None,
    ) -> Tensor:
        mean, var, share, correction = plan
        r, d = correction or (None, None)
        weight, bias = corrected(weight, bias, r, d)
        invstd = (var + eps).rsqrt_()
        scale = weight * invstd
        ctx.save_for_backward(x, scale, mean, invstd, share, r, d)
        ctx.way_back = way_back
        return _line(x, scale, torch.addcmul(bias, mean, scale, value=-1))

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, mean, invstd, share, r, d = ctx.saved_tensors
        dy = keep_layout(dy, x)
        pairs = zip(_samples(dy), _samples(x), cycle(mean), cycle(invstd), strict=False)
        parts = zip(*(channel_sums(*pair) for pair in pairs), strict=True)
        dweight, dbias = (torch.stack(sums).view(-1, *mean.shape).sum(0) for sums in parts)
        if share is None:
            share = mean.numel() / x.numel()
        slope, shift = through_statistics(scale, invstd, share, dweight, dbias, ctx.way_back)
        return (
            _line(x, slope, torch.addcmul(shift, mean, slope, value=-1), dy, scale),
            *uncorrected(dweight, dbias, r, d),
            None,
            None,
            None,
        )


def _rows(x: Tensor, groups: int) -> Tensor:
    """`x` as it lies in memory, `(N / K, K, positions, C)`."""
    return x.movedim(1, -1).reshape(x.size(0) // groups, groups, -1, x.size(1))


def _samples(x: Tensor) -> tuple[Tensor, ...]:
    """Each sample as it lies in memory, `(positions, C)`."""
    return _rows(x, 1).flatten(0, 1).unbind()


def _line(
    x: Tensor, slope: Tensor, shift: Tensor, dy: Tensor | None = None, scale: Tensor | None = None
) -> Tensor:
    """`x * slope + shift`, plus `dy * scale` if given, by the `(K, C)` of the sample's group."""
    y, groups = torch.empty_like(x), len(slope)
    if x.dtype == slope.dtype:
        to = _rows(y, groups)
        torch.addcmul(shift[:, None], _rows(x, groups), slope[:, None], out=to)
        if dy is not None and scale is not None:
            to.addcmul_(_rows(dy, groups), scale[:, None])
        return y
    dy_samples = () if dy is None else _samples(dy)
    # The kernels of half precision are faster than a line in mixed precision.
    zero, one = torch.zeros_like(slope[0]), torch.ones_like(slope[0])
    for n, (to, sample) in enumerate(zip(_samples(y), _samples(x), strict=True)):
        k = n % groups
        line = normalized(sample, slope[k], shift[k], zero, one, 0.0)
        if dy_samples and scale is not None:
            torch.add(line, normalized(dy_samples[n], scale[k], zero, zero, one, 0.0), out=to)
        else:
            to.copy_(line)
    return y
