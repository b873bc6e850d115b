"""Mean-only batch normalization."""

from functools import partial
from typing import Any, Unpack

import torch
from torch import Tensor

from bnlight.norm.base import Affine
from bnlight.norm.batch import BatchStatistics
from bnlight.norm.core import Moments, Plan, WayBack
from bnlight.norm.instances import InstanceMoments


class MeanOnlyBatchNorm(BatchStatistics):
    """Mean-only batch normalization, the partner of weight normalization: `y = x - mean + bias`.

    Weight normalization fixes the scale, so that only the mean is taken from the batch: there is no weight, no
    eps, and the running variance is kept but not used. Training uses the batch's mean and moves the running
    mean towards it; evaluation uses the running mean. See `Norm` for shapes, masks and their errors, and
    `BatchNorm` for the arguments. In training a single value per channel is legal, and leaves the bias alone.

    Source: Salimans and Kingma 2016 (arXiv 1602.07868), section 4.

    >>> import torch
    >>> MeanOnlyBatchNorm(1)(torch.tensor([[1.0], [5.0]])).detach().flatten()
    tensor([-2.,  2.])
    """

    too_few = 0

    def __init__(
        self,
        num_features: int,
        *,
        momentum: float | None = 0.1,
        virtual_batch_size: int | None = None,
        **affine: Unpack[Affine],
    ) -> None:
        super().__init__(
            num_features,
            momentum=momentum,
            virtual_batch_size=virtual_batch_size,
            small_batch="running",
            eps=0.0,
            **affine,
        )
        self.weight = None

    def plan(self, batch: Moments) -> Plan:
        ones = torch.ones_like(batch.mean)
        return Plan(batch.mean, ones, share=ones / batch.number)

    def running_statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        mean, _ = super().running_statistics(like)
        return mean, torch.ones_like(mean)

    def evaluation_statistics(self, samples: InstanceMoments) -> tuple[Tensor, Tensor]:
        mean, _ = super().evaluation_statistics(samples)
        return mean, torch.ones_like(mean)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, *rest: list[str]
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *rest)
        _, unexpected, errors = rest
        if (weight := state_dict.get(prefix + "weight")) is not None:  # of batch norm
            unexpected[:] = [key for key in unexpected if key != prefix + "weight"]
            if not bool((weight == 1).all()):
                errors.append(
                    f"{prefix}weight scales its channels, which mean-only batch norm does not: multiply the weights "
                    "of the layer before by it, and set it to 1"
                )

    def way_back(self, plan: Plan) -> WayBack:
        return partial(_through_the_mean, super().way_back(plan))


def _through_the_mean(over_ranks: WayBack | None, dmean: Tensor, dvar: Tensor) -> tuple[Tensor, Tensor]:
    if over_ranks is not None:
        dmean, dvar = over_ranks(dmean, dvar)
    return dmean, torch.zeros_like(dvar)
