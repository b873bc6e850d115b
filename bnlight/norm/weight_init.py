"""Data-dependent initialization of weight-normalized layers."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bnlight.norm.weight import M, described, is_weight_norm, parametrization_of


@torch.no_grad()
def initialize_weight_norm(model: M, batch: Any, *, forward: Callable[[Any], object] | None = None) -> M:
    """Set the lengths and biases of weight-normalized layers from one batch, and return the model.

    `t = v . x / ||v||`, `g = 1 / std[t]`, `b = -mean[t] / std[t]`

    So each such layer's output has mean 0 and variance 1 per channel on this batch (biased variance, over
    samples and positions). One forward does it, layer by layer: each layer sees the outputs of those already
    initialized. A layer without bias keeps its mean and gets variance 1. A layer that is called several times is
    initialized at its first call; of layers that share their weight, the first in the model is the one. An
    output that is the same throughout the batch (a dead unit) keeps its g and b, with a warning that counts
    them, and so does, with a warning, a layer that the forward does not call.

    The forward runs in the mode the model is in, without gradients: in training, norms with running statistics
    update them once and dropout draws; in evaluation, nothing else changes. Under DDP, initialize before the
    model is wrapped (DDP then hands out rank 0's values) or broadcast the parameters afterwards; initialize
    before `torch.compile`, too, as a compiled model may not run the hooks that do this.

    Args:
        model: after `weight_norm(model)`, or torch's own for parameters named `weight`.
        batch: the model's input; if it is a tuple or list, its first element is.
        forward: called with the whole batch in place of `model(input)`.

    Raises ValueError if the model has no such layer, or if a layer's outputs hold one value per channel, or
    values that are not finite. After any error, lengths and biases are as they were.

    Source: Salimans and Kingma 2016 (arXiv 1602.07868), section 3.

    >>> from bnlight.norm import weight_norm
    >>> layer = initialize_weight_norm(weight_norm(nn.Linear(3, 2)), x := torch.randn(8, 3))
    >>> torch.var_mean(layer(x).detach(), 0, correction=0)[0]
    tensor([1.0000, 1.0000])
    """
    layers: dict[Tensor, FirstCall] = {}
    for path, module in model.named_modules():
        if parametrize.is_parametrized(module, "weight") and is_weight_norm(parametrization_of(module)):
            layer = FirstCall(module, path)
            layers.setdefault(layer.g, layer)
    if not layers:
        raise ValueError(
            f"initialize_weight_norm: {type(model).__name__} has no weight-normalized layer; call "
            "weight_norm(model) first (in a job: weight=weight_norm)"
        )
    handles = [handle for layer in layers.values() for handle in layer.hooks()]
    try:
        if forward is not None:
            forward(batch)
        else:
            model(batch[0] if isinstance(batch, tuple | list) else batch)
    except BaseException:
        for layer in layers.values():
            layer.restore()
        raise
    finally:
        for handle in handles:
            handle.remove()
    if uncalled := [layer.name for layer in layers.values() if not layer.called]:
        warnings.warn(
            f"initialize_weight_norm: the forward did not call {', '.join(uncalled)}, which keep their lengths and "
            "biases",
            stacklevel=3,
        )
    return model


class FirstCall:
    """Sets one layer's g and b at its first call."""

    def __init__(self, layer: nn.Module, path: str) -> None:
        self.layer = layer
        self.name = described(path, layer)
        self.g = parametrization_of(layer).get_parameter("original0")
        self.b = layer._parameters.get("bias")
        self.before = self.g.clone(), None if self.b is None else self.b.clone()
        self.called = False

    def hooks(self) -> list[Any]:
        return [
            self.layer.register_forward_pre_hook(self.strip),
            self.layer.register_forward_hook(self.normalize, prepend=True),
        ]

    def strip(self, layer: nn.Module, args: Any) -> None:
        """Without g and b, the layer's output is t."""
        if not self.called:
            self.g.fill_(1)
            if self.b is not None:
                self.b.zero_()

    def normalize(self, layer: nn.Module, args: Any, t: Tensor) -> Tensor | None:
        """Set g and b from t, and pass on the output they make of it."""
        if self.called:
            return None
        self.called = True
        weight = parametrization_of(layer).get_parameter("original1")
        per_channel = -1, *[1] * (weight.dim() - 2)  # broadcasts against t: (N, C, *), (C, *) or (*, C)
        mean, std = self.moments(t, t.dim() - len(per_channel))
        self.restore()
        alive = std > 8 * torch.finfo(t.dtype).eps * mean.abs()  # less may be rounding
        if not alive.all():
            warnings.warn(
                f"initialize_weight_norm: {int((~alive).sum())} of {len(alive)} outputs of {self.name} are the same "
                "throughout the batch, and keep their lengths and biases",
                stacklevel=2,
            )
        self.g.copy_(torch.where(alive, 1 / std, self.g.flatten()).view_as(self.g))
        y = t * self.g.view(per_channel)
        if self.b is None:
            return y
        self.b.copy_(torch.where(alive, -mean / std, self.b))
        return y + self.b.view(per_channel)

    def moments(self, t: Tensor, channel_axis: int) -> tuple[Tensor, Tensor]:
        """Mean and biased standard deviation per channel, in float32 or better."""
        if t.numel() < 2 * t.size(channel_axis):
            raise ValueError(
                f"initialize_weight_norm: {self.name} has an output of shape {tuple(t.shape)}, less than two values "
                "per channel; take a larger batch"
            )
        upcast = t.to(torch.promote_types(t.dtype, torch.float32))
        axes = [axis for axis in range(t.dim()) if axis != channel_axis]
        variance, mean = torch.var_mean(upcast, axes, correction=0)
        if not variance.isfinite().all():
            raise ValueError(
                f"initialize_weight_norm: {self.name} has outputs that are not finite, so their mean and variance "
                "say nothing; look at the batch, and at what comes before the layer"
            )
        return mean, variance.sqrt()

    def restore(self) -> None:
        for tensor, value in zip((self.g, self.b), self.before, strict=True):
            if tensor is not None and value is not None:
                tensor.copy_(value)
