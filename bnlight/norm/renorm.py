"""Batch renormalization."""

from typing import Any, ClassVar, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from bnlight.norm.base import new_statistic
from bnlight.norm.batch import Batch, BatchStatistics
from bnlight.norm.core import Moments, Plan, converted, follow

_STATE = ("r_max", "d_max", "running_mean", "running_var")


class BatchRenorm(BatchStatistics):
    """Batch renormalization: batch norm, corrected so that training computes what evaluation will.

    `y = ((x - mean) / std * r + d) * weight + bias`, where `std = sqrt(var + eps)` and no gradient flows
    through `r = clip(std / running_std, 1 / r_max, r_max)` and `d = clip((mean - running_mean) / running_std,
    -d_max, d_max)`

    Training takes r and d from the running averages, then moves those towards the batch's mean and std:
    `running_var` is `running_std**2 - eps`. Evaluation is `(x - running_mean) / running_std * weight + bias`;
    unclipped training gives these values too. See `Norm` for shapes, masks and their errors.

    The paper trains its first 5000 steps with `r_max=1, d_max=0`, which is batch norm, and then relaxes both.
    The live bounds are the buffers `r_max` and `d_max`: change them with `fill_`, and a checkpoint keeps
    them.

    Args:
        num_features: number of channels C.
        momentum: weight of the new batch in the running averages; None makes them plain averages of all
            batches.
        virtual_batch_size, small_batch, jitter: as in `BatchNorm`; each group has its own r and d.
        r_max: bound of the correction of scale, at least 1.
        r_min: lower bound of the correction of scale; None means `1 / r_max`, as the paper, whatever `r_max` is
            now. Keras has a bound of its own.
        d_max: bound of the correction of shift, in running standard deviations, at least 0.

    Source: Ioffe 2017 (arXiv 1702.03275), algorithm 1 and section 3.

    >>> import torch
    >>> layer, x = BatchRenorm(1), torch.tensor([[1.0], [3.0]])
    >>> layer(x).detach().round(decimals=2).flatten()  # inside the bounds: by the running mean 0 and std 1
    tensor([1., 3.])
    >>> layer.r_max.fill_(1), layer.d_max.fill_(0)
    (tensor(1.), tensor(0.))
    >>> layer(x).detach().round(decimals=2).flatten()
    tensor([-1.,  1.])
    """

    not_in_torch: ClassVar[tuple[str, ...]] = ("r_max", "d_max")

    r_max: Tensor
    d_max: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        momentum: float | None = 0.01,
        r_max: float = 3.0,
        d_max: float = 5.0,
        r_min: float | None = None,
        jitter: tuple[float, float] | None = None,
        **options: Unpack[Batch],
    ) -> None:
        super().__init__(num_features, momentum=momentum, jitter=jitter, **options)
        if r_max < 1 or d_max < 0:
            raise ValueError(
                f"BatchRenorm: expected r_max >= 1 and d_max >= 0, got r_max={r_max}, d_max={d_max}"
            )
        if r_min is not None and not 0 <= r_min <= 1:
            raise ValueError(f"BatchRenorm: r_min must be in [0, 1] or None (1 / r_max), got {r_min}")
        self.r_min = r_min
        self.first_bounds = r_max, d_max
        self.register_buffer("r_max", new_statistic(r_max, (), options))
        self.register_buffer("d_max", new_statistic(d_max, (), options))

    def reset_parameters(self) -> None:
        """Set weight, bias and the live bounds to their initial values, and forget all batches."""
        super().reset_parameters()
        if "d_max" in self._buffers:
            self.r_max.fill_(self.first_bounds[0])
            self.d_max.fill_(self.first_bounds[1])

    def step(self, batch: Moments, used: Tensor | None) -> Plan:
        state: dict[str, Any] = self._buffers
        r_max, d_max, running_mean, running_var = (state[name] for name in _STATE)
        kind, eps = batch.mean.dtype, self.eps
        mean, var = self.running_statistics(running_mean)
        std, running_std = (batch.var + eps).sqrt_(), (var + eps).sqrt_()
        r_min = r_max.reciprocal() if self.r_min is None else torch.full_like(r_max, self.r_min)
        r = converted((std / running_std).clamp(r_min, r_max), kind)
        d = converted((batch.mean - mean).div_(running_std).clamp(-d_max, d_max), kind)
        if self.follows(batch, used) and (step := self.target(batch, std, used)) is not None:
            mean, std, rate = step
            follow(running_mean, mean, rate)
            follow(running_std, std, rate)
            running_var.copy_(F.softshrink(running_std * running_std, eps))  # less eps, and not below 0
        return Plan(batch.mean, batch.var, correction=(r, d))
