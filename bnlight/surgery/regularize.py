"""Penalties and bounds for the norms' weights and biases."""

import torch
from torch import Tensor, nn

from bnlight.norm.core import converted, statistics_dtype
from bnlight.surgery.parameters import affine_parameters

Bounds = tuple[float | None, float | None]
"""Smallest and largest value of a parameter; None is no bound."""


def norm_penalty(
    model: nn.Module, *, weight: float = 1e-4, bias: float = 1e-4, target: float = 1.0, power: float = 2.0
) -> Tensor:
    """A scalar to add to the loss, which pulls the weights of all norms to 1 and their biases to 0.

    `weight * sum(|w - target|**power) + bias * sum(|b|**power)` over every `weight` w and `bias` b of bnlight's
    and torch's norms, each shared parameter once; other parameters are left alone. An optimizer's weight decay
    pulls both to 0, and a weight of 0 switches its channel off: this is its counterpart for norms, which
    `norm_parameters` keeps out of it. With `target=0` it is Keras's L2 regularizer, or L1 with `power=1`.

    Summed in float32 or better, 0 if the model has no norm. Differentiable for every `power` of at least 1;
    ValueError below.

    Source: Summers and Dinneen 2020 (arXiv 1906.03548), section 3.3, on decaying a norm's weight and bias.

    >>> layer = nn.BatchNorm1d(8)
    >>> _ = nn.init.constant_(layer.weight, 0.5)
    >>> round(norm_penalty(layer, weight=0.1).item(), 4)  # 0.1 * 8 * 0.5**2
    0.2
    """
    if power < 1:
        raise ValueError(f"norm_penalty: power must be at least 1, got {power}")
    penalty = torch.zeros(())
    for name, parameter in affine_parameters(model):
        factor, centre = {"weight": (weight, target), "bias": (bias, 0.0)}.get(name, (0.0, 0.0))
        if factor:
            values = converted(parameter, statistics_dtype(parameter.dtype))
            penalty = penalty + factor * (values - centre).abs().pow(power).sum()
    return penalty


@torch.no_grad()
def constrain_norm(model: nn.Module, *, weight: Bounds = (None, None), bias: Bounds = (None, None)) -> None:
    """Clamp the parameters of all norms in place: a step of projected gradient descent, after the optimizer's.

    `weight` and `bias` of bnlight's and torch's norms go into the bounds given, `(None, None)` leaves them. The
    mixing parameter `rho` of `BatchInstanceNorm` always goes into [0, 1], where its formula has a meaning.
    ValueError if a lower bound is above its upper one.

    Keras's `NonNeg` constraint of gamma is `weight=(0, None)`.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> hook = optimizer.register_step_post_hook(lambda *_: constrain_norm(model, weight=(0, 2)))
    """
    bounds = {"weight": weight, "bias": bias, "rho": (0.0, 1.0)}
    for name, (low, high) in bounds.items():
        if low is not None and high is not None and low > high:
            raise ValueError(f"constrain_norm: the bounds of {name} are ({low}, {high}), low above high")
    for name, parameter in affine_parameters(model):
        low, high = bounds.get(name, (None, None))
        if low is not None or high is not None:
            parameter.clamp_(low, high)
