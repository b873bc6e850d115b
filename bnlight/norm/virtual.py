"""Virtual batches: arrange a batch, valid or padded, in groups that have statistics of their own."""

import torch
import torch.nn.functional as F
from torch import Tensor

from bnlight.norm.core import Moments, Plan, WayBack, can_read_values, memory_layout, moments, normalize
from bnlight.norm.interleaved import interleaved_moments, normalize_interleaved


class VirtualBatches:
    """Sample n of `x`, `(N, C)` or `(N, C, *)`, belongs to group n mod K; per-channel tensors are `(K, C)`,
    or `(C,)` for K = 1.

    In a contiguous `x` each group's channels are seen as channels of their own. In channels last the groups lie
    between samples and channels, and are taken there. Groups that are one sample short are padded: `valid` says
    which values count, None that all do.
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
        self.interleaved = groups > 1 and not x.is_contiguous()

    def moments(self) -> Moments:
        """Mean, biased variance and number of values of each group's channels; call it without gradients."""
        x, valid, groups = self.x, self.valid, self.groups
        if groups == 1:
            return moments(x, valid)
        if self.interleaved:
            return interleaved_moments(x, valid, groups)
        shape = (x.size(0) // groups, groups * x.size(1), *x.shape[2:])
        mean, var, number, _ = moments(x.reshape(shape), None if valid is None else valid.reshape(shape))
        samples: Tensor | int = self.samples // groups
        if valid is not None:
            samples = valid.flatten(1).any(1).view(-1, groups).sum(0).view(-1, 1)
        number = number if isinstance(number, int) else number.view(groups, -1)
        return Moments(mean.view(groups, -1), var.view(groups, -1), number, samples)

    def normalize(
        self, weight: Tensor, bias: Tensor, plan: Plan, eps: float, way_back: WayBack | None
    ) -> Tensor:
        """`core.normalize` in each group, with weight and bias `(C,)`, in the order and layout of the batch."""
        function = normalize_interleaved if self.interleaved else normalize
        y = function(self.x, weight, bias, plan, eps, way_back)
        if self.groups > 1 and self.layout is not None:
            y = y.contiguous(memory_format=self.layout)
        return y if y.size(0) == self.samples else y[: self.samples]
