"""The family in one table: how each layer is made, and its formula, written out for autograd."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnlight.norm import (
    BatchInstanceNorm,
    BatchLayerNorm,
    BatchNorm,
    BatchRenorm,
    DynamicTanh,
    FilterResponseNorm,
    FullNorm,
    GroupNorm,
    InstanceNorm,
    LayerNorm,
    MeanOnlyBatchNorm,
    NoNorm,
    Norm,
    RMSNorm,
    SwitchableNorm,
)
from bnlight.norm.batch import BatchStatistics

CHANNELS = 4

Formula = Callable[[Any, Tensor], Tensor]
"""What a layer computes for `x`, `(N, C)` or `(N, C, *)`. It moves the layer's buffers, as the layer would."""


def over(vector: Tensor, x: Tensor) -> Tensor:
    """A vector of the channels, `(C,)`, or of channels and positions, `(C, *)`, in x's axes."""
    return vector.view(-1, *[1] * (x.dim() - 2)) if vector.dim() == 1 else vector


def affine(layer: Norm, x: Tensor) -> Tensor:
    y = x if layer.weight is None else x * over(layer.weight, x)
    return y if layer.bias is None else y + over(layer.bias, x)


def positions(x: Tensor) -> list[int]:
    return [*range(2, x.dim())]


def moments(x: Tensor, axes: list[int]) -> tuple[Tensor, Tensor]:
    """Mean and biased variance; of a value for itself where there are no axes."""
    if not axes:
        return x, torch.zeros_like(x)
    return x.mean(axes, keepdim=True), x.var(axes, correction=0, keepdim=True)


def standardized(x: Tensor, axes: list[int], eps: float) -> Tensor:
    mean, var = moments(x, axes)
    return (x - mean) / (var + eps).sqrt()


def move(layer: Any, **targets: Tensor) -> None:
    """Count a batch and move the running averages towards what it has."""
    layer.num_batches_tracked = layer.num_batches_tracked + 1
    rate = 1 / int(layer.num_batches_tracked) if layer.momentum is None else layer.momentum
    for name, target in targets.items():
        old = getattr(layer, name)
        old = old.view(-1, *[1] * (target.dim() - 1)) if old.dim() == 1 else old
        setattr(layer, name, old + rate * (target.detach() - old))


def of_batch(layer: Any, x: Tensor, axes: list[int] | None = None) -> tuple[Tensor, Tensor]:
    """Mean and variance of the batch, which move the averages; in evaluation the averages."""
    if not layer.training and layer.running_mean is not None:
        return over(layer.running_mean, x), over(layer.running_var, x)
    mean, var = moments(x, axes or [0, *positions(x)])
    if layer.running_mean is not None:
        number = x.numel() // mean.numel()
        shape = layer.running_mean.shape if axes is None else mean.shape[1:]
        move(
            layer, running_mean=mean.view(shape), running_var=(var * number / max(1, number - 1)).view(shape)
        )
    return mean, var


def batch_norm(layer: Any, x: Tensor) -> Tensor:
    mean, var = of_batch(layer, x)
    y = (x - mean) / (var + layer.eps).sqrt()
    if layer.jitter and layer.training:
        scale, shift = (torch.empty(x.size(1), dtype=x.dtype).uniform_(-w, w) for w in layer.jitter)
        y = y * over(1 + scale, x) + over(shift, x)
    return affine(layer, y)


def batch_renorm(layer: Any, x: Tensor) -> Tensor:
    old_mean, old_std = over(layer.running_mean, x), over((layer.running_var + layer.eps).sqrt(), x)
    if not layer.training:
        return affine(layer, (x - old_mean) / old_std)
    mean, var = moments(x, [0, *positions(x)])
    std = (var + layer.eps).sqrt()
    r_min = 1 / layer.r_max if layer.r_min is None else layer.r_min
    r = (std / old_std).clamp(r_min, layer.r_max).detach()
    d = ((mean - old_mean) / old_std).clamp(-layer.d_max, layer.d_max).detach()
    layer.running_var = (layer.running_var + layer.eps).sqrt()  # the average is of the standard deviation
    move(layer, running_mean=mean.flatten(), running_var=std.flatten())
    layer.running_var = layer.running_var.square() - layer.eps
    return affine(layer, (x - mean) / std * r + d)


def full_norm(layer: Any, x: Tensor) -> Tensor:
    if layer.training:
        mean, square = x.mean([0, *positions(x)]), x.square().mean([0, *positions(x)])
        layer.running_var = layer.running_var + layer.running_mean.square()
        move(layer, running_mean=mean, running_var=square)
        layer.running_var = layer.running_var - layer.running_mean.square()
    mean, var = layer.running_mean, layer.running_var
    if layer.training:
        # The averages' values, the batch's way back, and on it the averages of the gradients.
        parts = x, (x - over(mean, x)).square()
        mean, var = (
            value + (part - part.detach()).mean([0, *positions(x)])
            for value, part in zip((mean, var), parts, strict=True)
        )
        rate = 1 / int(layer.num_batches_tracked) if layer.momentum is None else layer.momentum
        for name, value in (("mean_grad", mean), ("var_grad", var)):
            if value.requires_grad:
                value.register_hook(lambda new, name=name: _follow(layer, name, new, rate))
    return affine(layer, (x - over(mean, x)) / (over(var, x) + layer.eps).sqrt())


def _follow(layer: Any, name: str, new: Tensor, rate: float) -> Tensor:
    setattr(layer, name, getattr(layer, name).lerp(new, rate))
    return getattr(layer, name)


def mean_only_batch_norm(layer: Any, x: Tensor) -> Tensor:
    return affine(layer, x - of_batch(layer, x)[0])


def batch_layer_norm(layer: Any, x: Tensor) -> Tensor:
    mean, var = of_batch(layer, x, None if layer.spatial else [0])
    if layer.training:
        layer.batch_size = layer.batch_size.clamp(min=len(x))
    share = 1 / len(x) if layer.training else 1 / layer.batch_size if layer.batch_size else 0
    scale = x.size(1) ** -0.5 if layer.scaled else 1
    batch = (x - mean) / (var + layer.eps).sqrt()
    mixed = batch * (1 - share - 1e-4) + standardized(x, [1], layer.eps) * (share - 1e-4)
    return affine(layer, mixed * scale)


def batch_instance_norm(layer: Any, x: Tensor) -> Tensor:
    mean, var = of_batch(layer, x)
    batch, rho = (x - mean) / (var + layer.eps).sqrt(), over(layer.rho, x)
    return affine(layer, rho * batch + (1 - rho) * standardized(x, positions(x), layer.eps))


def switchable_norm(layer: Any, x: Tensor) -> Tensor:
    parts = moments(x, positions(x)), moments(x, [1, *positions(x)]), of_batch(layer, x)
    p, q = layer.mean_weight.softmax(0), layer.var_weight.softmax(0)
    mean = sum(share * mean for share, (mean, _) in zip(p, parts, strict=True))
    var = sum(share * var for share, (_, var) in zip(q, parts, strict=True))
    return affine(layer, (x - mean) / (var + layer.eps).sqrt())


def layer_norm(layer: Any, x: Tensor) -> Tensor:
    axes = [1, *positions(x)] if layer.over == "sample" else [1]
    return affine(layer, standardized(x, axes, layer.eps))


def group_norm(layer: Any, x: Tensor) -> Tensor:
    return F.group_norm(x, layer.num_groups, layer.weight, layer.bias, layer.eps)


def instance_norm(layer: Any, x: Tensor) -> Tensor:
    return affine(layer, standardized(x, positions(x), layer.eps))


def rms_norm(layer: Any, x: Tensor) -> Tensor:
    axes = [1, *positions(x)] if layer.over == "sample" else [1]
    return affine(layer, x / (x.square().mean(axes, keepdim=True) + layer.eps).sqrt())


def filter_response_norm(layer: Any, x: Tensor) -> Tensor:
    square = x.square().mean(positions(x), keepdim=True) if positions(x) else x.square()
    eps = layer.eps + (0 if layer.learned_eps is None else over(layer.learned_eps.abs(), x))
    y = affine(layer, x / (square + eps).sqrt())
    return y if layer.tau is None else torch.maximum(y, over(layer.tau, x))


def dynamic_tanh(layer: Any, x: Tensor) -> Tensor:
    return affine(layer, torch.tanh(layer.alpha * x))


def in_groups(formula: Formula) -> Formula:
    """The formula on every Kth sample, each time from the same averages; those become the mean of all."""

    def each(layer: Any, x: Tensor) -> Tensor:
        groups = max(1, len(x) // layer.virtual_batch_size) if layer.training else 1
        start, ends, y = dict(layer.named_buffers()), [], torch.empty_like(x)
        for k in range(groups):
            for name, value in start.items():
                setattr(layer, name, value)
            y[k::groups] = formula(layer, x[k::groups])
            ends.append(dict(layer.named_buffers()))
        for name in ("running_mean", "running_var"):
            values = torch.stack([end[name] for end in ends])
            if isinstance(layer, BatchRenorm) and name == "running_var":
                setattr(layer, name, (values + layer.eps).sqrt().mean(0).square() - layer.eps)
            else:
                setattr(layer, name, values.mean(0))
        if "batch_size" in start:
            layer.batch_size = torch.stack([end["batch_size"] for end in ends]).max()
        return y

    return each


@dataclass(frozen=True)
class Row:
    """A layer of the family. What a row does not say holds for it as for all the others."""

    layer: type[Norm]
    formula: Formula
    options: dict[str, Any] = field(default_factory=dict)
    needs_positions: bool = False
    """Refuses `(N, C)`, or has nothing to say of it."""
    by_position: bool = False
    """Positions have statistics of their own, so that they cannot change places."""
    to_freeze: dict[str, float] = field(default_factory=dict)
    """Attributes and buffers that make the gradient the derivative of the output."""

    def make(self, dtype: torch.dtype = torch.float64, **more: Any) -> Any:
        """The layer with random parameters, the same at each call."""
        layer = self.layer(CHANNELS, dtype=dtype, **self.options, **more)
        generator = torch.Generator().manual_seed(1)
        for parameter in layer.parameters():
            parameter.data.copy_(
                0.2 + 0.6 * torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
            )
        return layer

    @property
    def by_batch(self) -> bool:
        return issubclass(self.layer, BatchStatistics)

    @property
    def cumulative(self) -> bool:
        """Whether the averages are plain ones of all batches."""
        return self.by_batch and self.options.get("momentum", 0.1) is None

    @property
    def first_order_only(self) -> bool:
        """Whether training normalizes by other means than torch's kernel, which is differentiable twice."""
        plain = self.layer is BatchNorm and not {"jitter", "virtual_batch_size"} & {*self.options}
        return self.by_batch and not plain


RENORM_FROZEN = {"r_max": 1.0, "d_max": 0.0}

ROWS: dict[str, Row] = {
    "batch": Row(BatchNorm, batch_norm),
    "renorm": Row(BatchRenorm, batch_renorm, to_freeze=RENORM_FROZEN),
    "full": Row(FullNorm, full_norm, to_freeze={"momentum": 1.0}),
    "batch_layer": Row(BatchLayerNorm, batch_layer_norm),
    "batch_instance": Row(BatchInstanceNorm, batch_instance_norm, needs_positions=True),
    "switchable": Row(SwitchableNorm, switchable_norm),
    "layer": Row(LayerNorm, layer_norm),
    "group": Row(GroupNorm, group_norm, {"num_groups": 2}),
    "instance": Row(InstanceNorm, instance_norm, needs_positions=True),
    "rms": Row(RMSNorm, rms_norm),
    "frn": Row(FilterResponseNorm, filter_response_norm, needs_positions=True),
    "tanh": Row(DynamicTanh, dynamic_tanh),
    "none": Row(NoNorm, affine),
    "mean only": Row(MeanOnlyBatchNorm, mean_only_batch_norm),
    "batch, cumulative": Row(BatchNorm, batch_norm, {"momentum": None}),
    "batch, no affine": Row(BatchNorm, batch_norm, {"affine": False}),
    "batch, no bias": Row(BatchNorm, batch_norm, {"bias": False}),
    "batch, no averages": Row(BatchNorm, batch_norm, {"track_running_stats": False}),
    "batch, jitter": Row(BatchNorm, batch_norm, {"jitter": (0.2, 0.3)}),
    "batch, virtual": Row(BatchNorm, in_groups(batch_norm), {"virtual_batch_size": 2}),
    "renorm, clipped": Row(
        BatchRenorm,
        batch_renorm,
        {"r_max": 1.1, "d_max": 0.1, "momentum": 0.3},
        to_freeze=RENORM_FROZEN,
    ),
    "renorm, cumulative": Row(
        BatchRenorm, batch_renorm, {"momentum": None, "r_min": 0.5}, to_freeze=RENORM_FROZEN | {"r_min": 1.0}
    ),
    "renorm, virtual": Row(
        BatchRenorm, in_groups(batch_renorm), {"virtual_batch_size": 2}, to_freeze=RENORM_FROZEN
    ),
    "full, no affine": Row(FullNorm, full_norm, {"affine": False}, to_freeze={"momentum": 1.0}),
    "mean only, virtual": Row(MeanOnlyBatchNorm, in_groups(mean_only_batch_norm), {"virtual_batch_size": 2}),
    "batch_layer, per position": Row(BatchLayerNorm, batch_layer_norm, {"spatial": False}, by_position=True),
    "batch_layer, unscaled, virtual": Row(
        BatchLayerNorm, in_groups(batch_layer_norm), {"scaled": False, "virtual_batch_size": 2}
    ),
    "batch_instance, virtual": Row(
        BatchInstanceNorm, in_groups(batch_instance_norm), {"virtual_batch_size": 2}, needs_positions=True
    ),
    "switchable, virtual": Row(SwitchableNorm, in_groups(switchable_norm), {"virtual_batch_size": 2}),
    "layer, over channels": Row(LayerNorm, layer_norm, {"over": "channels"}),
    "group, no affine": Row(GroupNorm, group_norm, {"affine": False}),
    "rms, over sample": Row(RMSNorm, rms_norm, {"over": "sample"}),
    "rms, no bias": Row(RMSNorm, rms_norm, {"bias": False}),
    "frn, all options": Row(FilterResponseNorm, filter_response_norm, {"learn_eps": True, "tlu": True}),
    "none, affine": Row(NoNorm, affine, {"affine": True}),
}

TRAINING = [True, False]


def batch(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Values of the given shape, away from zero and of another scale and place with each seed."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * (1 + seed % 3) + seed % 5 - 1).to(
        dtype
    )


def step(
    function: Callable[..., Tensor], layer: nn.Module, x: Tensor, *mask: Tensor, seed: int = 0
) -> dict[str, Tensor]:
    """Output, gradients and buffers of one forward and backward of `function`, whose state is the layer's."""
    torch.manual_seed(seed)
    layer.zero_grad()
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = function(x, *mask)
    weights = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).sin().view(y.shape).to(y.dtype)
    (y * weights).sum().backward()
    found = {"y": y.detach(), "dx": x.grad}
    found |= {f"d{name}": p.grad for name, p in layer.named_parameters()}
    return found | {name: b.clone() for name, b in layer.named_buffers()}


def pure(row: Row, training: bool) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """The layer as a function without state, whose gradient is its derivative, and its parameters."""
    layer = row.make().train(training)
    for name, value in row.to_freeze.items():
        part = getattr(layer, name)
        part.fill_(value) if isinstance(part, Tensor) else setattr(layer, name, value)
    names = [name for name, _ in layer.named_parameters()]

    def function(x: Tensor, *values: Tensor) -> Tensor:
        torch.manual_seed(0)
        buffers = {name: b.clone() for name, b in layer.named_buffers()}
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)) | buffers, (x,))

    return function, [*layer.parameters()]


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-8) -> None:
    """The same names, with close values."""
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(
            value,
            expected[name],
            rtol=tolerance,
            atol=tolerance,
            msg=lambda text, name=name: f"{name}: {text}",
        )
