"""Which parameters of a model belong to its norms."""

from collections.abc import Iterator

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from bnlight.norm import Norm
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


def affine_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The norms' own parameters with their names in the layer, shared ones once."""
    seen: set[nn.Parameter] = set()
    for module in model.modules():
        if isinstance(module, (Norm, *TORCH_NORMS)):
            for name, parameter in module.named_parameters(recurse=False):
                if parameter not in seen:
                    seen.add(parameter)
                    yield name, parameter
