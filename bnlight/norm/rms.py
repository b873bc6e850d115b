"""The layers that divide by the root mean square and subtract no mean."""

import math
from typing import Literal, Unpack

import torch
from torch import Tensor, nn

from bnlight.norm.arrange import affine, by_channel, by_position, by_sample, mean_var
from bnlight.norm.base import Affine
from bnlight.norm.core import converted, per_channel, statistics_dtype
from bnlight.norm.sample import SampleStatistics

SIGN = "weight * sign(x) + bias"


def inverse_rms(x: Tensor, eps: Tensor | float, share: Tensor | float = 1) -> Tensor:
    """`1 / sqrt(mean(x**2) + eps)` per channel; `share` says which share of its values is valid, not zero."""
    mean, var = mean_var(x)
    return (torch.addcmul(var, mean, mean) / share + eps).rsqrt()


def valid_share(x: Tensor, valid: Tensor | None) -> Tensor:
    """Which share of each sample's positions is valid, `(N,)`; 1 where none is."""
    dtype = statistics_dtype(x.dtype)
    if valid is None:
        return torch.ones(x.size(0), dtype=dtype, device=x.device)
    share = valid.flatten(1).sum(1, dtype=dtype) / math.prod(valid.shape[1:])
    return share.masked_fill(share == 0, 1)


class RMSNorm(SampleStatistics):
    """Root mean square normalization: the channels at each position by their root mean square.

    `y = x / sqrt(mean(x**2) + eps) * weight + bias`

    Training and evaluation are the same. `over="channels"` takes the mean over the channels at each position,
    so that `RMSNorm(C, channel_dim=-1, bias=False)` is `torch.nn.RMSNorm(C)`, as transformers use it;
    `over="sample"` over a sample's channels and positions, as in `LayerNorm`. For `(N, C)` both are the same.
    The default eps is torch's for float32 and half precision, float32's machine epsilon. The authors' form
    has no bias. See `Norm` for shapes, masks and their errors; ValueError for another `over`. Warns once if
    there is one value to normalize.

    Source: Zhang and Sennrich 2019 (arXiv 1910.07467), section 3.

    >>> RMSNorm(2)(torch.tensor([[3.0, 4.0], [0.0, -5.0]])).detach().round(decimals=2)
    tensor([[ 0.8500,  1.1300],
            [ 0.0000, -1.4100]])
    """

    def __init__(
        self,
        num_features: int,
        *,
        over: Literal["sample", "channels"] = "channels",
        eps: float = torch.finfo(torch.float32).eps,
        **shared: Unpack[Affine],
    ) -> None:
        super().__init__(num_features, eps=eps, **shared)
        if over not in ("sample", "channels"):
            raise ValueError(f"RMSNorm: over must be 'sample' or 'channels', got {over!r}")
        self.over = over

    def normalize(self, x: Tensor, valid: Tensor | None) -> Tensor:
        if x.numel() == 0:
            return affine(x, *self.full_affine(x))
        whole = self.over == "sample" and x.dim() > 2
        self.warn_if_alone(
            x, math.prod(x.shape[1:]) if whole else x.size(1), SIGN, "Use NoNorm at this place"
        )
        if whole:
            y = by_sample(
                lambda rows, share: affine(rows, inverse_rms(rows, self.eps, share)), x, valid_share(x, valid)
            )
        else:
            y = by_position(lambda rows: affine(rows, inverse_rms(rows, self.eps)), x)
        return affine(y, *self.full_affine(x)) if self.affine else y


class FilterResponseNorm(SampleStatistics):
    """Filter response normalization: each channel of each sample by its own root mean square.

    `y = x / sqrt(mean(x**2) + eps) * weight + bias`, then `max(y, tau)` with `tlu=True`

    Training and evaluation are the same; the mean is over a sample's positions. `tlu=True` adds the authors'
    thresholded linear unit, which takes the place of the activation after the layer: `tau`, `(num_features,)`,
    starts at 0. `learn_eps=True` learns what is added to eps: its absolute value, `learned_eps` of shape
    `(num_features,)`, starts at 1e-4. With one position the output is else `sign(x)`, so that there is no
    gradient: the layer then warns once. The authors advise to warm the learning rate up. See `Norm` for
    shapes, masks and their errors.

    Source: Singh and Krishnan 2019 (arXiv 1911.09737), section 3.

    >>> FilterResponseNorm(1)(torch.tensor([[[3.0, 4.0]], [[0.0, -5.0]]])).detach().round(decimals=2)
    tensor([[[ 0.8500,  1.1300]],
    <BLANKLINE>
            [[ 0.0000, -1.4100]]])
    """

    learned_eps: nn.Parameter | None
    tau: nn.Parameter | None

    def __init__(
        self,
        num_features: int,
        *,
        learn_eps: bool = False,
        tlu: bool = False,
        eps: float = 1e-6,
        **shared: Unpack[Affine],
    ) -> None:
        super().__init__(num_features, eps=eps, **shared)
        self.learn_eps = learn_eps
        self.tlu = tlu
        for parameter, wanted in (("learned_eps", learn_eps), ("tau", tlu)):
            empty = torch.empty(num_features, device=shared.get("device"), dtype=shared.get("dtype"))
            self.register_parameter(parameter, nn.Parameter(empty) if wanted else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set all parameters to their initial values."""
        super().reset_parameters()
        for name, value in (("learned_eps", 1e-4), ("tau", 0.0)):
            # The base class resets its own parameters before these are there.
            if (parameter := self._parameters.get(name)) is not None:
                nn.init.constant_(parameter, value)

    def normalize(self, x: Tensor, valid: Tensor | None) -> Tensor:
        weight, bias = self.full_affine(x)
        eps = torch.full_like(weight, self.eps)
        if self.learned_eps is None:
            self.warn_if_alone(
                x, math.prod(x.shape[2:]), SIGN, "Set learn_eps=True, or use LayerNorm at this place"
            )
        else:
            eps = eps + converted(self.learned_eps, weight.dtype).abs()

        def responses(rows: Tensor, weight: Tensor, bias: Tensor, eps: Tensor, share: Tensor) -> Tensor:
            return affine(rows, weight * inverse_rms(rows, eps, share), bias)

        if x.numel() == 0:
            y = affine(x, weight + 0 * eps, bias)  # every parameter has a gradient, 0
        else:
            vectors = weight, bias, eps, valid_share(x, valid).unsqueeze(1)
            y = by_channel(responses, x, *(vector.expand(x.shape[:2]) for vector in vectors))
        if self.tau is None:
            return y
        return torch.maximum(y, per_channel(converted(self.tau, y.dtype), y))
