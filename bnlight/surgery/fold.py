"""Fold the norms of a model into its layers, for evaluation."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from bnlight.norm.paths import Patterns, chosen, is_compiled, unwrapped
from bnlight.surgery.dress import Dress, dress
from bnlight.surgery.fold_plan import Plan
from bnlight.surgery.fold_rules import FoldedNorm, behind, is_norm, materialize, rescale
from bnlight.surgery.replace_places import exchange


@dataclass
class FoldReport:
    """What became of the norms of a model; prints as a table."""

    folded: dict[str, str] = field(default_factory=dict)
    """Path of a norm to the path of the layer that does its work now."""
    kept: dict[str, str] = field(default_factory=dict)
    """Path of a norm that stayed to the reason."""

    def __str__(self) -> str:
        rows = [(path, f"into {layer}") for path, layer in self.folded.items()]
        rows += [(path or "the model", f"stays: {reason}") for path, reason in self.kept.items()]
        width = max((len(path) for path, _ in rows), default=0)
        title = f"{len(self.folded)} of {len(rows)} norms folded"
        return "\n".join([title, *(f"  {path:<{width}}  {what}" for path, what in rows)])


class Evaluation(Dress):
    """A model that stays in evaluation: the norms that would need a batch in training are gone."""

    def train(self, mode: bool = True) -> Any:
        return super().train(False)  # type: ignore[misc]


@torch.no_grad()
def fold_norm(model: nn.Module, *, exclude: Patterns = None) -> nn.Module:
    """A copy of `model` for evaluation, in which the layers beside the norms do their work; the original stays.

    `norm(W x + b) = (s W) x + (s b + t)` and `W norm(x) + b = (W s) x + (W t + b)`

    with the norm's scale `s = weight / sqrt(running_var + eps)` and shift `t = bias - s * running_mean` in each
    channel. Outputs are equal up to rounding; the new weights are computed in float64 and rounded once.

    Folded are the norms that are such a map in evaluation (torch's BatchNorm, SyncBatchNorm, and InstanceNorm
    with running statistics; bnlight's BatchNorm, BatchRenorm, FullNorm, MeanOnlyBatchNorm and affine NoNorm)
    into the Linear, Conv1d to 3d or ConvTranspose1d to 3d before them, or else into a Linear or a convolution
    without zero padding behind them. Only identities, dropout and other folded norms may stand between. Neither
    may be called elsewhere, have hooks, or be of a subclass with a forward of its own; weights that are computed
    (weight norm) become plain ones. All other norms stay, each with its reason in the report.

    The copy has the same modules, with an identity in the place of a norm, and in `.fold_report` a `FoldReport`.
    It stays in evaluation: `train()` has no effect on it, so that it can be part of a model that is trained (a
    teacher). It pickles, exports and compiles as the original does; what is compiled there is not so in the copy.

    Which output goes where is read from the model's forward by `torch.fx`, called with its default arguments. A
    submodule whose forward cannot be traced (control flow that depends on data) is taken to call its own
    submodules as wholes. Inputs have a batch axis. Where a norm's channels are axis 1 and a Linear's the last,
    folding is for input (N, C), and the copy raises ValueError for any other: then `exclude` the norm.

    Args:
        model: any module; wrapped in DDP or DataParallel, the module inside.
        exclude: patterns of the paths of norms that stay (`"head.*"`; `*` matches dots too).

    Raises ValueError for a lazy module without values, and if a pattern of `exclude` matches no norm, TypeError
    for a scripted model.

    Source: Jacob et al. 2018 (arXiv 1712.05877), section 3.2.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    >>> print(fold_norm(net).fold_report)
    1 of 1 norms folded
      1  into 0
    """
    net = unwrapped(model)
    if isinstance(net, torch.jit.ScriptModule):
        raise TypeError("fold_norm: the model is scripted; fold it first, then script it")
    for path, module in net.named_modules():
        if any(is_lazy(tensor) for tensor in (*module._parameters.values(), *module._buffers.values())):
            raise ValueError(
                f"fold_norm: '{path}' ({type(module).__name__}) has no values yet; run a batch through the model first"
            )
    new = uncompiled(copied(net)).eval()
    norms = {path: module for path, module in new.named_modules() if is_norm(module)}
    left_out = chosen("fold_norm", {m: [path] for path, m in norms.items()}, exclude, None) if exclude else {}
    plan = Plan(uncompiled(copied(net, share_parameters=True)).eval(), {*left_out.values()})
    for path, layer in ((path, new.get_submodule(path)) for path in {*plan.before, *plan.after}):
        materialize(layer)
        rescale(layer, plan.before.get(path), plan.after.get(path))
    for path in plan.folded:
        described = f"{type(norms[path]).__name__}({norms[path].extra_repr()})"
        _replace(new, norms[path], FoldedNorm(path, described) if path in plan.rows else behind(norms[path]))
    folded = {path: plan.folded[path] for path in norms if path in plan.folded}
    new.fold_report = FoldReport(folded, plan.kept)  # type: ignore[assignment]
    if not isinstance(new, fx.GraphModule):  # whose class is made anew wherever it is unpickled
        dress(new, Evaluation)
    return new


def copied(model: nn.Module, *, share_parameters: bool = False) -> nn.Module:
    """A deep copy, with parameters of its own or those of the original.

    Tensors that a module has computed and keeps (torch's old `weight_norm` does) are copied without their graph,
    and a LightningModule without its Trainer.
    """
    memo: dict[int, Any] = {id(p): p for p in model.parameters()} if share_parameters else {}
    kept = chain.from_iterable(vars(module).values() for module in model.modules())
    memo |= {id(t): t.detach().clone() for t in kept if isinstance(t, Tensor) and not t.is_leaf}
    memo |= {id(t): None for m in model.modules() if (t := vars(m).get("_trainer")) is not None}
    return copy.deepcopy(model, memo)


def uncompiled(model: nn.Module) -> nn.Module:
    """The model, with its submodules in the places of what torch.compile has made of them."""
    exchange(
        model.modules(), {id(module): unwrapped(module) for module in model.modules() if is_compiled(module)}
    )
    return model


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for module in model.modules():
        for name, child in module._modules.items():
            if child is old:
                module._modules[name] = new.eval()
