"""Groups of samples that lie between each other: virtual batches in channels last.

No kernel takes such a group as it lies. So groups are copied, a few at a time, each one's channels then channels of
their own. In full precision large samples are better left where they are: a group's sums are sums over its
samples, each of which is a batch as it lies in memory, and the rest is one line per channel.
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
    gradients,
    keep_layout,
    moments,
    normalized,
    statistics_dtype,
    through_statistics,
    uncorrected,
)
from bnlight.norm.first_order import first_order

LARGE = 2**17
"""Bytes in a sample beyond which a call of its own costs less than the copy that avoids it."""

BLOCK = 2**20
"""Bytes of the groups that are copied together; a larger group is copied by itself."""


def interleaved_moments(x: Tensor, valid: Tensor | None, groups: int) -> Moments:
    """Moments `(K, C)` of K groups of equally many samples, sample n in group n mod K; not differentiable.

    Where `valid`, of x's shape, is None the numbers are ints.
    """
    if valid is None and _sample_by_sample(x):
        return _moments_by_sample(x, groups)
    parts = [
        moments(_copy(x, groups, some), None if valid is None else _copy(valid, groups, some))
        for some in _blocks(x, groups)
    ]
    mean, var = (torch.cat(vectors).view(groups, -1) for vectors in list(zip(*parts, strict=True))[:2])
    if valid is None:
        return Moments(mean, var, parts[0].number, x.size(0) // groups)
    number = torch.cat([torch.as_tensor(part.number) for part in parts]).view(mean.shape)
    return Moments(mean, var, number, valid.flatten(1).any(1).view(-1, groups).sum(0).view(-1, 1))


def normalize_interleaved(
    x: Tensor, weight: Tensor, bias: Tensor, plan: Plan, eps: float, way_back: WayBack | None
) -> Tensor:
    """`core.normalize` of each group by its part of the plan `(K, C)`; weight and bias are `(C,)`."""
    mean, var, share, correction = plan
    function = _BySample if _sample_by_sample(x) else _ByGroup
    y: Tensor = function.apply(  # type: ignore[no-untyped-call]
        x, weight, bias, mean, var, share, *(correction or (None, None)), eps, way_back
    )
    return y


class _ByGroup(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        var: Tensor,
        share: Tensor | None,
        r: Tensor | None,
        d: Tensor | None,
        eps: float,
        way_back: WayBack | None,
    ) -> Tensor:
        weight, bias = (values.expand_as(mean) for values in corrected(weight, bias, r, d))
        share = None if share is None else share.expand_as(mean)
        ctx.save_for_backward(x, weight, mean, var, share, r, d)
        ctx.eps, ctx.way_back = eps, way_back
        y, groups = torch.empty_like(x), len(mean)
        for some in _blocks(x, groups):
            w, b, m, v = (values[some].reshape(-1) for values in (weight, bias, mean, var))
            _put(y, groups, some, normalized(_copy(x, groups, some), w, b, m, v, eps))
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var, share, r, d = ctx.saved_tensors
        dy, dx, groups, sums = keep_layout(dy, x), torch.empty_like(x), len(mean), []
        for some in _blocks(x, groups):
            w, m, v = (values[some].reshape(-1) for values in (weight, mean, var))
            s = None if share is None else share[some].reshape(-1)
            rows = _copy(dy, groups, some), _copy(x, groups, some)
            part, *of_weight_and_bias = gradients(*rows, w, m, v, s, ctx.eps, ctx.way_back)
            _put(dx, groups, some, part)
            sums.append(of_weight_and_bias)
        dweight, dbias = (torch.cat(parts).view(mean.shape) for parts in zip(*sums, strict=True))
        return dx, *uncorrected(dweight, dbias, r, d), *[None] * 7


def _blocks(x: Tensor, groups: int) -> list[slice]:
    """The groups that are copied together."""
    size = max(1, min(groups, BLOCK * groups // max(1, x.nbytes)))
    return [slice(first, first + size) for first in range(0, groups, size)]


def _copy(x: Tensor, groups: int, some: slice) -> Tensor:
    """A copy of some groups, `(values, groups * C)`."""
    return _rows(x, groups)[:, some].transpose(1, 2).flatten(2).flatten(0, 1)


def _put(x: Tensor, groups: int, some: slice, copy: Tensor) -> None:
    """Write what `_copy` reads."""
    place = _rows(x, groups)[:, some].transpose(1, 2)
    place.copy_(copy.view(place.shape))


def _rows(x: Tensor, groups: int) -> Tensor:
    """`x` as it lies in memory, `(N / K, K, positions, C)`."""
    return x.movedim(1, -1).reshape(x.size(0) // groups, groups, -1, x.size(1))


class _BySample(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        var: Tensor,
        share: Tensor | None,
        r: Tensor | None,
        d: Tensor | None,
        eps: float,
        way_back: WayBack | None,
    ) -> Tensor:
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
        dx = _line(x, slope, torch.addcmul(shift, mean, slope, value=-1))
        _rows(dx, len(mean)).addcmul_(_rows(dy, len(mean)), scale[:, None])
        return dx, *uncorrected(dweight, dbias, r, d), *[None] * 7


def _sample_by_sample(x: Tensor) -> bool:
    full_precision = x.dtype == statistics_dtype(x.dtype)
    return full_precision and x.device.type == "cpu" and x.nbytes > x.size(0) * LARGE


def _samples(x: Tensor) -> tuple[Tensor, ...]:
    """Each sample as it lies in memory, `(positions, C)`."""
    return _rows(x, 1).flatten(0, 1).unbind()


def _moments_by_sample(x: Tensor, groups: int) -> Moments:
    parts = zip(*(moments(sample)[:2] for sample in _samples(x)), strict=True)
    means, variances = (torch.stack(vectors).view(-1, groups, x.size(1)) for vectors in parts)
    mean = means.mean(0)
    var = (variances + (means - mean).square_()).mean(0)
    return Moments(mean, var, x.numel() // mean.numel(), x.size(0) // groups)


def _line(x: Tensor, slope: Tensor, shift: Tensor) -> Tensor:
    """`x * slope + shift`, by the `(K, C)` of the sample's group."""
    y, groups = torch.empty_like(x), len(slope)
    torch.addcmul(shift[:, None], _rows(x, groups), slope[:, None], out=_rows(y, groups))
    return y
