"""Ways to look at `x` in which what one sample normalizes together is a channel of a batch.

torch's batch norm is the one kernel that is fast in every layout and keeps float32 statistics for half-precision
input. A channel of a sample, a position of a sample or a whole sample becomes a channel of its own; all
functions are differentiable any number of times.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bnlight.norm.core import (
    can_read_values,
    converted,
    moments,
    per_channel,
    statistics_dtype,
)
from bnlight.norm.layout import batch_norm, keep_layout, memory_layout

LARGE = 2**14
"""Values in a sample from which on a call of its own costs less than the copies that avoid it."""

OnRows = Callable[..., Tensor]
"""Computes `(B, R, *)` from `(B, R, *)`, and from vectors `(R,)`, for each row r by itself."""


def one_by_one(x: Tensor) -> bool:
    """Whether to take the samples one after another: on CPU, outside of a compiled graph, if they are large."""
    return (
        can_read_values()  # first: a graph that has asked for sizes holds for those only
        and x.device.type == "cpu"
        and x.dim() > 2
        and 0 < x.size(0) * LARGE <= x.numel()
    )


def in_channels_last(x: Tensor) -> bool:
    """Whether the channels, and not the positions, lie side by side in memory."""
    return memory_layout(x) in (torch.channels_last, torch.channels_last_3d)


def by_channel(function: OnRows, x: Tensor, *vectors: Tensor) -> Tensor:
    """`function` with each channel of each sample as a row; `vectors` are `(N, C)`."""
    if one_by_one(x) and in_channels_last(x):
        # A single sample is such a batch as it lies in memory, the whole is not.
        samples = zip(*(torch.split(tensor, 1) for tensor in (x, *vectors)), strict=True)
        y = torch.cat([function(sample, *(row.flatten() for row in rows)) for sample, *rows in samples])
    else:
        values = x.reshape(1, x.size(0) * x.size(1), -1)
        y = function(values, *(rows.flatten() for rows in vectors)).view(x.shape)
    return keep_layout(y, x)


def by_position(function: OnRows, x: Tensor) -> Tensor:
    """`function` with each position of each sample, over its channels, as a row."""
    if one_by_one(x) and x.is_contiguous():
        # A sample (C, positions) is a batch of C whose channels are the positions.
        return torch.stack([function(sample) for sample in x.flatten(2).unbind()]).view(x.shape)
    last = x.movedim(1, -1)
    y = function(last.reshape(1, -1, x.size(1))).view(last.shape)
    return keep_layout(y.movedim(-1, 1), x)


def by_sample(function: OnRows, x: Tensor, *vectors: Tensor) -> Tensor:
    """`function` with each sample as a row; `vectors` are `(N,)`."""
    ordered = x if x.is_contiguous() else x.movedim(1, -1)
    y = function(ordered.reshape(1, x.size(0), -1), *vectors).view(ordered.shape)
    return keep_layout(y if ordered is x else y.movedim(-1, 1), x)


def affine(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x * weight + bias` per channel, in x's dtype and layout: one pass forward, one call backward."""
    mean, var = torch.zeros_like(weight), torch.ones_like(weight)
    return batch_norm(x, weight, bias, mean, var, False, 0.0, 0.0, False)


def standardized(x: Tensor, eps: float, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """`(x - mean) / sqrt(var + eps) * weight + bias` per channel, by its mean and biased variance."""
    if weight is None:  # the kernel keeps its statistics in the weight's dtype
        weight = torch.ones(x.size(1), dtype=statistics_dtype(x.dtype), device=x.device)
    return batch_norm(x, weight, bias, None, None, True, 0.0, eps, False)


def mean_var(x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, in the statistics' dtype, for formulas made of them.

    Only values where `valid`, of x's shape, is True count; elsewhere `x` is zero, and its gradient wrong.
    """
    if not can_read_values():
        return _mean_var(x, valid)
    mean, var = _MeanVar.apply(x, valid)  # type: ignore[no-untyped-call]
    return mean, var


def _mean_var(x: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """`mean_var` in operations that compilers fuse, exporters know and `torch.func` transforms."""
    x, axes = converted(x, statistics_dtype(x.dtype)), [0, *range(2, x.dim())]
    if valid is None:
        var, mean = torch.var_mean(x, axes, correction=0)
        return mean, var
    number = valid.sum(axes, dtype=x.dtype).clamp(min=1)
    mean = x.sum(axes) / number
    return mean, torch.where(valid, x - per_channel(mean, x), 0).square().sum(axes) / number


class _MeanVar(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        mean, var, number, _ = moments(x, valid)
        ctx.number = number if isinstance(number, int) else number.clamp(min=1)
        ctx.save_for_backward(x, mean)
        return mean, var

    @staticmethod
    def backward(ctx: Any, dmean: Tensor, dvar: Tensor) -> tuple[Tensor, None]:
        x, mean = ctx.saved_tensors
        # (dmean + 2 * (x - mean) * dvar) / number, one pass.
        slope = 2 * dvar / ctx.number
        return affine(x, slope, dmean / ctx.number - slope * mean), None
