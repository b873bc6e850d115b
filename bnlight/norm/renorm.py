"""Batch renormalization."""

from typing import ClassVar

import torch
from torch import Tensor

from bnlight.norm.base import Device
from bnlight.norm.batch import BatchStatistics, SmallBatch
from bnlight.norm.core import Moments, statistics_dtype


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
        virtual_batch_size, small_batch: as in `BatchNorm`; each group has its own r and d.
        r_max: bound of the correction of scale, at least 1.
        d_max: bound of the correction of shift, in running standard deviations, at least 0.

    Source: Ioffe 2017 (arXiv 1702.03275), algorithm 1 and section 3.

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
        eps: float = 1e-5,
        momentum: float | None = 0.01,
        affine: bool = True,
        bias: bool = True,
        virtual_batch_size: int | None = None,
        small_batch: SmallBatch = "error",
        r_max: float = 3.0,
        d_max: float = 5.0,
        channel_dim: int = 1,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features,
            eps=eps,
            momentum=momentum,
            affine=affine,
            bias=bias,
            virtual_batch_size=virtual_batch_size,
            small_batch=small_batch,
            channel_dim=channel_dim,
            device=device,
            dtype=dtype,
        )
        if r_max < 1 or d_max < 0:
            raise ValueError(
                f"BatchRenorm: expected r_max >= 1 and d_max >= 0, got r_max={r_max}, d_max={d_max}"
            )
        kind = statistics_dtype(dtype or torch.get_default_dtype())
        self.register_buffer("r_max", torch.tensor(r_max, device=device, dtype=kind))
        self.register_buffer("d_max", torch.tensor(d_max, device=device, dtype=kind))

    def step(self, batch: Moments, used: Tensor | None) -> tuple[Tensor, Tensor]:
        running_mean, running_var = self.running_mean, self.running_var
        assert running_mean is not None
        assert running_var is not None
        r_max, d_max = self.r_max, self.d_max
        mean, var = self.running_statistics(batch.mean)
        batch_std, std = (batch.var + self.eps).sqrt_(), (var + self.eps).sqrt_()
        r = (batch_std / std).clamp_(r_max.reciprocal(), r_max)
        d = (batch.mean - mean).div_(std).clamp_(-d_max, d_max)
        if self.training:
            self.follow(running_mean, batch.mean, used)
            self.follow(std, batch_std, used)
            running_var.copy_((std * std).sub_(self.eps).clamp_(min=0))
        return r, d
