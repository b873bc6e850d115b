"""The running averages of the layers whose statistics come from the batch: how they move, evaluate and load."""

import math
from collections.abc import Callable
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor

from bnlight.norm.base import Norm, Shared, new_statistic
from bnlight.norm.core import Moments, can_read_values, converted, follow, moments, snapshot
from bnlight.norm.instances import InstanceMoments
from bnlight.norm.layout import batch_norm

Observer = Callable[[Moments, Tensor | None], None]
"""Receives a training batch's moments, and which of its groups count, in place of the running averages."""
_CORRECTION = ("example_weight", "example_var")


def reads_values(x: Tensor) -> bool:
    """Whether Python may look at a value without waiting for a device, and there is one."""
    return x.is_cpu and can_read_values() and torch._C._len_torch_dispatch_stack() == 0


def finite(mean: Tensor, spread: Tensor) -> Tensor:
    """Whether a batch with this mean and variance may move averages."""
    return torch.maximum(mean.abs(), spread).amax() < math.inf


class RunningAverages(Norm):
    """Base of the layers that evaluate by averages of the training batches' statistics.

    The state is torch's: `running_mean`, `running_var`, `num_batches_tracked`. `bnlight.correct_inference` adds
    the weight of a sample's own statistics.
    """

    not_in_torch: ClassVar[tuple[str, ...]] = ()
    """Names of the state that a `torch.nn.BatchNorm*` state dict does not have."""

    warm_start = False
    """Whether the running averages are plain ones of all batches until `momentum` is the larger weight."""

    skipped_batches = 0
    """Number of training batches whose mean or variance was not finite, and which moved no average.

    They are skipped everywhere, but counted on the CPU only: a compiled graph or an accelerator would have to wait.
    The count is of this process; it is in no state dict, and `reset_running_stats` sets it to 0.
    """

    _version = 2  # as torch.nn.BatchNorm: since 2 a state dict has num_batches_tracked

    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    example_weight: Tensor | None
    example_var: Tensor | None

    def __init__(self, num_features: int, *, momentum: float | None = 0.1, **shared: Unpack[Shared]) -> None:
        super().__init__(num_features, **shared)
        if momentum is not None and not 0 <= momentum <= 1:
            raise ValueError(
                f"{type(self).__name__}: momentum must be in [0, 1] or None, got {momentum}. It is the weight of "
                "the new batch, as in torch; a Keras momentum m is 1 - m here"
            )
        self.momentum = momentum
        self.observer: Observer | None = None
        buffers = {
            "running_mean": new_statistic(0, (num_features,), shared),
            "running_var": new_statistic(1, (num_features,), shared),
            "num_batches_tracked": torch.zeros((), device=shared.get("device"), dtype=torch.long),
        }
        for key, buffer in buffers.items():
            self.register_buffer(key, buffer)
        for key in _CORRECTION:  # set by bnlight.correct_inference
            self.register_buffer(key, None)

    def reset_parameters(self) -> None:
        """Set weight and bias to their initial values, and forget all batches."""
        super().reset_parameters()
        if "running_mean" in self._buffers:
            self.reset_running_stats()

    def reset_running_stats(self) -> None:
        """Set the running mean to 0, the running variance to 1 and the number of batches to 0."""
        if (
            self.running_mean is not None
            and self.running_var is not None
            and self.num_batches_tracked is not None
        ):
            self.running_mean.zero_()
            self.running_var.fill_(1)
            self.num_batches_tracked.zero_()
            self.skipped_batches = 0

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """As every module's; torch.export loses count if a buffer comes after one that is None."""
        super().register_buffer(name, tensor, persistent)
        for key in _CORRECTION:
            if self._buffers.get(key, self) is None:
                self._buffers[key] = self._buffers.pop(key)

    def update(self, mean: Tensor, spread: Tensor, rate: float | Tensor) -> None:
        """Move the running averages one step towards `mean` and `spread`, in place."""
        running_mean, running_var = self.running_mean, self.running_var
        assert running_mean is not None
        assert running_var is not None
        follow(running_mean, mean, rate)
        follow(running_var, spread, rate)

    def accepted(
        self, mean: Tensor, spread: Tensor, rate: float | Tensor
    ) -> tuple[Tensor, Tensor, float | Tensor] | None:
        """The step of the averages if the batch is finite; else none, and the batch no longer counts."""
        if not reads_values(mean):
            moves = finite(mean, spread)
            self._count_batch(moves.long() - 1)
            return torch.where(moves, mean, 0), torch.where(moves, spread, 0), rate * moves.to(mean.dtype)
        if math.isfinite(mean.dot(spread).item()) or bool(finite(mean, spread)):  # the product may overflow
            return mean, spread, rate
        self._count_batch(-1)
        self.skipped_batches += 1
        return None

    def stay_finite(self, mean: Tensor, var: Tensor, before: Tensor | None) -> None:
        """Take the step of the averages that a kernel made, unless it ends where they are finite no longer.

        It moved `mean` and `var`, which are the averages themselves if `before`, `(2 * C,)`, says what they were.
        """
        if before is not None and math.isfinite(mean.dot(var).item()):
            return
        own: list[Tensor] = [self._buffers[name] for name in ("running_mean", "running_var")]  # type: ignore[misc]
        old, new = torch.cat(own) if before is None else before, torch.cat((mean, var))
        stays = (new.isfinite() | ~old.isfinite()).all()
        for average, right in zip(own, torch.where(stays, new, old).chunk(2), strict=True):
            # A backward may hold the averages themselves, at this version.
            (average if before is None else average.data).copy_(right)
        self._count_batch(stays.long() - 1)
        if before is not None and not bool(stays):
            self.skipped_batches += 1

    def _count_batch(self, number: Tensor | int) -> None:
        tracked = self._buffers["num_batches_tracked"] if self.training else None
        if tracked is not None and self.observer is None:
            tracked.add_(number)

    def counts_batches(self) -> bool:
        """Whether the weight of a batch depends on how many came before."""
        return self.momentum is None or self.warm_start

    def rate(self) -> float | Tensor:
        """Weight of this batch in the running averages."""
        if not self.counts_batches() or (tracked := self.num_batches_tracked) is None:
            return self.momentum or 0.0
        if not can_read_values() or tracked.device.type != "cpu":
            kind = torch.float32 if self.running_mean is None else self.running_mean.dtype
            return tracked.clamp(min=1).to(kind).reciprocal().clamp(min=self.momentum or 0.0)
        return max(1 / max(1, int(tracked)), self.momentum or 0.0)

    def running_statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Running mean and variance in the dtype of the statistics `like`, 0 and 1 where the layer has none."""
        mean, var = self._buffers["running_mean"], self._buffers["running_var"]
        if mean is None or var is None:
            mean = torch.zeros(self.num_features, device=like.device, dtype=like.dtype)
            return mean, torch.ones_like(mean)
        mean, var = converted(mean, like.dtype), converted(var, like.dtype)
        if self.training and torch.compiler.is_compiling():
            return snapshot(mean), snapshot(var)
        return mean, var

    def evaluation_statistics(self, samples: InstanceMoments) -> tuple[Tensor, Tensor]:
        """The running averages, `(C,)`, or, corrected, the mean and variance of each sample's own, `(N, C)`."""
        mean, var = self.running_statistics(samples.mean)
        weight, example_var = self.example_weight, self.example_var
        if self.training:  # the next batch may move the averages before this one's backward reads them
            return mean.clone(), var.clone()
        if weight is None or example_var is None:
            return mean, var
        if self.observer is not None:
            seen = None if samples.valid is None else (samples.number > 0).expand_as(samples.mean)
            self.observer(moments(samples.mean, seen), None)
        weight, example_var = converted(weight, mean.dtype), converted(example_var, mean.dtype)
        deviation = samples.mean - mean
        between = (1 - weight) * (deviation.square() - example_var)
        return mean + weight * deviation, (var + weight * (samples.var - var + between)).clamp(min=0)

    def by_running_statistics(self, x: Tensor, valid: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
        """Normalize by the running averages, in evaluation by the corrected ones if there are such."""
        if self.example_weight is not None and not self.training:
            samples = InstanceMoments(x, valid)
            return samples.normalize(*self.evaluation_statistics(samples), weight, bias, self.eps)
        mean, var = self.running_statistics(weight)
        if self.training:  # the next batch may move the averages before this one's backward reads them
            mean, var = mean.clone(), var.clone()
        return batch_norm(x, weight, bias, mean, var, False, 0.0, self.eps, torch.backends.cudnn.enabled)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        for name in _CORRECTION:
            saved = state_dict.get(prefix + name)
            if isinstance(saved, Tensor) and self.running_mean is not None:
                setattr(self, name, self.running_mean.new_empty(saved.shape))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        optional = [{prefix + name for name in names} for names in (self.not_in_torch, _CORRECTION)]
        if (local_metadata.get("version") or 1) < 2:
            optional.append({prefix + "num_batches_tracked"})
        for keys in optional:
            if keys <= set(missing_keys):
                missing_keys[:] = [key for key in missing_keys if key not in keys]
