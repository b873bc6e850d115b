"""What the layers share whose statistics come from the batch: of virtual batches, of all ranks, of too few values."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar, Literal, Unpack

import torch
from torch import Tensor

from bnlight.norm.averages import Observer, RunningAverages
from bnlight.norm.base import Shared
from bnlight.norm.core import Moments, Plan, WayBack, can_read_values, converted
from bnlight.norm.recompute import Calls, comes_again, recomputing
from bnlight.norm.sync import Meeting, ProcessGroup
from bnlight.norm.virtual import VirtualBatches

SmallBatch = Literal["error", "running"]


class Batch(Shared, total=False):
    """Arguments of every layer with batch statistics whose default is the same in all."""

    virtual_batch_size: int | None
    small_batch: SmallBatch


class BatchStatistics(RunningAverages):
    """Base of the layers that normalize by the batch in training and by running averages in evaluation.

    A subclass says what a training batch does: how it is normalized (`plan`), what the second average follows
    (`spread`), and how the averages move (`update`).

    `process_group` says over whose batches the statistics are taken: None for this process's, "world" for all
    ranks' (the default group, looked up at each forward; local if there is none), or a ProcessGroup. Ranks
    may have batches of different sizes, or empty ones. Every rank must call the layer equally often.
    """

    cancels_bias: ClassVar[bool] = True

    too_few: ClassVar[int] = 1
    """The number of values per channel that do not make a batch."""

    track_running_stats = True

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
        super().__init__(num_features, momentum=momentum, **shared)
        name = type(self).__name__
        if virtual_batch_size is not None and virtual_batch_size < 1:
            raise ValueError(
                f"{name}: virtual_batch_size must be at least 1 or None, got {virtual_batch_size}"
            )
        if small_batch not in ("error", "running"):
            raise ValueError(f"{name}: small_batch must be 'error' or 'running', got {small_batch!r}")
        if jitter is not None and (len(jitter) != 2 or min(jitter) < 0):
            raise ValueError(f"{name}: jitter must be None or (scale, shift), neither negative, got {jitter}")
        self.virtual_batch_size = virtual_batch_size
        self.small_batch = small_batch
        self.jitter = jitter
        self.meeting = Meeting()
        self._calls = Calls()

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

    def follow_batch(self, batch: Moments, used: Tensor | None) -> None:
        """Move the running averages one step towards the mean of the groups, of all ranks."""
        if self.follows(batch, used) and (step := self.target(batch, self.spread(batch), used)) is not None:
            self.update(*step)

    def follows(self, batch: Moments, used: Tensor | None) -> bool:
        """Whether the running averages move; an observer sees the batch in their place."""
        if not self.training or self._buffers["running_mean"] is None:
            return False
        if self.observer is not None:
            self.observer(batch, used)
            return False
        return True

    def target(
        self, batch: Moments, spread: Tensor, used: Tensor | None
    ) -> tuple[Tensor, Tensor, float | Tensor] | None:
        """Where the running averages move to, the mean of the groups, and at what rate; None if it is not finite."""
        running_mean, rate = self.running_mean, self.rate()
        assert running_mean is not None
        kind = running_mean.dtype
        targets = [batch.mean, spread]
        if used is None and batch.mean.dim() > 1:
            targets = [target.mean(0) for target in targets]
        elif used is not None:
            used = used.expand_as(batch.mean).view(-1, batch.mean.size(-1))
            counts = used.sum(0)
            targets = [torch.where(used, t.view(used.shape), 0).sum(0) / counts.clamp(min=1) for t in targets]
            rate = rate * (counts > 0).to(kind)
        if self.virtual_batch_size is not None and self.ranks() > 1:
            groups = batch.mean.numel() // batch.mean.size(-1)
            weight = torch.full_like(targets[0], groups) if used is None else counts.to(batch.mean.dtype)
            targets, total = self.meeting.average(targets, weight)
            rate = self.rate() * (total > 0).to(kind)
        return self.accepted(converted(targets[0], kind), converted(targets[1], kind), rate)

    def way_back(self, plan: Plan) -> WayBack | None:
        """How the gradients of mean and variance reach the values where the batch is not the whole of them."""
        together = self.virtual_batch_size is None and self.ranks() > 1
        return self._sum_over_ranks if together else None

    def _sum_over_ranks(self, dmean: Tensor, dvar: Tensor) -> tuple[Tensor, Tensor]:
        dmean, dvar = self.meeting.sum(dmean, dvar)
        return dmean, dvar

    def by_batch_statistics(self, x: Tensor, valid: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
        """Normalize each virtual batch by its own statistics."""
        batches = self.virtual_batches(x, valid)
        plan = self.plan_for(x, batches.moments())
        return batches.normalize(weight, bias, plan, self.eps, self.way_back(plan))

    def virtual_batches(self, x: Tensor, valid: Tensor | None) -> VirtualBatches:
        """The groups of the batch that have statistics of their own."""
        return VirtualBatches(x, valid, self._groups(x)[0])

    def plan_for(self, x: Tensor, local: Moments) -> Plan:
        """How to normalize the batch `x` that has these moments on this rank; the averages move if it is new."""
        if not recomputing():
            plan = self._jittered(self._new_plan(x, local))
            if comes_again():
                self._calls.remember(local, plan)
            return plan
        known = self._calls.recall(local)
        with self._observed_by(_ignore):  # no backward moves the averages
            # Known or not, it draws its random numbers again, or later ones would differ.
            plan = self._jittered(known or self._new_plan(x, local))
        return known or plan

    @contextmanager
    def _observed_by(self, observer: Observer) -> Iterator[None]:
        before, self.observer = self.observer, observer
        try:
            yield
        finally:
            self.observer = before

    def _jittered(self, plan: Plan) -> Plan:
        if self.jitter is None or not self.training:
            return plan
        scale, shift = (torch.empty_like(plan.mean).uniform_(-width, width) for width in self.jitter)
        r, d = plan.correction or (torch.ones_like(scale), torch.zeros_like(shift))
        return plan._replace(correction=(r * (1 + scale), d * (1 + scale) + shift))

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
        self._count_batch(1 if isinstance(number, int) or self.too_few == 0 else (number != 1).any())
        plan = self.step(batch, used)
        return plan if share is None else plan._replace(share=share)

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


def _ignore(batch: Moments, used: Tensor | None) -> None:
    """Observe nothing."""
