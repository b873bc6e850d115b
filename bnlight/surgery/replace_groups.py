"""Let optimizers follow when layers, and with them parameters, are exchanged."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from bnlight.surgery.parameters import norm_parameters

Optimizers = Optimizer | Iterable[Optimizer] | None


def as_list(optimizer: Optimizers) -> list[Any]:
    """The optimizers; TypeError if something is none."""
    many = [] if optimizer is None else [optimizer] if hasattr(optimizer, "param_groups") else [*optimizer]
    for one in many:
        if not hasattr(one, "param_groups"):
            raise TypeError(f"replace_norm: expected an optimizer, or a list of them, got {one!r}")
    return many


def follow(
    optimizers: list[Any], model: nn.Module, gone: Iterable[Tensor], stand_for: Mapping[Tensor, list[Tensor]]
) -> None:
    """Take out what is gone, with its state, and put each new parameter where those were that it stands for.

    A new parameter follows the first of them that an optimizer has; one that stands for none goes to the end of
    the group in which the model's other norms are. If the optimizers have none of those it stands for, somebody
    has left them out, and it stays out.
    """
    away = {*gone}
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    has = {p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    behind: dict[Tensor, list[Tensor]] = {}
    homeless: list[Tensor] = []
    for new, old in stand_for.items():
        anchor = next((parameter for parameter in old if parameter in has), None)
        if new not in has and anchor is not None:
            behind.setdefault(anchor, []).append(new)
        elif new not in has and not old and new.requires_grad:
            homeless.append(new)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            _rewrite(group, away, behind, names)
        for parameter in away & optimizer.state.keys():
            del optimizer.state[parameter]
    if homeless and optimizers:
        group = _group_of_norms(optimizers, model)
        group["params"].extend(homeless)
        if "param_names" in group:
            group["param_names"].extend(names[parameter] for parameter in homeless)


def _rewrite(
    group: dict[str, Any],
    away: set[Tensor],
    behind: Mapping[Tensor, list[Tensor]],
    names: Mapping[Tensor, str],
) -> None:
    known = dict(zip(group["params"], group.get("param_names", ()), strict=False))
    kept: list[Tensor] = []
    for parameter in group["params"]:
        kept += [] if parameter in away else [parameter]
        kept += behind.get(parameter, [])
    group["params"][:] = kept  # some optimizers hold on to the list
    if "param_names" in group:
        group["param_names"][:] = [known.get(parameter) or names[parameter] for parameter in kept]


def _group_of_norms(optimizers: list[Any], model: nn.Module) -> dict[str, Any]:
    norms = {*norm_parameters(model)}
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    found: dict[str, Any] = max(groups, key=lambda group: sum(p in norms for p in group["params"]))
    return found
