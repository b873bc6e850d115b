"""Find and change the normalization layers of a model."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from bnlight.norm import Norm
from bnlight.norm.batch import BatchStatistics
from bnlight.norm.core import converted, statistics_dtype
from bnlight.norm.sync import Meeting, ProcessGroup
from bnlight.norm.weight import is_weight_norm

TORCH_NORMS: tuple[type[nn.Module], ...] = (_BatchNorm, _InstanceNorm, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def norm_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield every parameter of a norm layer and every bias of any module: an optimizer's no-decay group.

    Norms are bnlight's and torch's; a bias is a parameter named `bias` or `bias_...`. The lengths g of
    weight-normalized weights count too: they scale a layer's outputs as a norm's weight does. A parameter that
    several modules share comes once, also when only one of them makes it a norm's or a bias.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
    >>> plain = set(norm_parameters(model))
    >>> [name for name, parameter in model.named_parameters() if parameter not in plain]
    ['0.weight']
    """
    seen: set[nn.Parameter] = set()
    for module in model.modules():
        is_norm = isinstance(module, (Norm, *TORCH_NORMS))
        length = "original0" if is_weight_norm(module) else None
        for name, parameter in module.named_parameters(recurse=False):
            undecayed = is_norm or name in ("bias", length) or name.startswith("bias_")
            if undecayed and parameter not in seen:
                seen.add(parameter)
                yield parameter


def sync_norm(
    model: nn.Module, process_group: ProcessGroup = "world", *, timeout: float | None = None
) -> nn.Module:
    """Let bnlight's layers with batch statistics take them over the batches of all ranks; returns the model.

    `process_group` is "world" (the default group, looked up at each forward, so that the model may be built
    before there is one) or a ProcessGroup. Any backend will do. Nothing but the layers' `process_group`
    changes: parameters, buffers and state-dict keys stay. Outputs, gradients and buffers are those of one
    process that has the joined batch, however uneven the ranks' batches are; a rank without samples passes an
    empty batch. Training costs each layer one collective forward and one backward, evaluation none.

    In DistributedDataParallel set `broadcast_buffers=False`: the buffers agree by themselves, and its broadcast
    at each forward would wait for a missing rank in the place of the layer, which knows its name.

    Every rank must call the layers equally often, in the same order. RuntimeError with the layer's path, its
    call and the rank if ranks meet in different layers, or if one does not come within `timeout` seconds (on
    CPU; None, and devices, use the process group's own timeout). TypeError if the model has torch's
    batch norm layers, which stay local; replace them by `bnlight.norm.BatchNorm`, whose state dict is the same.
    """
    torchs = [path for path, module in model.named_modules() if isinstance(module, _BatchNorm)]
    if torchs:
        raise TypeError(
            f"sync_norm synchronizes bnlight's layers, but {', '.join(map(repr, torchs))} are torch's; use "
            "bnlight.norm.BatchNorm, which loads their state dict"
        )
    layers = {m: path for path, m in model.named_modules() if isinstance(m, BatchStatistics)}
    width = max((layer.row_length() for layer in layers), default=0)
    for number, (layer, path) in enumerate(layers.items()):
        layer.meeting = Meeting(process_group, layer=number, path=path, width=width, timeout=timeout)
    return model


def unsync_norm(model: nn.Module) -> nn.Module:
    """Let every layer take its statistics from its own process again; returns the model."""
    for module in model.modules():
        if isinstance(module, BatchStatistics):
            module.process_group = None
    return model


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
    for name, parameter in _affine_parameters(model):
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
    for name, parameter in _affine_parameters(model):
        low, high = bounds.get(name, (None, None))
        if low is not None or high is not None:
            parameter.clamp_(low, high)


def _affine_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The norms' own parameters with their names in the layer, shared ones once."""
    seen: set[nn.Parameter] = set()
    for module in model.modules():
        if isinstance(module, (Norm, *TORCH_NORMS)):
            for name, parameter in module.named_parameters(recurse=False):
                if parameter not in seen:
                    seen.add(parameter)
                    yield name, parameter
