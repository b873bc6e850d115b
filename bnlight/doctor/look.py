"""Look at one forward of a model in training mode: what its norms get, and where it comes from."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.hooks import RemovableHandle

from bnlight.norm.batch import BatchStatistics
from bnlight.norm.paths import named_layers
from bnlight.surgery.fold_rules import is_norm

MOVING_DROPOUT = 0.1
"""A dropout below this changes the variance by less than a tenth."""


ENOUGH = 512
"""So many values of a channel tell whether two inputs are alike."""


@dataclass
class Call:
    """One call of a norm: its input's shape, how many samples and values are behind each channel's statistics."""

    shape: tuple[int, ...]
    by_batch: bool
    samples: int
    values: int
    forward: int
    """The outermost call of a module in which it happened."""
    mean: Tensor | None = None
    var: Tensor | None = None
    compared: int = 0
    """Of so many values per channel."""
    checkpointed: bool = False
    node: Any = None
    """Where its input was computed, in the graph of the backward."""


@dataclass
class Look:
    """What was seen: the calls of each norm, and the norms that get what a dropout returns."""

    model: nn.Module
    """Its submodules are looked at."""
    count_root: bool = True
    """Whether a call of the model itself is the outermost; False where it only leads to those of its parts."""
    calls: dict[nn.Module, list[Call]] = field(default_factory=dict)
    dropped: dict[nn.Module, nn.Module] = field(default_factory=dict)
    """For the first norms behind a dropout, that dropout."""

    def __post_init__(self) -> None:
        self.paths: dict[nn.Module, str] = {m: path for path, m in named_layers(self.model)}
        self._depth = self._forward = 0
        self._dropouts: dict[Any, nn.Module] = {}
        self._norm_outputs: set[Any] = set()
        self._handles: list[RemovableHandle] = []

    def begin(self) -> None:
        """Look from now on."""
        for module in self.paths:
            if module is not self.model or self.count_root:
                self._handles += [
                    module.register_forward_pre_hook(self._enter, prepend=True),
                    module.register_forward_hook(self._leave, always_call=True),
                ]
            if is_norm(module):
                self._handles.append(module.register_forward_pre_hook(self._see, with_kwargs=True))
                self._handles.append(module.register_forward_hook(self._see_output))
            elif isinstance(module, _DropoutNd) and module.p >= MOVING_DROPOUT:
                self._handles.append(module.register_forward_hook(self._see_dropout))

    def end(self) -> None:
        """Look no longer, and follow the dropouts to the norms; before the backward."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for norm, calls in self.calls.items():
            for call in calls:
                source = self._source(call.node) if call.by_batch else None
                if source is not None:
                    self.dropped[norm] = source
                call.node = None
        self._dropouts, self._norm_outputs = {}, set()

    def _enter(self, module: nn.Module, args: Any) -> None:
        if self._depth == 0:
            self._forward += 1
        self._depth += 1

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._depth -= 1

    def _see(self, norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()), None)
        if not isinstance(x, Tensor) or x.dim() < 2 or x.numel() == 0:
            return
        axis = getattr(norm, "channel_dim", 1)
        samples, values = x.size(0), x.numel() // x.size(axis)
        if isinstance(norm, BatchStatistics) and norm.virtual_batch_size is not None:
            groups = max(1, samples // norm.virtual_batch_size)
            samples, values = samples // groups, values // groups
        call = Call(tuple(x.shape), uses_batch(norm), samples, values, self._forward)
        if call.by_batch:
            call.mean, call.var, call.compared = _moments(x.detach(), axis % x.dim())
            call.node = x.grad_fn
            call.checkpointed = isinstance(norm, _BatchNorm) and _inside_checkpoint()
        self.calls.setdefault(norm, []).append(call)

    def _see_output(self, norm: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.grad_fn is not None and uses_batch(norm):
            self._norm_outputs.add(output.grad_fn)

    def _see_dropout(self, module: nn.Module, args: Any, output: Any) -> None:
        if module.training and isinstance(output, Tensor) and output.grad_fn is not None:
            self._dropouts[output.grad_fn] = module

    def _source(self, node: Any) -> nn.Module | None:
        """The dropout whose output reaches `node` without another norm of the batch between."""
        waiting, met = [node], set()
        while self._dropouts and waiting:
            node = waiting.pop()
            if node is None or node in met or node in self._norm_outputs:
                continue
            if node in self._dropouts:
                return self._dropouts[node]
            met.add(node)
            waiting += [before for before, _ in node.next_functions]
        return None


def uses_batch(norm: nn.Module) -> bool:
    """Whether a norm, in the mode it is in, takes its statistics from the batch."""
    if isinstance(norm, BatchStatistics):
        return norm.training or not norm.track_running_stats
    return isinstance(norm, _BatchNorm) and (norm.training or norm.running_mean is None)


def _moments(x: Tensor, axis: int) -> tuple[Tensor, Tensor, int]:
    """Mean and variance of each channel, of about `ENOUGH` values all over x, and how many those were."""
    axes = [other for other in range(x.dim()) if other != axis]
    step = (x.numel() / x.size(axis) / ENOUGH) ** (1 / len(axes))
    some = x[
        tuple(slice(None, None, 1 if other == axis else max(1, round(step))) for other in range(x.dim()))
    ]
    var, mean = torch.var_mean(some.float(), axes, correction=0)
    return mean, var, some.numel() // some.size(axis)


def _inside_checkpoint() -> bool:
    """Whether this is called from torch.utils.checkpoint, whose backward calls it again."""
    frame: Any = sys._getframe()
    while frame is not None:
        if (
            frame.f_code.co_name == "checkpoint"
            and frame.f_globals.get("__name__") == "torch.utils.checkpoint"
        ):
            return True
        frame = frame.f_back
    return False


@contextmanager
def looking(look: Look) -> Iterator[Look]:
    """Look within the block; also at what an error let happen of it."""
    look.begin()
    try:
        yield look
    finally:
        look.end()
