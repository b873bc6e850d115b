"""What the layers share whose statistics come from the batch: running averages, virtual and small batches."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar, Literal, Unpack

import torch
from torch import Tensor

from bnlight.norm.base import Norm, Shared, new_statistic
from bnlight.norm.core import Moments, Plan, WayBack, can_read_values, converted, follow, moments, snapshot
from bnlight.norm.instances import InstanceMoments
from bnlight.norm.recompute import Calls, comes_again, recomputing
from bnlight.norm.sync import Meeting, ProcessGroup
from bnlight.norm.virtual import VirtualBatches

SmallBatch = Literal["error", "running"]
Observer = Callable[[Moments, Tensor | None], None]
"""Receives a training batch's moments, and which of its groups count, in place of the running averages."""
_CORRECTION = ("example_weight", "example_var")


class Batch(Shared, total=False):
    """Arguments of every layer with batch statistics whose default is the same in all."""

    virtual_batch_size: int | None
    small_batch: SmallBatch


class BatchStatistics(Norm):
    """Base of the layers that normalize by the batch in training and by running averages in evaluation.

    A subclass says what a training batch does: how it is normalized (`plan`), what the second average follows
    (`spread`), and how the averages move (`update`).

    `process_group` says over whose batches the statistics are taken: None for this process's, "world" for all
    ranks' (the default group, looked up at each forward; local if there is none), or a ProcessGroup. Ranks
    may have batches of different sizes, or empty ones. Every rank must call the layer equally often.
    """

    cancels_bias: ClassVar[bool] = True

    not_in_torch: ClassVar[tuple[str, ...]] = ()
    """Names of the state that a `torch.nn.BatchNorm*` state dict does not have."""

    too_few: ClassVar[int] = 1
    """The number of values per channel that do not make a batch."""

    track_running_stats = True
    warm_start = False
    """Whether the running averages are plain ones of all batches until `momentum` is the larger weight."""

    _version = 2  # as torch.nn.BatchNorm: since 2 a state dict has num_batches_tracked

    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    example_weight: Tensor | None
    example_var: Tensor | None

    def __init__(
        self,
        num_features: int,
        *,
        momentum: float | None = 0.1,
        virtual_batch_size: int | None = None,
        small_batch: SmallBatch = "error",
        jitter: tuple[float, float] | None = None,
        **shared: Unpack[Shared],
    ) -> None:
        super().__init__(num_features, **shared)
        name = type(self).__name__
        if momentum is not None and not 0 <= momentum <= 1:
            raise ValueError(
                f"{name}: momentum must be in [0, 1] or None, got {momentum}. It is the weight of the new "
                "batch, as in torch; a Keras momentum m is 1 - m here"
            )
        if virtual_batch_size is not None and virtual_batch_size < 1:
            raise ValueError(
                f"{name}: virtual_batch_size must be at least 1 or None, got {virtual_batch_size}"
            )
        if small_batch not in ("error", "running"):
            raise ValueError(f"{name}: small_batch must be 'error' or 'running', got {small_batch!r}")
        if jitter is not None and (len(jitter) != 2 or min(jitter) < 0):
            raise ValueError(f"{name}: jitter must be None or (scale, shift), neither negative, got {jitter}")
        self.momentum = momentum
        self.virtual_batch_size = virtual_batch_size
        self.small_batch = small_batch
        self.jitter = jitter
        self.observer: Observer | None = None
        self.meeting = Meeting()
        self._calls = Calls()
        buffers = {
            "running_mean": new_statistic(0, (num_features,), shared),
            "running_var": new_statistic(1, (num_features,), shared),
            "num_batches_tracked": torch.zeros((), device=shared.get("device"), dtype=torch.long),
        }
        for key, buffer in buffers.items():
            self.register_buffer(key, buffer)
        for key in _CORRECTION:  # set by bnlight.correct_inference
            self.register_buffer(key, None)

    @property
    def process_group(self) -> ProcessGroup:
        """None, "world" or the process group whose ranks' batches make the statistics."""
        return self.meeting.group

    @process_group.setter
    def process_group(self, group: ProcessGroup) -> None:
        self.meeting = Meeting(group, width=self.row_length())

    def ranks(self) -> int:
        """Number of ranks whose batches make the statistics; evaluation never asks the others."""
        return self.meeting.ranks() if self.training else 1

    def row_length(self) -> int:
        """How many numbers the layer sends to the other ranks at once."""
        return 1 + 3 * self.num_features

    def reset_parameters(self) -> None:
        """Set weight and bias to their initial values, and forget all batches."""
        super().reset_parameters()
        if "running_mean" in self._buffers:
            self.reset_running_stats()

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """As every module's; torch.export loses count if a buffer comes after one that is None."""
        super().register_buffer(name, tensor, persistent)
        for key in _CORRECTION:
            if self._buffers.get(key, self) is None:
                self._buffers[key] = self._buffers.pop(key)

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

    def normalize(self, x: Tensor, valid: Tensor | None) -> Tensor:
        return self.normalize_batch(x, valid, *self.full_affine(x))

    def normalize_batch(self, x: Tensor, valid: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
        """Normalize by the batch or by the running averages, whichever this mode uses."""
        if self.takes_batch(x, valid):
            return self.by_batch_statistics(x, valid, weight, bias)
        return self.by_running_statistics(x, valid, weight, bias)

    def takes_batch(self, x: Tensor, valid: Tensor | None) -> bool:
        """Whether this batch is normalized by its own statistics; too small a one is counted or refused."""
        if not self._uses_batch():
            return False
        _, values = self._groups(x)
        if valid is not None or values > self.too_few or self.ranks() > 1:
            return True
        self._refuse(x, values == 1 and self.small_batch == "error")
        self._count_batch(values == 0)
        return False

    def step(self, batch: Moments, used: Tensor | None) -> Plan:
        """Move the running averages, in training, and say how the batch is normalized.

        The K groups' moments, which of them count (`used`, None means all) and the plan are `(K, C)` or, for
        K = 1, `(C,)`. Nothing here enters the gradient.
        """
        plan = self.plan(batch)
        self.follow_batch(batch, used)
        return plan

    def plan(self, batch: Moments) -> Plan:
        """How the batch is normalized: by its own statistics, if a layer says nothing else."""
        return Plan(batch.mean, batch.var)

    def spread(self, batch: Moments) -> Tensor:
        """What the second running average follows: the unbiased variance."""
        number = batch.number
        less = number.clamp(min=2) - 1 if isinstance(number, Tensor) else max(number - 1, 1)
        return batch.var * (number / less)

    def update(self, mean: Tensor, spread: Tensor, rate: float | Tensor) -> None:
        """Move the running averages one step towards `mean` and `spread`, in place."""
        assert self.running_mean is not None
        assert self.running_var is not None
        follow(self.running_mean, mean, rate)
        follow(self.running_var, spread, rate)

    def follow_batch(self, batch: Moments, used: Tensor | None) -> None:
        """Move the running averages one step towards the mean of the groups, of all ranks."""
        if self.follows(batch, used):
            self.update(*self.target(batch, self.spread(batch), used))

    def follows(self, batch: Moments, used: Tensor | None) -> bool:
        """Whether the running averages move; an observer sees the batch in their place."""
        if not self.training or self.running_mean is None:
            return False
        if self.observer is not None:
            self.observer(batch, used)
            return False
        return True

    def target(
        self, batch: Moments, spread: Tensor, used: Tensor | None
    ) -> tuple[Tensor, Tensor, float | Tensor]:
        """Where the running averages move to, the mean of the groups, and at what rate."""
        assert self.running_mean is not None
        kind, rate = self.running_mean.dtype, self.rate()
        targets = [batch.mean, spread]
        if used is None and batch.mean.dim() > 1:
            targets = [target.mean(0) for target in targets]
        elif used is not None:
            used = used.expand_as(batch.mean).view(-1, batch.mean.size(-1))
            counts = used.sum(0)
            targets = [(t.view(used.shape) * used).sum(0) / counts.clamp(min=1) for t in targets]
            rate = rate * (counts > 0).to(kind)
        if self.virtual_batch_size is not None and self.ranks() > 1:
            groups = batch.mean.numel() // batch.mean.size(-1)
            weight = torch.full_like(targets[0], groups) if used is None else counts.to(batch.mean.dtype)
            targets, total = self.meeting.average(targets, weight)
            rate = self.rate() * (total > 0).to(kind)
        return converted(targets[0], kind), converted(targets[1], kind), rate

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
        mean, var = self.running_mean, self.running_var
        if mean is None or var is None:
            mean = torch.zeros(self.num_features, device=like.device, dtype=like.dtype)
            return mean, torch.ones_like(mean)
        mean, var = converted(mean, like.dtype), converted(var, like.dtype)
        if self.training and torch.compiler.is_compiling():
            return snapshot(mean), snapshot(var)
        return mean, var

    def way_back(self, plan: Plan) -> WayBack | None:
        """How the gradients of mean and variance reach the values where the batch is not the whole of them."""
        together = self.virtual_batch_size is None and self.ranks() > 1
        return self._sum_over_ranks if together else None

    def _sum_over_ranks(self, dmean: Tensor, dvar: Tensor) -> tuple[Tensor, Tensor]:
        dmean, dvar = self.meeting.sum(dmean, dvar)
        return dmean, dvar

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
        return torch.batch_norm(
            x, weight, bias, mean, var, False, 0.0, self.eps, torch.backends.cudnn.enabled
        )

    def by_batch_statistics(self, x: Tensor, valid: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
        """Normalize each virtual batch by its own statistics."""
        batches = self.virtual_batches(x, valid)
        with torch.no_grad():
            local = batches.moments()
        plan = self.plan_for(x, local)
        return batches.normalize(weight, bias, plan, self.eps, self.way_back(plan))

    def virtual_batches(self, x: Tensor, valid: Tensor | None) -> VirtualBatches:
        """The groups of the batch that have statistics of their own."""
        return VirtualBatches(x, valid, self._groups(x)[0])

    def plan_for(self, x: Tensor, local: Moments) -> Plan:
        """How to normalize the batch `x` with these moments on this rank; the averages move if it is new."""
        again, keep = recomputing(), comes_again()
        with torch.no_grad():
            jitter = self._draw_jitter(
                local.mean
            )  # again with the batch, or later random numbers would differ
            plan = self._calls.recall(local) if again else None
            if plan is not None:
                return plan
            with self._observed_by(_ignore) if again else nullcontext():  # no backward moves the averages
                plan = self._new_plan(x, local)
            if jitter is not None:
                scale, shift = jitter
                r, d = plan.correction or (torch.ones_like(scale), torch.zeros_like(shift))
                plan = plan._replace(correction=(r * (1 + scale), d * (1 + scale) + shift))
        if keep and not again:
            self._calls.remember(local, plan)
        return plan

    @contextmanager
    def _observed_by(self, observer: Observer) -> Iterator[None]:
        before, self.observer = self.observer, observer
        try:
            yield
        finally:
            self.observer = before

    def _draw_jitter(self, like: Tensor) -> tuple[Tensor, Tensor] | None:
        if self.jitter is None or not self.training:
            return None
        scale, shift = (torch.empty_like(like).uniform_(-width, width) for width in self.jitter)
        return scale, shift

    def _new_plan(self, x: Tensor, local: Moments) -> Plan:
        together = self.virtual_batch_size is None and self.ranks() > 1
        batch = self.meeting.merge(local) if together else local
        used = share = None
        number = batch.number
        if isinstance(number, int) and number <= self.too_few:
            number = torch.full_like(batch.mean, number)
        if isinstance(number, Tensor):  # groups with too few values take the running statistics
            if self.small_batch == "error" and not (isinstance(local.number, int) and local.number > 1):
                self._refuse(x, can_read_values() and bool((number == 1).any()))
            used = number > self.too_few
            share = torch.where(used, 1 / number, 0)
            running = self.running_statistics(batch.mean)
            mean, var = (
                torch.where(used, mine, theirs) for mine, theirs in zip(batch[:2], running, strict=True)
            )
            batch = Moments(mean, var, number, batch.samples)
        self._count_batch(1 if isinstance(number, int) else (number != 1).any())
        plan = self.step(batch, used)
        return plan if share is None else plan._replace(share=share)

    def _count_batch(self, number: Tensor | int) -> None:
        tracked = self.num_batches_tracked if self.training else None
        if tracked is not None and self.observer is None:
            tracked.add_(number)

    def _uses_batch(self) -> bool:
        return self.training or not self.track_running_stats

    def _groups(self, x: Tensor) -> tuple[int, int]:
        """Number of virtual batches, and of values per channel in the smallest."""
        values = x.numel() // x.size(1)
        if self.virtual_batch_size is None or values == 0:
            return 1, values
        samples = x.size(0)
        groups = max(1, samples // self.virtual_batch_size)
        return groups, samples // groups * (values // samples)

    def _refuse(self, x: Tensor, too_small: bool) -> None:
        """Raise the error of a batch with one value per channel."""
        if too_small:
            shape = x.shape if self.channel_dim == 1 or x.dim() == 2 else x.squeeze(3).movedim(1, -1).shape
            raise ValueError(
                f"{self}: input of shape {tuple(shape)} leaves one value per channel"
                f"{'' if self.virtual_batch_size is None else ' in a virtual batch'}, which has no variance. Use "
                "a larger batch, drop_last=True in the DataLoader, small_batch='running', or a norm without "
                "batch statistics such as LayerNorm or GroupNorm"
            )

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


def _ignore(batch: Moments, used: Tensor | None) -> None:
    """Observe nothing."""
