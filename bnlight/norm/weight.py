"""Weight normalization and weight standardization: a layer's weight as a function of its parameters."""

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrizations, parametrize

from bnlight.norm.paths import Patterns, chosen, paths_of

M = TypeVar("M", bound=nn.Module)
Layer = nn.Linear | _ConvNd


def weight_norm(model: M, *, include: Patterns = None, exclude: Patterns = None) -> M:
    """Give each linear layer and convolution of `model` the weight `g v / ||v||`, and return the model.

    `w = g v / ||v||`, `dL/dg = dL/dw . v / ||v||`, `dL/dv = g / ||v|| dL/dw - g dL/dg / ||v||^2 v`

    `||v||` and `g` are per output channel, whatever axis of the weight that is: axis 0, for transposed
    convolutions axis 1, with groups axis 1 within each group. Training and evaluation are the same, and the
    model computes what it did before, up to rounding. The last layer is included, as in the paper.

    The model is changed in place by torch's parametrizations: in the state dict, `weight` becomes
    `parametrizations.weight.original0` (g, one value per output) and `.original1` (v, shaped as the weight).
    Both are new parameters, so build the optimizer afterwards; `bnlight.surgery.norm_parameters` counts g among
    those without weight decay. Initialize the weights before: `nn.init` on `layer.weight` changes nothing
    afterwards, but assigning to it does. `copy.deepcopy`, `torch.compile` and, in evaluation, `torch.export`
    work; pickling the whole model does not (torch refuses it: keep its state dict). Layers that share one
    weight go on sharing it. `torch.nn.utils.parametrize.remove_parametrizations(layer, "weight")` makes the
    present weight a parameter again.

    Args:
        model: all of its `Linear`, `Conv*d` and `ConvTranspose*d`, or one such layer itself. Recurrent and
            attention weights that are not in such a layer stay as they are.
        include: only layers whose path matches one of these patterns (`"features.*"`; `*` matches dots too).
        exclude: no layer whose path matches one of these.

    Raises ValueError, before anything is changed, if there is no such layer, a pattern matches none, a weight
    is computed already (by this or another parametrization), not yet initialized (lazy), shared with a module
    that is not reparametrized in the same way, or zero for a whole output, which has no direction.

    Source: Salimans and Kingma 2016 (arXiv 1602.07868), section 2. See `initialize_weight_norm` for section 3;
    the mean-only batch norm of section 4 is a layer of its own.

    >>> layer = weight_norm(nn.Linear(2, 1, bias=False))
    >>> layer.weight = torch.tensor([[3.0, 4.0]])
    >>> layer.parametrizations.weight.original0.item()
    5.0
    """
    layers = _layers("weight_norm", model, (nn.Linear, _ConvNd), include, exclude)
    for layer, path in layers.items():
        zero = _rows(layer.weight, _groups(layer)).flatten(1).count_nonzero(dim=1) == 0
        if not zero.is_meta and zero.any():
            raise ValueError(
                f"weight_norm: {described(path, layer)} has an output whose weights are all zero (the first is "
                f"{int(zero.nonzero()[0])}), and zero has no direction; initialize it otherwise, or exclude the layer"
            )

    def register(layer: Layer) -> None:
        groups = _groups(layer)
        if groups is None or groups == 1:
            parametrizations.weight_norm(layer, dim=0 if groups is None else 1)
        else:
            parametrize.register_parametrization(layer, "weight", _GroupedWeightNorm(groups), unsafe=True)

    _reparametrize(layers, register)
    return model


def weight_standardization(
    model: M,
    *,
    eps: float = 1e-6,
    linear: bool = False,
    include: Patterns = None,
    exclude: Patterns = None,
) -> M:
    """Standardize the weights of each convolution of `model` over their fan-in, and return the model.

    `W' = (W - mean(W)) / sqrt(var(W) + eps)`

    Mean and biased variance are per output channel, over its inputs and kernel positions. Training and
    evaluation are the same. `eps` inside the root is timm's and BiT's form, whose gradient is finite also for
    equal weights; the paper adds its eps to the root, and its authors' code adds 1e-5 to the root of the
    *unbiased* variance. With fan-in n that is `sqrt((n - 1) / n)` times this, which the norm behind the layer
    cancels. Such a norm is taken for granted: standardized weights alone make each layer's output about
    `sqrt(n)` times larger. The weights keep no scale of their own, nor is there a gain.

    The model is changed in place by torch's parametrizations: in the state dict, `weight` becomes
    `parametrizations.weight.original`, the same parameter as before, so an optimizer that has it stays valid.
    Initialize the weights before. Copying, compiling, exporting, pickling, shared weights and removal are as in
    `weight_norm`; removal keeps W'.

    Args:
        model: all of its `Conv*d` and `ConvTranspose*d`, or one such layer itself.
        eps: added to the variance of the weights.
        linear: also take `Linear` layers. The paper's are convolutions; leave the last layer of a classifier
            out (`exclude="classifier"`), since standardized logits cannot choose their scale.
        include: only layers whose path matches one of these patterns (`"features.*"`; `*` matches dots too).
        exclude: no layer whose path matches one of these.

    Raises ValueError, before anything is changed, as `weight_norm` does (zero weights are fine), for a negative
    eps, and for a fan-in of 1, whose standardized weight is always zero.

    Source: Qiao et al. 2019 (arXiv 1903.10520), section 3.

    >>> layer = weight_standardization(nn.Conv2d(3, 8, 5))
    >>> variance, mean = torch.var_mean(layer.weight.detach(), (1, 2, 3), correction=0)
    >>> bool((variance - 1).abs().max() < 0.01), bool(mean.abs().max() < 1e-6)
    (True, True)
    """
    if eps < 0:
        raise ValueError(f"weight_standardization: eps must not be negative, got {eps}")
    types: tuple[type[Layer], ...] = (nn.Linear, _ConvNd) if linear else (_ConvNd,)
    layers = _layers("weight_standardization", model, types, include, exclude)
    for layer, path in layers.items():
        if _rows(layer.weight, _groups(layer))[0].numel() == 1:
            raise ValueError(
                f"weight_standardization: {described(path, layer)} has one weight per output, which would always "
                "be standardized to zero; exclude it"
            )

    def register(layer: Layer) -> None:
        parametrize.register_parametrization(layer, "weight", _Standardized(eps, _groups(layer)))

    _reparametrize(layers, register)
    return model


def is_weight_norm(module: nn.Module) -> bool:
    """Whether `module` is the parametrization `g v / ||v||` of a parameter; its `original0` is g."""
    return isinstance(module, parametrize.ParametrizationList) and isinstance(
        module[0], (parametrizations._WeightNorm, _GroupedWeightNorm)
    )


def parametrization_of(layer: nn.Module) -> parametrize.ParametrizationList:
    """What the layer's weight is computed by and from."""
    found = layer.get_submodule("parametrizations.weight")
    assert isinstance(found, parametrize.ParametrizationList)
    return found


def described(path: str, layer: nn.Module) -> str:
    """The layer with its path, for messages."""
    return f"{path or 'the layer'} ({type(layer).__name__}({layer.extra_repr()}))"


class _GroupedWeightNorm(nn.Module):
    """`g v / ||v||` for a transposed convolution with groups, where torch's would mix the groups' outputs."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, g: Tensor, v: Tensor) -> Tensor:
        split = _split(v, self.groups)
        return (split * (g / self.length(split))).flatten(0, 1)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return self.length(_split(weight, self.groups)), weight

    def length(self, split: Tensor) -> Tensor:
        """Per output, (groups, 1, outputs / groups, 1, ...)."""
        axes = [axis for axis in range(split.dim()) if axis not in (0, 2)]
        length: Tensor = torch.linalg.vector_norm(split, dim=axes, keepdim=True)
        return length


class _Standardized(nn.Module):
    """`(W - mean(W)) / sqrt(var(W) + eps)`."""

    def __init__(self, eps: float, groups: int | None) -> None:
        super().__init__()
        self.eps = eps
        self.groups = groups

    def forward(self, weight: Tensor) -> Tensor:
        rows = _rows(weight, self.groups)
        flat = rows.flatten(1)
        # Layer norm over a row is the same formula, in one kernel with exact moments.
        standardized: Tensor = F.layer_norm(flat, flat.shape[1:], eps=self.eps).view(rows.shape)
        if self.groups is None:
            return standardized
        return _split(standardized, self.groups).transpose(1, 2).flatten(0, 1)


def _groups(layer: nn.Module) -> int | None:
    """The groups of a transposed convolution, in each of which the outputs are on axis 1; None: on axis 0."""
    return layer.groups if isinstance(layer, _ConvTransposeNd) else None


def _rows(weight: Tensor, groups: int | None) -> Tensor:
    """The weight with its outputs on axis 0 and all that is summed over behind it; `groups` as in `_groups`."""
    return weight if groups is None else _split(weight, groups).transpose(1, 2).flatten(0, 1)


def _split(weight: Tensor, groups: int) -> Tensor:
    """(C, ...) as (groups, C / groups, ...)."""
    return weight.reshape(groups, -1, *weight.shape[1:])


def _layers(
    what: str, model: nn.Module, types: tuple[type[Layer], ...], include: Patterns, exclude: Patterns
) -> dict[Layer, str]:
    """The layers to reparametrize, each once, with its path."""
    paths = paths_of(model, types)
    if not paths:
        missing = (
            "neither Linear layer nor convolution"
            if nn.Linear in types
            else "no convolution; linear=True takes Linear layers too"
        )
        raise ValueError(f"{what}: {type(model).__name__} has {missing}")
    layers = chosen(what, paths, include, exclude)
    _check(what, model, layers)
    return layers


def _check(what: str, model: nn.Module, layers: dict[Layer, str]) -> None:
    """Each weight must be a parameter with values, and shared, if at all, among layers of one kind."""
    for layer, path in layers.items():
        if layer._parameters.get("weight") is None:
            raise ValueError(
                f"{what}: the weight of {described(path, layer)} is no parameter but computed from others already; "
                'exclude it, or call torch.nn.utils.parametrize.remove_parametrizations(layer, "weight") first'
            )
        if is_lazy(layer.weight):
            raise ValueError(
                f"{what}: the weight of {described(path, layer)} has no values yet; run one batch through the "
                "model first"
            )
    owner = {layer.weight: layer for layer in layers}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            layer = owner.get(parameter, module)
            if layer is module or (
                name == "weight" and module in layers and _groups(module) == _groups(layer)
            ):
                continue
            raise ValueError(
                f"{what}: {described(layers[layer], layer)} shares its weight with {path}.{name}, which is not "
                "reparametrized in the same way; exclude the layer, or give it a parameter of its own"
            )


def _reparametrize(layers: dict[Layer, str], register: Callable[[Layer], None]) -> None:
    """Register on each layer; those that share their weight share what it is computed from."""
    made: dict[Tensor, nn.Module] = {}
    for layer in layers:
        weight = layer.weight
        register(layer)
        parametrization = parametrization_of(layer)
        for name, parameter in made.setdefault(weight, parametrization).named_parameters():
            setattr(parametrization, name, parameter)
