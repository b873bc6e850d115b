"""Statistics of each channel of each sample, as the parts of which other statistics are made."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bnlight.norm.arrange import affine, by_channel, mean_var
from bnlight.norm.core import Moments, Plan, WayBack, statistics_dtype
from bnlight.norm.first_order import first_order


class InstanceMoments:
    """Mean and biased variance of each channel of each sample of `x`, `(N, C)`, differentiable.

    `number`, `(N, 1)`, is how many positions of a sample are valid. Sample n belongs to virtual batch n mod K.
    """

    def __init__(self, x: Tensor, valid: Tensor | None) -> None:
        self.x, self.valid = x, valid
        kind = statistics_dtype(x.dtype)
        if x.numel() == 0:
            # Of no value, but part of the graph: ranks without samples take part in the backward too.
            self.mean = self.var = (x.sum([*range(2, x.dim())]) if x.dim() > 2 else x).to(kind)
        else:
            rows = x.reshape(1, x.size(0) * x.size(1), -1)
            where = None if valid is None else valid.expand_as(x).reshape(rows.shape)
            self.mean, self.var = (values.view(x.shape[:2]) for values in mean_var(rows, where))
        self.positions = math.prod(x.shape[2:])
        if valid is None:
            self.number = torch.full((x.size(0), 1), self.positions, dtype=kind, device=x.device)
        else:
            self.number = valid.flatten(1).sum(1, keepdim=True).to(kind)

    def normalize(self, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """`(x - mean) / sqrt(var + eps) * weight + bias`, mean and var `(N, C)`, in x's layout and dtype."""
        slope = weight * (var + eps).rsqrt()
        shift = bias - mean * slope
        if self.x.numel() == 0:
            shape = [*slope.shape, *[1] * (self.x.dim() - 2)]
            return (self.x * slope.view(shape) + shift.view(shape)).to(self.x.dtype)
        return by_channel(affine, self.x, slope, shift.expand_as(slope))

    def merged(self, groups: int) -> Moments:
        """The moments of the K virtual batches, `(K, C)`, or `(C,)` for K = 1; not differentiable."""
        number, means, variances = _sums(self.number, groups), self.mean.detach(), self.var.detach()
        mean = _sums(self.number * means, groups) / number.clamp(min=1)
        between = (means - mean[self._group(groups)]).square()
        var = _sums(self.number * (variances + between), groups) / number.clamp(min=1)
        number_each: Tensor | int = number.expand_as(mean)
        samples: Tensor | int = _sums((self.number > 0).to(number.dtype), groups)
        if self.valid is None and self.x.size(0) % groups == 0:
            samples = self.x.size(0) // groups
            number_each = samples * self.positions
        if groups == 1:
            mean, var = mean[0], var[0]
            number_each = number_each[0] if isinstance(number_each, Tensor) else number_each
        return Moments(mean, var, number_each, samples)

    def of_batch(self, plan: Plan, groups: int, way_back: WayBack | None) -> tuple[Tensor, Tensor]:
        """The plan's mean and variance of each sample's virtual batch, `(N, C)` or `(C,)`, differentiable."""
        share = plan.share
        if share is None:
            share = torch.full_like(plan.mean, groups / (self.x.size(0) * self.positions))
        parts = _OfBatch.apply(  # type: ignore[no-untyped-call]
            self.mean, self.var, self.number, plan.mean, plan.var, share, self._group(groups), way_back
        )
        mean, var = parts if groups == 1 else (values[self._group(groups)] for values in parts)
        return mean, var

    def _group(self, groups: int) -> Tensor:
        return torch.arange(self.x.size(0), device=self.x.device) % groups


def _sums(values: Tensor, groups: int) -> Tensor:
    """The sums of `(N, C)` over each virtual batch, `(K, C)`."""
    rows = F.pad(values, [0, 0, 0, -values.size(0) % groups])
    return rows.view(rows.size(0) // groups, groups, rows.size(1)).sum(0)


class _OfBatch(torch.autograd.Function):
    """The statistics of the batches, as functions of those of their samples."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        mean: Tensor,
        var: Tensor,
        number: Tensor,
        batch_mean: Tensor,
        batch_var: Tensor,
        share: Tensor,
        group: Tensor,
        way_back: WayBack | None,
    ) -> tuple[Tensor, Tensor]:
        return batch_mean.clone(), batch_var.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        mean, _, number, batch_mean, _, share, group, ctx.way_back = inputs
        weight = number * _of_samples(share.expand_as(batch_mean), group)
        ctx.save_for_backward(mean - _of_samples(batch_mean, group), weight, group)

    @staticmethod
    @first_order
    def backward(ctx: Any, dmean: Tensor, dvar: Tensor) -> tuple[Tensor | None, ...]:
        deviation, weight, group = ctx.saved_tensors
        if ctx.way_back is not None:
            dmean, dvar = ctx.way_back(dmean, dvar)
        dmean, dvar = _of_samples(dmean, group), _of_samples(dvar, group)
        return weight * (dmean + 2 * deviation * dvar), weight * dvar, *[None] * 6


def _of_samples(values: Tensor, group: Tensor) -> Tensor:
    """The `(K, C)` or `(C,)` values of each sample's group, `(N, C)`."""
    return values.view(-1, values.size(-1))[group]
