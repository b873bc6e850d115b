"""Which parameters of a model belong to its norms."""

import re
import warnings
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from bnlight.norm.weight import is_weight_norm
from bnlight.surgery.known import TORCH_NORMS as TORCH_NORMS
from bnlight.surgery.known import is_norm, known

_NAMED_NORM = re.compile(r"Norm(alization)?(?![a-z])")


def norm_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield every parameter of a norm layer and every bias of any module: an optimizer's no-decay group.

    Norms are bnlight's, torch's, and whatever is called one: the parameters with at most one axis of a module
    whose class has `Norm` in its name, as timm's `RmsNorm`, `EvoNorm2dB0` and `LayerNorm2d`, or `LlamaRMSNorm`. A bias
    is a parameter named `bias` or `bias_...`. Of a weight or bias that is parametrized, these are the parameters it
    is computed from. The lengths g of weight-normalized weights count too: they scale a layer's outputs as a norm's
    weight does. A parameter that several modules share comes once, also when only one of them makes it a norm's or
    a bias.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
    >>> plain = set(norm_parameters(model))
    >>> [name for name, parameter in model.named_parameters() if parameter not in plain]
    ['0.weight']
    """
    seen: set[nn.Parameter] = set()
    for module in model.modules():
        for parameter in _undecayed(module):
            if parameter not in seen:
                seen.add(parameter)
                yield parameter


def is_named_norm(name: str) -> bool:
    """Whether a class of this name is called a norm: `LlamaRMSNorm`, `EvoNorm2dB0`, not `NormalizedLinear`."""
    return _NAMED_NORM.search(name) is not None


def is_scripted_norm(module: nn.Module) -> bool:
    """Whether torch.jit has scripted a norm: nothing about it can be changed."""
    scripted = isinstance(module, torch.jit.ScriptModule) and not [*module.children()]
    return scripted and is_named_norm(str(module.original_name))


def warn_of_scripted(what: str, model: nn.Module, *, buffer: str | None = None) -> None:
    """Name the scripted norms, those that have `buffer`, to the caller of the public function `what`."""
    norms = {path: module for path, module in model.named_modules() if is_scripted_norm(module)}
    paths = [
        f"'{path}'" for path, norm in norms.items() if buffer is None or buffer in dict(norm.named_buffers())
    ]
    if paths:
        warnings.warn(
            f"{what}: scripted norms cannot be changed, so {', '.join(paths)} stay as they are; change them before "
            "torch.jit.script",
            stacklevel=3,
        )


def _undecayed(module: nn.Module) -> Iterator[nn.Parameter]:
    """The module's own parameters that should not decay."""
    norm = is_norm(module)
    named = is_named_norm(type(module).__name__)
    length = "original0" if is_weight_norm(module) else None
    for name, parameter in module.named_parameters(recurse=False):
        if norm or _is_bias(name) or name == length or (named and _is_flat(parameter)):
            yield parameter
    if parametrize.is_parametrized(module):
        assert isinstance(module.parametrizations, nn.ModuleDict)
        for name, ways in module.parametrizations.items():
            if norm or _is_bias(name):
                yield from ways.parameters()


def _is_bias(name: str) -> bool:
    return name == "bias" or name.startswith("bias_")


def _is_flat(parameter: nn.Parameter) -> bool:
    return not is_lazy(parameter) and parameter.dim() <= 1


def affine_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The norms' own parameters with their names in the layer, shared ones once."""
    seen: set[nn.Parameter] = set()
    own = {*model.parameters()}
    for module in model.modules():
        if (found := known(module)) is not None:
            for name, parameter in found.norm.named_parameters(recurse=False):
                if parameter in own and parameter not in seen:
                    seen.add(parameter)
                    yield name, parameter
