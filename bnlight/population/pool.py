"""One update of the running averages for all micro-batches of an optimizer step."""

from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from bnlight.norm import BatchRenorm
from bnlight.norm.batch import BatchStatistics
from bnlight.norm.core import Moments
from bnlight.norm.paths import unwrapped
from bnlight.norm.recompute import recomputing
from bnlight.norm.sync import Meeting, ProcessGroup, merged
from bnlight.population.observe import Pool, moving_layers
from bnlight.population.ranks import number_of_ranks, of_all_ranks


class PooledStatistics:
    """What `pool_statistics` returns: the layers' values since the last `step`, and their way into the averages."""

    def __init__(self, model: nn.Module) -> None:
        self._windows: list[_Window | _TorchWindow] = [
            (_Window if isinstance(layer, BatchStatistics) else _TorchWindow)(path, layer)  # type: ignore[arg-type]
            for path, layer in moving_layers(unwrapped(model)).items()
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.step()
        finally:
            self.close()

    def step(self) -> None:
        """Move the averages once, by all values since the last time, and count one batch; none, and nothing moves."""
        with torch.inference_mode(False), torch.no_grad():
            _merge_over_ranks([w for w in self._windows if isinstance(w, _TorchWindow)])
            for window in self._windows:
                window.move()

    def close(self) -> None:
        """Let each batch move the averages again; values since the last `step` are forgotten."""
        for window in self._windows:
            window.close()
        self._windows = []


def pool_statistics(model: nn.Module) -> PooledStatistics:
    """Move running averages once per optimizer step when gradients are accumulated over micro-batches.

    Each micro-batch would move them, by its own statistics: with 8 of them they forget 8 times as fast, and
    the unbiased variance is that of small batches. Inside of

    `with pool_statistics(model): ...micro-batches...`

    none does. At the end of the block they move once, towards the mean and the unbiased variance of all values
    together, as one big batch would have moved them, and `num_batches_tracked` counts one. After an error
    they stay. Around a whole training call `pool.step()` after each optimizer step instead:

    `with pool_statistics(model) as pool: ...; optimizer.step(); pool.step()`

    The micro-batches may differ in size. Synchronized layers pool all ranks' values, so every rank must step.
    Virtual batches stay groups of their own, whose statistics are averaged. BatchRenorm and FullNorm normalize
    by the averages as they were at the last step; FullNorm's averages of gradients still move in each backward.
    Evaluation in between uses the running averages and is not pooled, nor what activation checkpointing
    computes again. Frozen layers stay, as in `precise_statistics`; torch's InstanceNorm moves with each batch.

    What this does not do: each micro-batch is still normalized by its own statistics. With few values per
    channel use a norm without batch statistics, or `sync_norm`.

    Works with bnlight's layers and torch's, compiled too, which compiles them once more.

    >>> layer = nn.BatchNorm1d(1, momentum=0.5)
    >>> with pool_statistics(layer):
    ...     _ = layer(torch.tensor([[1.0], [2.0]])), layer(torch.tensor([[3.0], [4.0], [5.0]]))
    >>> layer.running_mean, layer.running_var, layer.num_batches_tracked
    (tensor([1.5000]), tensor([1.7500]), tensor(1))
    """
    return PooledStatistics(model)


class _Window:
    """The batches of a layer of bnlight since the last step, seen by its observer."""

    def __init__(self, path: str, layer: BatchStatistics) -> None:
        self.path, self.layer = path, layer
        self.before = layer.observer
        self.batches: list[tuple[Moments, Tensor | None]] = []
        layer.observer = self._see

    def _see(self, batch: Moments, used: Tensor | None) -> None:
        self.batches.append((batch, used))

    def move(self) -> None:
        layer = self.layer
        if not self.batches:
            return
        batch, used = self._joined()
        self.batches = []
        training, layer.training, layer.observer = layer.training, True, None
        try:
            layer._count_batch(1)
            follow: Any = layer.step if isinstance(layer, BatchRenorm) else layer.follow_batch
            follow(batch, used)
        finally:
            layer.training, layer.observer = training, self._see

    def _joined(self) -> tuple[Moments, Tensor | None]:
        """All values as one batch, or all virtual batches as groups of one."""
        like = self.batches[-1][0].mean
        channels, kind = like.size(-1), torch.float32 if like.device.type == "mps" else torch.float64
        rows: dict[str, list[Tensor]] = {name: [] for name in ("mean", "var", "number", "used")}
        for batch, used in self.batches:
            shape = (-1, channels)
            number = torch.as_tensor(batch.number, device=like.device).expand_as(batch.mean)
            counts = torch.ones_like(batch.mean) if used is None else used.expand_as(batch.mean)
            values = (batch.mean, batch.var, number, counts)
            for row, value in zip(rows.values(), values, strict=True):
                row.append(value.reshape(shape).to(kind))
        mean, var, number, counts = map(torch.cat, rows.values())
        everything = all(used is None for _, used in self.batches)
        if self.layer.virtual_batch_size is None:
            mean, var, number = merged(mean, var, number * counts)
            counts = number
        samples = torch.zeros((), device=like.device)  # only a plan asks for them
        mean, var = mean.to(like.dtype), var.to(like.dtype)
        return Moments(mean, var, number.to(like.dtype), samples), None if everything else counts > 0

    def close(self) -> None:
        self.layer.observer = self.before


class _TorchWindow:
    """The values of a layer of torch's since the last step, seen by a hook."""

    def __init__(self, path: str, layer: nn.Module) -> None:
        self.path, self.layer, self.pool = path, layer, Pool(path, layer)
        self.before = layer.track_running_stats
        # In training torch then leaves the averages and their counter alone; evaluation uses them as ever.
        self._track(False)
        self.hook = layer.register_forward_hook(self._see, with_kwargs=True)

    def _track(self, running: Any) -> None:
        self.layer.track_running_stats = running

    def _see(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if layer.training and not recomputing():
            with torch.no_grad():
                self.pool.add_input(layer, args, kwargs)

    def move(self) -> None:
        pool, layer = self.pool, self.layer
        self.pool = Pool(self.path, layer)
        if not pool.reached:
            return
        tracked: Tensor | None = layer._buffers["num_batches_tracked"]
        rate: Any = layer.momentum
        if tracked is not None:
            tracked.add_(1)
        if rate is None:
            rate = 0.0 if tracked is None else 1 / float(tracked)
        for name, values in (("running_mean", pool.mean), ("running_var", pool.unbiased())):
            average = pool.running(name)
            average.lerp_(values.to(average), rate)

    def close(self) -> None:
        self.hook.remove()
        self._track(self.before)


def _merge_over_ranks(windows: list[_TorchWindow]) -> None:
    """Pool the values of the ranks over which torch's layers are synchronized."""
    groups: dict[Any, list[_TorchWindow]] = {}
    for window in windows:
        group = _group(window.layer)
        if number_of_ranks(group) > 1:
            groups.setdefault(group, []).append(window)
    for group, together in groups.items():
        parts = {
            w.path: [w.pool.number, w.pool.mean, w.pool.var, w.pool.samples, w.pool.samples] for w in together
        }
        rows = of_all_ranks("pool_statistics", parts, group)
        for window in together:
            window.pool.take(*rows[window.path])


def _group(layer: nn.Module) -> ProcessGroup:
    meeting = getattr(layer, "meeting", None)
    if isinstance(meeting, Meeting):  # by sync_norm
        return meeting.group
    if isinstance(layer, nn.SyncBatchNorm):
        group: ProcessGroup = layer.process_group or "world"
        return group
    return None
