"""Virtual batches: arrange a batch, valid or padded, in groups that have statistics of their own."""

import torch
import torch.nn.functional as F
from torch import Tensor

from bnlight.norm.core import Moments, Plan, WayBack, memory_layout, moments, normalize
from bnlight.norm.interleaved import in_place, interleaved_moments, normalize_interleaved, regrouped


class VirtualBatches:
    """Sample n of `x`, `(N, C)` or `(N, C, *)`, belongs to group n mod K; per-channel tensors are `(K, C)`,
    or `(C,)` for K = 1.

    In a contiguous `x` each group's channels are seen as channels of their own. In channels last the groups lie
    between samples and channels, so the batch is copied to `(values, K * C)` or, where that is faster, taken as
    it lies. Groups that are one sample short are padded: `valid` says which values count, None that all do.
    """

    def __init__(self, x: Tensor, valid: Tensor | None, groups: int) -> None:
        self.samples, self.groups = x.size(0), groups
        if (short := -self.samples % groups) > 0:
            if valid is None:
                valid = torch.ones(self.samples, *[1] * (x.dim() - 1), dtype=torch.bool, device=x.device)
            pad = [0, 0] * (x.dim() - 1) + [0, short]
            x, valid = F.pad(x, pad), F.pad(valid, pad)
        x = x if memory_layout(x) else x.contiguous()  # torch's kernels crawl over other strides
        self.valid, self.shape, self.is_contiguous = valid, x.shape, x.is_contiguous()
        self.in_place = groups > 1 and not self.is_contiguous and valid is None and in_place(x)
        # A contiguous x is regrouped where that is a view, in the function that normalizes.
        self.rows = x if groups == 1 or self.in_place or self.is_contiguous else self._split(x)

    def moments(self) -> Moments:
        """Mean, biased variance and number of values of each group's channels; call it without gradients."""
        if self.in_place:
            return interleaved_moments(self.rows, self.groups)
        if self.groups == 1:
            return moments(self.rows, None if self.valid is None else self.valid.expand(self.shape))
        rows = self._split(self.rows) if self.is_contiguous else self.rows
        samples: Tensor | int = self.samples // self.groups
        if self.valid is None:
            mean, var, number, _ = moments(rows)
        else:
            mean, var, number, _ = moments(rows, self._split(self.valid.expand(self.shape)))
            samples = self.valid.flatten(1).any(1).view(-1, self.groups).sum(0).view(-1, 1)
        number = number if isinstance(number, int) else number.view(self.groups, -1)
        return Moments(mean.view(self.groups, -1), var.view(self.groups, -1), number, samples)

    def normalize(
        self, weight: Tensor, bias: Tensor, plan: Plan, eps: float, way_back: WayBack | None
    ) -> Tensor:
        """`core.normalize` in each group, with weight and bias `(C,)`, in the order and layout of the batch."""
        if self.in_place:
            return normalize_interleaved(self.rows, weight, bias, plan, eps, way_back)
        y = normalize(self.rows, weight, bias, plan, eps, way_back)
        if y.shape != self.shape:
            n, c = self.shape[:2]
            y = y.view(n // self.groups, -1, self.groups, c).transpose(1, 2)
            y = y.reshape(n, *self.shape[2:], c).movedim(-1, 1)
        return y if y.size(0) == self.samples else y[: self.samples]

    def _split(self, x: Tensor) -> Tensor:
        if self.is_contiguous:
            return x.reshape(len(x) // self.groups, self.groups * x.size(1), *x.shape[2:])
        return regrouped(x, self.groups)
