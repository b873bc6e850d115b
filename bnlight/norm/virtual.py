"""Virtual batches: arrange a batch, valid or padded, in groups that have statistics of their own."""

import torch
import torch.nn.functional as F
from torch import Tensor

from bnlight.norm.core import Moments, Plan, WayBack, can_read_values, moments, normalize
from bnlight.norm.interleaved import moments_by_sample, normalize_by_sample, worth_it
from bnlight.norm.layout import memory_layout


class VirtualBatches:
    """Sample n of `x`, `(N, C)` or `(N, C, *)`, belongs to group n mod K; per-channel tensors are `(K, C)`,
    or `(C,)` for K = 1.

    Each group's channels become channels of their own: a view of a contiguous `x`, a copy of one in channels last.
    Groups that are one sample short are padded: `valid` says which values count, None that all do.
    """

    def __init__(self, x: Tensor, valid: Tensor | None, groups: int) -> None:
        self.samples, self.groups, self.layout = x.size(0), groups, memory_layout(x)
        if (short := -self.samples % groups) > 0:
            if valid is None:
                valid = torch.ones(self.samples, *[1] * (x.dim() - 1), dtype=torch.bool, device=x.device)
            pad = [0, 0] * (x.dim() - 1) + [0, short]
            x, valid = F.pad(x, pad), F.pad(valid, pad)
        if self.layout is None or (groups > 1 and not can_read_values()):
            x = x.contiguous()  # torch's kernels crawl over other strides
        self.x, self.valid = x, None if valid is None else valid.expand(x.shape)
        self.by_sample = groups > 1 and valid is None and not x.is_contiguous() and worth_it(x)
        self.apart = x if groups == 1 or self.by_sample else _apart(x, groups, x.is_contiguous())

    def moments(self) -> Moments:
        """Mean, biased variance and number of values of each group's channels; not differentiable."""
        x, valid, groups = self.apart.detach(), self.valid, self.groups
        if groups == 1:
            return moments(x, valid)
        if self.by_sample:
            return moments_by_sample(x, groups)
        where = None if valid is None else _apart(valid, groups, self.x.is_contiguous())
        mean, var, number, _ = moments(x, where)
        samples: Tensor | int = self.samples // groups
        if valid is not None:
            samples = valid.flatten(1).any(1).view(-1, groups).sum(0).view(-1, 1)
        number = number if isinstance(number, int) else number.view(groups, -1)
        return Moments(mean.view(groups, -1), var.view(groups, -1), number, samples)

    def normalize(
        self, weight: Tensor, bias: Tensor, plan: Plan, eps: float, way_back: WayBack | None
    ) -> Tensor:
        """`core.normalize` in each group, with weight and bias `(C,)`, in the order and layout of the batch."""
        if self.by_sample:
            return normalize_by_sample(self.x, weight, bias, plan, eps, way_back)
        y = normalize(self.apart, weight, bias, plan, eps, way_back)
        if self.groups > 1:
            y = _together(y, self.x, self.groups)
            y = y if self.layout is None else y.contiguous(memory_format=self.layout)
        return y if y.size(0) == self.samples else y[: self.samples]


def _apart(x: Tensor, groups: int, contiguous: bool) -> Tensor:
    """`x` with each group's channels as channels of their own; `(values, K * C)` if it is in channels last."""
    if contiguous:
        return x.reshape(-1, groups * x.size(1), *x.shape[2:])
    rows = x.movedim(1, -1).reshape(-1, groups, x[0, 0].numel(), x.size(1))
    return rows.transpose(1, 2).reshape(-1, groups * x.size(1))


def _together(y: Tensor, like: Tensor, groups: int) -> Tensor:
    """What `_apart` made of a tensor like this one, as it was."""
    if like.is_contiguous():
        return y.reshape(like.shape)
    samples, channels, *space = like.shape
    rows = y.view(samples // groups, -1, groups, channels).transpose(1, 2)
    return rows.reshape(samples, *space, channels).movedim(-1, 1)
