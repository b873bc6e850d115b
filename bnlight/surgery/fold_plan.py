"""Decide which norm is folded into which layer."""

from __future__ import annotations

from torch import nn

from bnlight.surgery.fold_rules import (
    Affine,
    affine_of,
    behind,
    channels_problem,
    is_layer,
    is_norm,
    layer_problem,
    needs_rows,
    norm_problem,
    padding_problem,
)
from bnlight.surgery.fold_trace import Flow, is_idle


class Plan:
    """What is folded into which layer (`folded`), by which maps (`before`, `after`), and what is `kept`, and why.

    All are by path. `rows` are those of the folded norms that stand beside a Linear for input (N, C) only. The
    model is a copy, in evaluation, that tracing may call.
    """

    def __init__(self, model: nn.Module, excluded: set[str]) -> None:
        self.before: dict[str, Affine] = {}
        self.after: dict[str, Affine] = {}
        self.folded: dict[str, str] = {}
        self.kept: dict[str, str] = {}
        self.rows: set[str] = set()
        norms = {module: path for path, module in model.named_modules() if is_norm(module)}
        possible = {norm: path for norm, path in norms.items() if self._possible(norm, path, excluded)}
        if not possible:
            return
        layers = {module for module in model.modules() if is_layer(module)}
        self.flow = Flow(model, {*norms, *layers})
        self.done: set[nn.Module] = set()
        self._fold_all(possible, after=True)
        self._fold_all(possible, after=False)
        self.kept = {path: self.kept[path] for path in norms.values() if path not in self.folded}

    def _possible(self, norm: nn.Module, path: str, excluded: set[str]) -> bool:
        reason = "excluded" if path in excluded else norm_problem(norm)
        if reason:
            self.kept[path] = reason
        return reason is None

    def _fold_all(self, norms: dict[nn.Module, str], *, after: bool) -> None:
        """Fold what can be folded; a norm that is done lets the next one come nearer."""
        changed = True
        while changed:
            changed = False
            for norm, path in norms.items():
                if norm in self.done:
                    continue
                layer, reason = self._partner(norm, after=after)
                if layer is None:
                    self.kept[path] = reason if after else "; ".join(filter(None, (self.kept[path], reason)))
                else:
                    self._fold(norm, path, layer, after=after)
                    changed = True

    def _fold(self, norm: nn.Module, path: str, layer: nn.Module, *, after: bool) -> None:
        into, affine = self.flow.paths[layer], affine_of(norm)
        if after:
            earlier = self.after.get(into)
            self.after[into] = affine if earlier is None else earlier.then(affine)
        else:
            later = self.before.get(into)
            self.before[into] = affine if later is None else affine.then(later)
        self.folded[path] = into
        self.done.add(norm)
        if needs_rows(norm, layer):
            self.rows.add(path)

    def _partner(self, norm: nn.Module, *, after: bool) -> tuple[nn.Module | None, str]:
        """The layer to fold into, or None and the reason."""
        flow = self.flow
        if norm in flow.hooked:
            return None, "it has hooks" if after else ""
        if norm in flow.unseen or norm not in flow.calls:
            return None, flow.unseen.get(norm, "the forward does not call it") if after else ""
        if not all(flow.has_one_input(call) for call in flow.calls[norm]):
            return None, "it is called with more than its input" if after else ""
        step, back = (flow.source, flow.target) if after else (flow.target, flow.source)
        found = {step(call, self._through) for call in flow.calls[norm]}
        layer = found.pop()
        if found:
            return None, "it is called in several places" if after else ""
        if layer is None or not is_layer(layer):
            return None, flow.reason(flow.calls[norm][0], self._through) if after else ""
        name = f"'{flow.paths[layer]}'"
        if layer in flow.hooked:
            return None, f"{name} has hooks"
        if layer in flow.unseen:
            return None, f"{name}: {flow.unseen[layer]}"
        if problem := layer_problem(layer):
            return None, f"{name} {problem}"
        if any(back(call, self._through) is not norm for call in flow.calls[layer]):
            return None, f"{name} is called elsewhere too"
        if not after and not isinstance(behind(norm), nn.Identity):
            return None, f"it does more than normalize before {name}"
        problem = channels_problem(norm, layer, after=after)
        if (
            problem is None
            and not after
            and any(flow.changed_before(call, self._through) for call in flow.calls[norm])
        ):
            problem = f"something is changed in place between it and {name}, and could be its input"
        if problem is None and not after:
            problem = padding_problem(layer, affine_of(norm).shift)
        return (None, problem) if problem else (layer, "")

    def _through(self, module: nn.Module) -> bool:
        return is_idle(module) or (module in self.done and isinstance(behind(module), nn.Identity))
