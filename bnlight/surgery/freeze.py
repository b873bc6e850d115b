"""Norms that no longer move, and back."""

from typing import Any, Self

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

from bnlight.norm.paths import Patterns, chosen, paths_of
from bnlight.surgery.dress import Dress, dress, undress
from bnlight.surgery.known import is_norm
from bnlight.surgery.parameters import warn_of_scripted


class Frozen(Dress):
    """What `freeze_norm` lets a norm do: stay in evaluation mode."""

    _thawed: tuple[bool | None, dict[str, bool]]
    """Whether the layer would train now (None: as the module around it), and which of its parameters did."""
    training: bool

    def train(self, mode: bool = True) -> Self:
        """Remember the mode, which the layer's children take, for the time after."""
        super().train(mode)  # type: ignore[misc]
        self.__dict__["_thawed"] = mode, self._thawed[1]
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "training":  # set by who has read a flag and puts it back: Lightning, after a validation
            self.__dict__["_thawed"] = None, self._thawed[1]
            value = False
        super().__setattr__(name, value)


def freeze_norm(
    model: nn.Module, *, include: Patterns = None, exclude: Patterns = None, affine: bool = True
) -> nn.Module:
    """Let the norms of a model stand still in training, bit for bit, until `unfreeze_norm`; returns the model.

    All of bnlight's and torch's norms normalize as in evaluation, by the running averages they have, whatever
    `model.train()` says later. Their buffers do not move, and their weights and biases have no gradient, so that
    an optimizer leaves them alone, with momentum and weight decay too. Layers, state-dict keys and everything
    else stay as they are; copies are frozen, and `sync_norm` and `unsync_norm` change nothing about it.

    `requires_grad_(False)` alone does not stop the running averages, and `layer.eval()` lasts until the next
    `model.train()`.

    DistributedDataParallel counts on the gradients of all parameters that had one when it was made: freeze before
    wrapping the model, or make it with `find_unused_parameters=True`, or freeze the statistics alone.

    Args:
        include: only norms whose path matches one of these patterns (`"backbone.*"`; `*` matches dots too). To
            freeze a part that is a module of its own, pass that: `freeze_norm(model.backbone)`.
        exclude: no norm whose path matches one of these.
        affine: False freezes the statistics, and trains weights and biases on.

    Raises ValueError if a pattern matches no norm, and RuntimeError for a DistributedDataParallel model that would
    miss the gradients. Warns of norms in scripted modules, which cannot be frozen.

    >>> model = freeze_norm(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))).train()
    >>> model[1].training, model[1].weight.requires_grad
    (False, False)
    """
    paths: dict[nn.Module, list[str]] = paths_of(model, is_norm)
    if include is not None or exclude is not None:
        paths = {layer: [path] for layer, path in chosen("freeze_norm", paths, include, exclude).items()}
    else:
        warn_of_scripted("freeze_norm", model)
    layers = {layer: _parameters(layer) for layer in paths}
    trained = {p for parameters in layers.values() for p in parameters.values() if affine and p.requires_grad}
    if isinstance(model, DistributedDataParallel) and trained and not model.find_unused_parameters:
        raise RuntimeError(
            "freeze_norm: DistributedDataParallel would wait for the gradients of the norms' weights and biases; "
            "freeze before wrapping the model, make it with find_unused_parameters=True, or use affine=False"
        )
    for layer, parameters in layers.items():
        known, flags = getattr(layer, "_thawed", (layer.training, {}))
        flags = {name: parameter in trained for name, parameter in parameters.items() if affine} | flags
        layer.training = False
        layer.__dict__["_thawed"] = known, flags
        dress(layer, Frozen)
    for parameter in trained:
        parameter.requires_grad = False  # what a lazy parameter takes too
        parameter.grad = None  # one of zeros would let momentum and weight decay go on
    return model


def unfreeze_norm(model: nn.Module) -> nn.Module:
    """Let the norms move again; returns the model.

    Their parameters have the `requires_grad` that they had, the layers the mode that they would have by now.
    """
    trained = set()
    around = {child: module for module in model.modules() for child in module.children()}
    for layer in model.modules():
        if isinstance(layer, Frozen):
            mode, flags = layer.__dict__.pop("_thawed")
            parameters: dict[str, Any] = _parameters(layer)
            trained |= {parameters[name] for name, flag in flags.items() if flag and name in parameters}
            undress(layer, Frozen)
            layer.training = mode if mode is not None else layer not in around or around[layer].training
    for parameter in trained:
        parameter.requires_grad = True
    return model


def _parameters(layer: nn.Module) -> dict[str, nn.Parameter]:
    """The norm's own parameters, those that a parametrization computes them from included."""
    own = dict(layer.named_parameters(recurse=False))
    if parametrize.is_parametrized(layer):
        assert isinstance(layer.parametrizations, nn.ModuleDict)
        prefix = "parametrizations."
        own |= {prefix + name: p for name, p in layer.parametrizations.named_parameters()}
    return own
