"""Full normalization: the statistics of the data set, in the gradient too."""

from functools import partial
from typing import ClassVar, Unpack

import torch
from torch import Tensor

from bnlight.norm.averages import finite
from bnlight.norm.base import Shared, new_statistic
from bnlight.norm.batch import BatchStatistics
from bnlight.norm.core import Moments, Plan, WayBack, converted, follow, snapshot, transforming


class FullNorm(BatchStatistics):
    """Full normalization: batch norm whose loss does not depend on how the data are cut into batches.

    `y = (x - running_mean) / sqrt(running_var + eps) * weight + bias`

    in training as in evaluation. Training first moves the running mean and the (biased) variance about it
    towards those of the data, then normalizes by them. Backward it does the same with the loss's gradients with
    respect to both, `mean_grad` and `var_grad`, and each of the batch's m values receives

    `dx = dy * weight / sqrt(running_var + eps) + (mean_grad + 2 * (x - running_mean) * var_grad) / m`

    With averages that have converged, this is on average the gradient of the loss that normalizes by the whole
    data set's statistics, whatever the batches: of one class, or of one sample. Batch norm's is not. See `Norm`
    for shapes, masks and their errors. A batch of one value per channel is legal. Virtual batches would change
    nothing, so there is no such argument.

    The averages must follow the weights: with 0.05 and a large learning rate training can diverge, where 0.1
    does not. They take the loss to be a mean over the batch, so that its gradients do not grow with it. A loss that is
    multiplied by a number, as gradient scaling does, has averages that are multiplied too, and lag behind when
    it changes; gradients that are not finite, or of a batch that is not, leave them alone. Synchronized, they are
    of the sum of the ranks' losses.

    Args:
        num_features: number of channels C.
        momentum: weight of the new batch in the four averages; 0 leaves them as they are, None makes them plain
            averages of all batches.

    Source: Lian and Liu 2019 (PMLR 89:3254, arXiv 1810.06177) for the objective, a compositional one; the
    averages are the standard method for such, derived here, since there is no public code.

    >>> import torch
    >>> layer = FullNorm(1, momentum=0.5)
    >>> layer(torch.tensor([[2.0]])).detach().round(decimals=2)  # one sample: by mean 1 and variance 1.5
    tensor([[0.8200]])
    """

    cancels_bias: ClassVar[bool] = False  # only once the averages have converged
    not_in_torch: ClassVar[tuple[str, ...]] = ("mean_grad", "var_grad")
    too_few: ClassVar[int] = 0

    mean_grad: Tensor
    var_grad: Tensor

    def __init__(self, num_features: int, *, momentum: float | None = 0.1, **shared: Unpack[Shared]) -> None:
        super().__init__(num_features, momentum=momentum, small_batch="running", **shared)
        self.register_buffer("mean_grad", new_statistic(0, (num_features,), shared))
        self.register_buffer("var_grad", new_statistic(0, (num_features,), shared))

    def reset_running_stats(self) -> None:
        """Set the running mean to 0, the variance to 1, their gradients and the number of batches to 0."""
        super().reset_running_stats()
        self.mean_grad.zero_()
        self.var_grad.zero_()

    def step(self, batch: Moments, used: Tensor | None) -> Plan:
        self.follow_batch(batch, used)
        mean, var = self.running_statistics(batch.mean)
        if isinstance(number := batch.number, Tensor):
            share = 1 / number.clamp(min=1)
        else:
            share = mean.new_full((), 1 / max(1, number))
        # What moves no average is no part of the statistics, and its gradients are none of theirs.
        share = share * finite(batch.mean, batch.var)
        return Plan(mean.clone(), var.clone(), share)

    def spread(self, batch: Moments) -> Tensor:
        return batch.var

    def update(self, mean: Tensor, spread: Tensor, rate: float | Tensor) -> None:
        running_mean, running_var = self.running_mean, self.running_var
        assert running_mean is not None
        assert running_var is not None
        before = mean - running_mean
        follow(running_mean, mean, rate)
        # The average of x**2, less the square of the new mean, without a difference of large numbers.
        follow(running_var, torch.addcmul(spread, before, mean - running_mean), rate)

    def way_back(self, plan: Plan) -> WayBack | None:
        if transforming():
            raise RuntimeError(
                f"{self}: training moves averages in the backward, which torch.func cannot do; call it outside of "
                "vmap and grad, or evaluate"
            )
        if plan.share is None:  # statistics that are given, not its averages
            return super().way_back(plan)
        averages = (self.mean_grad, self.var_grad)
        rate = self.rate() * (plan.share > 0).to(self.mean_grad.dtype)  # a masked channel may have no value
        return partial(_follow_gradients, averages, rate, super().way_back(plan))


def _follow_gradients(
    averages: tuple[Tensor, Tensor],
    rate: float | Tensor,
    over_ranks: WayBack | None,
    dmean: Tensor,
    dvar: Tensor,
) -> tuple[Tensor, Tensor]:
    if over_ranks is not None:
        dmean, dvar = over_ranks(dmean, dvar)
    kind, usable = dmean.dtype, (dmean + dvar).isfinite().all()
    for average, gradient in zip(averages, (dmean, dvar), strict=True):
        # A loss scale that overflows must not stay in the averages.
        follow(average, torch.where(usable, converted(gradient, average.dtype), average), rate)
    mean_grad, var_grad = map(snapshot, averages) if torch.compiler.is_compiling() else averages
    return converted(mean_grad, kind), converted(var_grad, kind)
