"""Virtual batches: arrange a batch, valid or padded, in groups that have statistics of their own."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bnlight.norm.core import Moments, Plan, WayBack, memory_layout, moments, normalize


class VirtualBatches:
    """Sample n of `x`, `(N, C)` or `(N, C, *)`, belongs to group n mod K; per-channel tensors are `(K, C)`,
    or `(C,)` for K = 1.

    Each group's channels become channels of their own. In a contiguous `x` that is a view with K*C channels;
    in channels last the groups lie between samples and channels, so every group is copied to `(values, C)`.
    Groups that are one sample short are padded: `valid` says which values count, None that all do.
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
        self.pieces = self._split(x)

    def moments(self) -> Moments:
        """Mean, biased variance and number of values of each group's channels; call it without gradients."""
        if self.valid is None and self.groups == 1:
            return moments(self.pieces[0])
        if self.valid is None:
            parts = [moments(piece) for piece in self.pieces]
        else:
            valid = self._split(self.valid.expand(self.shape))
            parts = [moments(piece, where) for piece, where in zip(self.pieces, valid, strict=True)]
        if self.groups == 1:
            return parts[0]
        means, variances, numbers, _ = zip(*parts, strict=True)
        if self.valid is None:
            return Moments(
                self._stack(means), self._stack(variances), numbers[0], self.samples // self.groups
            )
        samples = self.valid.flatten(1).any(1).view(-1, self.groups).sum(0)
        return Moments(self._stack(means), self._stack(variances), self._stack(numbers), samples.view(-1, 1))

    def normalize(
        self, weight: Tensor, bias: Tensor, plan: Plan, eps: float, way_back: WayBack | None
    ) -> Tensor:
        """`core.normalize` in each group, with weight and bias `(C,)`, in the order and layout of the batch."""
        if self.groups == 1:
            return normalize(self.pieces[0], weight, bias, plan, eps, way_back)
        weights, biases = (self._unstack(values.expand_as(plan.mean)) for values in (weight, bias))
        results = [
            normalize(piece, w, b, part, eps, way_back)
            for piece, w, b, part in zip(self.pieces, weights, biases, self._plans(plan), strict=True)
        ]
        y = self._join(results)
        return y if len(y) == self.samples else y[: self.samples]

    def _plans(self, plan: Plan) -> list[Plan]:
        """The plan of each piece."""
        parts = [
            [None] * len(self.pieces) if values is None else self._unstack(values)
            for values in (plan.mean, plan.var, plan.share, *(plan.correction or (None, None)))
        ]
        return [
            Plan(mean, var, share, None if r is None else (r, d))
            for mean, var, share, r, d in zip(*parts, strict=True)
        ]

    def _stack(self, values: tuple[Tensor, ...]) -> Tensor:
        if self.groups == 1:
            return values[0]
        return values[0].view(self.groups, -1) if len(values) == 1 else torch.stack(values)

    def _unstack(self, values: Tensor) -> Sequence[Tensor]:
        return [values.flatten()] if len(self.pieces) == 1 else values.unbind()

    def _split(self, x: Tensor) -> list[Tensor]:
        n, c = self.shape[:2]
        if self.groups == 1:
            return [x]
        if self.is_contiguous:
            return [x.reshape(n // self.groups, self.groups * c, *self.shape[2:])]
        rows = x.movedim(1, -1).reshape(n // self.groups, self.groups, -1, c)
        return [group.reshape(-1, c) for group in rows.unbind(1)]

    def _join(self, pieces: list[Tensor]) -> Tensor:
        n, c = self.shape[:2]
        if self.groups == 1:
            return pieces[0]
        if self.is_contiguous:
            return pieces[0].reshape(self.shape)
        rows = torch.stack([piece.view(n // self.groups, -1, c) for piece in pieces], dim=1)
        return rows.view(n, *self.shape[2:], c).movedim(-1, 1)
