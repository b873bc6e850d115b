"""Groups of samples that lie between each other: in channels last, normalized without rearranging them.

No kernel takes such a group as a whole. But each sample is a batch as it lies in memory: a group's sums are sums
over its samples', and the rest is one line per channel.
"""

from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from bnlight.norm.core import (
    Moments,
    Plan,
    WayBack,
    can_read_values,
    channel_sums,
    corrected,
    keep_layout,
    moments,
    through_statistics,
    uncorrected,
)
from bnlight.norm.first_order import first_order

LARGE = 2**17
"""Bytes in a sample beyond which calls of its own cost less than the copies that avoid them."""


def in_place(x: Tensor) -> bool:
    """Whether the groups of `x`, in channels last, are normalized where they are and not faster in a copy."""
    return can_read_values() and x.device.type == "cpu" and x.nbytes > len(x) * LARGE


def interleaved_moments(x: Tensor, groups: int) -> Moments:
    """Moments `(K, C)` of K groups of equally many samples, sample n in group n mod K; not differentiable."""
    mean, var = _stacked([moments(sample)[:2] for sample in _samples(x)], groups)
    together = mean.mean(0)
    spread = (var + (mean - together).square_()).mean(0)
    samples = len(x) // groups
    return Moments(together, spread, samples * x.shape[2:].numel(), samples)


def normalize_interleaved(
    x: Tensor, weight: Tensor, bias: Tensor, plan: Plan, eps: float, way_back: WayBack | None
) -> Tensor:
    """`core.normalize` of each sample by its group's part of the plan `(K, C)`; weight and bias are `(C,)`."""
    mean, var, share, correction = plan
    if share is None:
        share = torch.full_like(mean, mean.numel() / x.numel())
    y: Tensor = _Interleaved.apply(  # type: ignore[no-untyped-call]
        x, weight, bias, mean, var, share, *(correction or (None, None)), eps, way_back
    )
    return y


def regrouped(x: Tensor, groups: int) -> Tensor:
    """A copy of `x`, in channels last, in which each group's channels are channels, `(values, K * C)`."""
    return _rows(x, groups).transpose(1, 2).reshape(-1, groups * x.size(1))


class _Interleaved(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        var: Tensor,
        share: Tensor,
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
        sums = _stacked([channel_sums(*pair) for pair in pairs], len(mean))
        dweight, dbias = (values.sum(0) for values in sums)
        slope, shift = through_statistics(scale, invstd, share, dweight, dbias, ctx.way_back)
        dx = _line(x, slope, torch.addcmul(shift, mean, slope, value=-1))
        if dx.dtype == scale.dtype:
            _rows(dx, len(scale)).addcmul_(_rows(dy, len(scale)), scale[:, None])
        else:
            dx += _line(dy, scale, torch.zeros_like(scale))
        return dx, *uncorrected(dweight, dbias, r, d), *[None] * 7


def _rows(x: Tensor, groups: int) -> Tensor:
    """`x` as it lies in memory, `(N / K, K, positions, C)`."""
    return x.movedim(1, -1).reshape(len(x) // groups, groups, -1, x.size(1))


def _samples(x: Tensor) -> tuple[Tensor, ...]:
    """Each sample as it lies in memory, `(positions, C)`."""
    return _rows(x, 1).flatten(0, 1).unbind()


def _stacked(values: list[tuple[Tensor, Tensor]], groups: int) -> list[Tensor]:
    """Both of each sample's values, `(C,)`, as `(N / K, K, C)`."""
    return [torch.stack(each).view(-1, groups, len(each[0])) for each in zip(*values, strict=True)]


def _line(x: Tensor, slope: Tensor, shift: Tensor) -> Tensor:
    """`x * slope + shift`, by the `(K, C)` of the sample's group."""
    y = torch.empty_like(x)
    if x.dtype == slope.dtype:
        torch.addcmul(shift[:, None], _rows(x, len(slope)), slope[:, None], out=_rows(y, len(slope)))
        return y
    zeros, ones, unused = torch.zeros_like(slope[0]), torch.ones_like(slope[0]), slope.new_empty(0)
    for sample, weight, bias, to in zip(_samples(x), cycle(slope), cycle(shift), _samples(y), strict=False):
        results = (to, unused, unused)
        torch.native_batch_norm(sample, weight, bias, zeros, ones, False, 0.0, 0.0, out=results)
    return y
