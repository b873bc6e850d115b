"""Batch normalization."""

from typing import Unpack

import torch
from torch import Tensor

from bnlight.norm.averages import reads_values
from bnlight.norm.batch import Batch, BatchStatistics
from bnlight.norm.core import can_read_values, statistics_dtype
from bnlight.norm.layout import batch_norm
from bnlight.norm.recompute import recomputing


class BatchNorm(BatchStatistics):
    """Batch normalization: each channel by the mean and variance of the batch.

    `y = (x - mean) / sqrt(var + eps) * weight + bias`

    Training uses the batch's mean and biased variance, and moves the running averages towards its mean and
    unbiased variance. Evaluation uses the running averages, or the batch with `track_running_stats=False`.
    Without a mask and virtual batches this is torch's own kernel. See `Norm` for shapes, masks and their
    errors.

    Args:
        num_features: number of channels C.
        momentum: weight of the new batch in the running averages; None makes them plain averages of all
            batches.
        track_running_stats: False keeps no running averages; evaluation then uses the batch too.
        virtual_batch_size: normalize `K = max(1, N // virtual_batch_size)` groups separately ("ghost
            batches"). Sample n belongs to group n mod K. The running averages move once, towards the groups'
            mean.
        small_batch: what a group with one value per channel does in training. "error" raises ValueError,
            "running" normalizes it by the running averages and leaves those as they are. No values at all are
            no error, and leave the averages as they are.
        jitter: `(scale, shift)`: in training, multiply each normalized channel by a random number from
            `1 - scale` to `1 + scale` and add one from `-shift` to `shift`, the same for all values of a
            (virtual) batch; Keras calls it `adjustment`. None leaves them.

    Source: Ioffe and Szegedy 2015 (arXiv 1502.03167), algorithms 1 and 2; virtual batches: Hoffer et al. 2017
    (arXiv 1705.08741), algorithm 1.

    >>> import torch
    >>> layer = BatchNorm(3)
    >>> layer(torch.tensor([[1.0, 2.0, 3.0], [3.0, 6.0, 9.0]])).detach().round(decimals=2)
    tensor([[-1., -1., -1.],
            [ 1.,  1.,  1.]])
    >>> layer.running_mean
    tensor([0.2000, 0.4000, 0.6000])
    """

    def __init__(
        self,
        num_features: int,
        *,
        momentum: float | None = 0.1,
        track_running_stats: bool = True,
        jitter: tuple[float, float] | None = None,
        **options: Unpack[Batch],
    ) -> None:
        super().__init__(num_features, momentum=momentum, jitter=jitter, **options)
        self.track_running_stats = track_running_stats
        if not track_running_stats:
            if self.small_batch == "running":
                raise ValueError("BatchNorm: small_batch='running' needs track_running_stats=True")
            self.running_mean = self.running_var = self.num_batches_tracked = None

    def by_batch_statistics(self, x: Tensor, valid: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
        state = self._buffers if self.training else {}
        mean, var = state.get("running_mean"), state.get("running_var")
        if (
            valid is not None
            or self._groups(x)[0] > 1
            or self.observer is not None
            or (self.counts_batches() and (x.device.type != "cpu" or not can_read_values()))
            or (self.jitter is not None and self.training)
            or self.ranks() > 1
            or (mean is not None and mean.dtype != statistics_dtype(x.dtype))
        ):
            return super().by_batch_statistics(x, valid, weight, bias)
        again = recomputing()
        if not again:
            self._count_batch(1)
        before = None
        if mean is not None and var is not None:
            if not again and reads_values(mean):
                before = torch.cat((mean, var))
            else:  # checkpointing wants the same tensors saved, and a backward the version it has seen
                mean, var = mean.clone(), var.clone()
        rate = float(self.rate())
        y = batch_norm(x, weight, bias, mean, var, True, rate, self.eps, torch.backends.cudnn.enabled)
        if mean is not None and var is not None and not again:
            self.stay_finite(mean, var, before)
        return y
