"""torch's batch norm layers over the batches of all ranks, whatever else a subclass does."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from bnlight.norm.core import (
    Plan,
    can_read_values,
    converted,
    moments,
    normalize,
    statistics_dtype,
)
from bnlight.norm.layout import memory_layout
from bnlight.norm.recompute import Calls, comes_again, recomputing
from bnlight.norm.sync import Meeting, ProcessGroup, unbiased
from bnlight.surgery.dress import Dress, dress, plain_class, undress


class _Anywhere(_BatchNorm):
    """torch.nn.SyncBatchNorm with the forward of a plain layer, which runs on every device.

    DistributedDataParallel refuses every instance of SyncBatchNorm on CPU, so this is none.
    """

    _check_input_dim = nn.SyncBatchNorm._check_input_dim


class _AnywhereBelow(nn.SyncBatchNorm):
    """The same, below a subclass of SyncBatchNorm."""

    forward = _BatchNorm.forward


class Synchronized(Dress):
    """What `sync_norm` lets a layer of torch do: normalize a training batch over all ranks."""

    _sync: tuple[Meeting, Calls]
    training: bool

    @classmethod
    def over(cls, plain: Any) -> tuple[Any, ...]:
        if plain is nn.SyncBatchNorm:
            return (_Anywhere,)
        return (plain, _AnywhereBelow) if issubclass(plain, nn.SyncBatchNorm) else (plain,)

    @property
    def meeting(self) -> Meeting:
        """As bnlight's layers."""
        return self._sync[0]

    @property
    def process_group(self) -> ProcessGroup:
        """As bnlight's layers."""
        return self._sync[0].group

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's own forward, with the call of `torch.nn.functional.batch_norm` in it answered from here."""
        own: Callable[..., Any] = super().forward  # type: ignore[misc]
        meeting, calls = self._sync
        if not self.training or meeting.ranks() == 1:
            return own(*args, **kwargs)
        tracked = getattr(self, "num_batches_tracked", None)
        before = tracked.clone() if tracked is not None and recomputing() else None
        answered: list[bool] = []
        try:
            with _OverRanks(meeting, calls, answered):
                y = own(*args, **kwargs)
        finally:  # checkpointing may end a recomputed forward in the middle
            if tracked is not None and before is not None:
                tracked.copy_(before)
        if not answered:
            raise TypeError(
                f"synchronized layer {meeting.layer} '{meeting.path}' is a {plain_class(self).__name__}, whose forward "
                "did not call torch.nn.functional.batch_norm, so its statistics would be of this rank's batch alone. "
                "Let it call that (super().forward does), or use bnlight.norm.BatchNorm, or call unsync_norm on it"
            )
        return y


def synchronize(layer: nn.Module, meeting: Meeting) -> None:
    """Let a layer of torch meet the other ranks there."""
    layer.__dict__["_sync"] = meeting, Calls()
    dress(layer, Synchronized)


def unsynchronize(layer: nn.Module) -> None:
    """Make the layer what it was before."""
    undress(layer, Synchronized)
    layer.__dict__.pop("_sync", None)


class _OverRanks(TorchFunctionMode):
    """Answers F.batch_norm for a training batch; what else a forward calls goes its way."""

    def __init__(self, meeting: Meeting, calls: Calls, answered: list[bool]) -> None:
        super().__init__()
        self.meeting, self.calls, self.answered = meeting, calls, answered

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not F.batch_norm:
            return func(*args, **(kwargs or {}))
        self.answered.append(True)
        return _batch_norm(self.meeting, self.calls, *args, **(kwargs or {}))


def _batch_norm(
    meeting: Meeting,
    calls: Calls,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.batch_norm`, in training over the batches of all ranks that meet.

    Raises ValueError if all ranks together have one value per channel; without any the averages stay.
    """
    if not training:
        return F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    x = input if memory_layout(input) is not None else input.contiguous()
    kind, keep, again = statistics_dtype(x.dtype), comes_again(), recomputing()
    with torch.no_grad():
        local = moments(x)
        plan = calls.recall(local) if again else None
        if plan is None:
            mean, var, number, _ = meeting.merge(local)
            assert isinstance(number, Tensor)
            if isinstance(local.number, int) and local.number <= 1 and can_read_values() and number[0] == 1:
                raise ValueError(
                    f"synchronized layer {meeting.layer} '{meeting.path}': expected more than one value per channel "
                    f"on all ranks together, got one (input of shape {tuple(input.shape)} on this rank). Use a larger "
                    "batch, drop_last=True in the DataLoader, or a norm without batch statistics"
                )
            plan = Plan(mean, var, share=1 / number.clamp(min=1))
            targets = (running_mean, mean), (running_var, unbiased(var, number))
            for average, target in targets:
                if average is not None and not again:
                    new = torch.lerp(converted(average, kind), target, momentum)
                    average.copy_(torch.where(number > 0, new, average))
            if keep and not again:
                calls.remember(local, plan)
    like = plan.mean
    weight = torch.ones_like(like) if weight is None else converted(weight, kind)
    bias = torch.zeros_like(like) if bias is None else converted(bias, kind)
    return normalize(x, weight, bias, plan, eps, lambda dmean, dvar: _summed(meeting, dmean, dvar))


def _summed(meeting: Meeting, dmean: Tensor, dvar: Tensor) -> tuple[Tensor, Tensor]:
    dmean, dvar = meeting.sum(dmean, dvar)
    return dmean, dvar
