"""Groups of samples that lie between each other: virtual batches in channels last.

No kernel takes such a group as it lies, so each is copied, one at a time. In full precision large samples are
better left where they are: a group's sums are sums over its samples, each of which is a batch as it lies in
memory, and the rest is one line per channel.
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


def interleaved_moments(x: Tensor, valid: Tensor | None, groups: int) -> Moments:
    """Moments `(K, C)` of K groups of equally many samples, sample n in group n mod K; not differentiable.

    Where `valid`, of x's shape, is None the numbers are ints.
    """
    if valid is None and _sample_by_sample(x):
        return _moments_by_sample(x, groups)
    where = [None] * groups if valid is None else _groups(valid, groups)
    pairs = zip(_groups(x, groups), where, strict=True)
    parts = [moments(_copy(group), None if v is None else _copy(v)) for group, v in pairs]
    mean, var = (torch.stack(vectors) for vectors in list(zip(*parts, strict=True))[:2])
    if valid is None:
        return Moments(mean, var, parts[0].number, x.size(0) // groups)
    number = torch.stack([torch.as_tensor(part.number) for part in parts])
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
        y = torch.empty_like(x)
        groups = zip(_groups(x, len(mean)), _groups(y, len(mean)), weight, bias, mean, var, strict=True)
        for group, to, w, b, m, v in groups:
            to.copy_(normalized(_copy(group), w, b, m, v, eps).view(to.shape))
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var, share, r, d = ctx.saved_tensors
        dy, dx, sums = keep_layout(dy, x), torch.empty_like(x), []
        shares = [None] * len(mean) if share is None else share
        groups = (_groups(tensor, len(mean)) for tensor in (dy, x, dx))
        for dgroup, group, to, w, m, v, s in zip(*groups, weight, mean, var, shares, strict=True):
            part, *parts = gradients(_copy(dgroup), _copy(group), w, m, v, s, ctx.eps, ctx.way_back)
            to.copy_(part.view(to.shape))
            sums.append(parts)
        dweight, dbias = (torch.stack(parts) for parts in zip(*sums, strict=True))
        return dx, *uncorrected(dweight, dbias, r, d), *[None] * 7


def _rows(x: Tensor, groups: int) -> Tensor:
    """`x` as it lies in memory, `(N / K, K, positions, C)`."""
    return x.movedim(1, -1).reshape(x.size(0) // groups, groups, -1, x.size(1))


def _groups(x: Tensor, groups: int) -> tuple[Tensor, ...]:
    """Each group as it lies in memory, `(N / K, positions, C)`."""
    return _rows(x, groups).unbind(1)


def _copy(group: Tensor) -> Tensor:
    return group.reshape(-1, group.size(-1))


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
