"""The unit all networks are made of: a layer with weights, a norm and an activation, in a chosen order."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

NormFactory = Callable[[int], nn.Module]

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "selu": nn.SELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "mish": nn.Mish,
    "hardswish": nn.Hardswish,
    "softplus": nn.Softplus,
    "softsign": nn.Softsign,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "identity": nn.Identity,
}
PLACEMENTS = ("before", "after")


class Blocks:
    """Builds the blocks of one network: what they share is said once.

    A block is ``layer, norm, activation`` with ``placement="before"`` and ``layer, activation, norm`` with
    ``"after"``. The layer has no bias where the norm comes directly behind it and subtracts a mean again
    (``norm.cancels_bias``, placement ``"before"``); every other layer has one, starting at zero.

    Weights are normal with variance ``gain**2 / fan_in`` (Kaiming He et al. 2015, section 2.2, for any
    activation, see :func:`gain`). The same seed gives the same weights whatever the norm and its place, so
    networks that differ in their norm only can be compared in pairs.

    Args:
        norm: called as ``norm(channels)`` for each norm layer.
        activation: a name from ``ACTIVATIONS``.
        placement: the norm ``"before"`` or ``"after"`` the activation.

    Raises:
        TypeError: ``norm`` cannot be called.
        ValueError: unknown activation or placement.
    """

    def __init__(self, norm: NormFactory, activation: str, placement: str) -> None:
        if not callable(norm):
            raise TypeError(
                f"norm must be called as norm(channels), like bnlight.norm.BatchNorm; got {norm!r}"
            )
        if activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}: choose one of {', '.join(ACTIVATIONS)}")
        if placement not in PLACEMENTS:
            raise ValueError(
                f"unknown placement {placement!r}: the norm stands 'before' or 'after' the activation"
            )
        self.norm = norm
        self.placement = placement
        self.act = ACTIVATIONS[activation]
        self.gain = gain(self.act())

    def __call__(
        self, layer: type[nn.Module], inputs: int, outputs: int, **arguments: Any
    ) -> list[nn.Module]:
        """The modules of one block, in order; ``arguments`` go to the layer (kernel size, stride, ...)."""
        weights, norm = self.normed(layer, inputs, outputs, **arguments)
        if self.placement == "before":
            return [weights, norm, self.act()]
        return [weights, self.act(), norm]

    def normed(self, layer: type[nn.Module], inputs: int, outputs: int, **arguments: Any) -> list[nn.Module]:
        """A layer and its norm; an activation, if one belongs to them, is the caller's."""
        norm = self.norm(outputs)
        bias = not (self.placement == "before" and getattr(norm, "cancels_bias", False))
        return [self.layer(layer, inputs, outputs, bias=bias, **arguments), norm]

    def layer(
        self, layer: type[nn.Module], *sizes: int, gain: float | None = None, **arguments: Any
    ) -> nn.Module:
        """A bare layer with its starting weights; ``gain`` overrides the activation's."""
        # Built on meta, since a layer's own initialization draws for its bias too and would so make all later
        # weights depend on which norm is in use.
        built = layer(*sizes, device="meta", **arguments).to_empty(device=torch.get_default_device())
        weight, bias = built.get_parameter("weight"), built._parameters["bias"]
        nn.init.normal_(weight, std=(self.gain if gain is None else gain) / math.sqrt(weight[0].numel()))
        if bias is not None:
            nn.init.zeros_(bias)
        return built


def gain(activation: nn.Module) -> float:
    """``E[f(z)**2] ** -0.5`` for standard normal z: the factor by which a layer keeps a signal in scale.

    sqrt(2) for ReLU and 1 for the identity, as in He et al. 2015, equations 7 to 10; the same for the rest.
    """
    z = torch.linspace(-10, 10, 20001, dtype=torch.float64, device="cpu")
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    with torch.no_grad():
        second_moment: float = torch.trapezoid(activation(z).square() * density, z).item()
    return 1 / math.sqrt(second_moment)


def image_shape(input_shape: Sequence[int], network: str) -> tuple[int, int, int]:
    """``input_shape`` as (channels, height, width), or a ValueError that names the network."""
    if len(input_shape) != 3:
        raise ValueError(
            f"{network} takes images, input_shape=(channels, height, width); got {tuple(input_shape)}. "
            "For plain features use MLP."
        )
    channels, height, width = (int(size) for size in input_shape)
    return channels, height, width


def check_size(input_shape: tuple[int, int, int], halvings: int, what: str, way_out: str) -> None:
    """A ValueError if an image has not one pixel left after so many halvings of its sides."""
    side = min(input_shape[1:])
    if side < 2**halvings:
        raise ValueError(
            f"images of {input_shape[1]}x{input_shape[2]} are too small for {what}: it halves the sides "
            f"{halvings} times and needs at least {2**halvings}x{2**halvings}. {way_out}"
        )


class GlobalPool(nn.Module):
    """(N, C, H, W) to (N, C): the mean over positions."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3))
