"""A bounded function in the place of a norm."""

from typing import Unpack

import torch
from torch import Tensor, nn

from bnlight.norm.arrange import affine
from bnlight.norm.base import Norm, Shared
from bnlight.norm.core import converted, statistics_dtype
from bnlight.norm.layout import in_all_axes, in_few_axes, keep_layout


class DynamicTanh(Norm):
    """Dynamic tanh: no statistics, but a bounded function with a learned slope.

    `y = weight * tanh(alpha * x) + bias`

    Training and evaluation are the same. `alpha` is a learned scalar; the argument is its initial value. It is
    meant for the place of the layer norms of a transformer, not of the batch norms of a convolutional network;
    the authors advise a smaller `alpha` for wide language models. It takes the arguments of the other layers;
    `eps` is unused. See `Norm` for shapes, masks and their errors.

    Source: Zhu et al. 2025 (arXiv 2503.10622), section 4.

    >>> DynamicTanh(2)(torch.tensor([[0.0, 100.0]])).detach()
    tensor([[0., 1.]])
    """

    def __init__(self, num_features: int, *, alpha: float = 0.5, **shared: Unpack[Shared]) -> None:
        super().__init__(num_features, **shared)
        self.initial_alpha = alpha
        self.alpha = nn.Parameter(torch.empty((), device=shared.get("device"), dtype=shared.get("dtype")))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set all parameters to their initial values."""
        super().reset_parameters()
        if "alpha" in self._parameters:  # the base class resets its own parameters before it is there
            nn.init.constant_(self.alpha, self.initial_alpha)

    def normalize(self, x: Tensor, valid: Tensor | None) -> Tensor:
        # As a weight of the channels alpha's gradient is summed in full precision.
        alpha = converted(self.alpha, statistics_dtype(x.dtype)).expand(x.size(1))
        y = affine(in_few_axes(x), alpha.contiguous()).tanh_()
        # Never tanh's own output, which its backward needs and an in-place activation would overwrite.
        return keep_layout(in_all_axes(affine(y, *self.full_affine(x)), x), x)
