"""Statistics over the ranks of a process group: one collective forward and one backward per layer."""

import itertools
import warnings
from collections import Counter
from datetime import timedelta
from typing import Any, Literal, Self
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from bnlight.norm.core import Moments

ProcessGroup = Literal["world"] | dist.ProcessGroup | None

_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_HEADER = 3  # layer, what for, which call
_numbers = itertools.count()
_meetings: WeakValueDictionary[int, "Meeting"] = WeakValueDictionary()
_PURPOSES = ("forward", "averages", "backward")


def check_group(group: ProcessGroup) -> None:
    """Raise TypeError for what is no process group, also where there are no ranks yet."""
    if group is not None and group != "world" and not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"process_group must be None, 'world' or a ProcessGroup, got {group!r}")


class Meeting:
    """Where a layer meets itself on the other ranks: in which group, under which name, for how long.

    A copy of the layer shares it. Pickled, a process group becomes "world", with a warning.
    """

    def __init__(
        self,
        group: ProcessGroup = None,
        *,
        layer: int = 0,
        path: str = "",
        width: int = 0,
        timeout: float | None = None,
    ) -> None:
        check_group(group)
        self.group, self.layer, self.path, self.width, self.timeout = group, layer, path, width, timeout
        self.calls: Counter[str] = Counter()
        self.number = next(_numbers)
        _meetings[self.number] = self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        if isinstance(self.group, dist.ProcessGroup):
            warnings.warn("a process group cannot be pickled: the copy's is 'world'", stacklevel=2)
        return _unpickled, ("world" if self.group else None, self.layer, self.path, self.width, self.timeout)

    def ranks(self) -> int:
        """Number of ranks that meet; 1 means that the layer is on its own."""
        if self.group is None or not (dist.is_available() and dist.is_initialized()):
            return 1
        return dist.get_world_size(None if self.group == "world" else self.group)

    def merge(self, batch: Moments) -> Moments:
        """The moments of all ranks' values together, from this rank's; `(C,)`, the number too."""
        number = torch.as_tensor(batch.number, device=batch.mean.device).expand_as(batch.mean)
        samples = torch.as_tensor(batch.samples, device=batch.mean.device).reshape(1)
        rows = self._gather("forward", [samples, number, batch.mean, batch.var])
        count = rows[:, :1].sum(0)
        number, mean, var = rows[:, 1:].view(len(rows), 3, -1).unbind(1)
        return Moments(*(values.to(batch.mean.dtype) for values in (*merged(mean, var, number), count)))

    def average(self, values: list[Tensor], weight: Tensor) -> tuple[list[Tensor], Tensor]:
        """Each of the values, `(C,)`, averaged over ranks by their weight, `(C,)`, and the weights' sum."""
        rows = self._gather("averages", [weight, *values])
        rows = rows.view(len(rows), 1 + len(values), -1)
        weights = rows[:, :1]
        total = weights.sum(0)
        means = (weights * rows[:, 1:]).sum(0) / total.clamp(min=1)
        return [*means.to(weight.dtype)], total[0].to(weight.dtype)

    def sum(self, *values: Tensor) -> list[Tensor]:
        """Each of the values, `(C,)`, summed over the ranks."""
        sums = self._gather("backward", [*values]).sum(0).view(len(values), -1)
        return [*sums.to(values[0].dtype)]

    def _gather(self, purpose: str, parts: list[Tensor]) -> Tensor:
        """The parts, one after the other, of every rank: `(ranks, values)`, float64 where there is such."""
        kind = torch.float32 if parts[0].device.type == "mps" else torch.float64
        row = torch.cat([part.to(kind) for part in parts])
        if torch.compiler.is_compiling():
            gathered: Tensor = _gather_op(row, self.number, _PURPOSES.index(purpose), self.ranks())
            return gathered
        return self.gather(row, purpose)

    def gather(self, row: Tensor, purpose: str) -> Tensor:
        """`row` of every rank, `(ranks, len(row))`.

        Raises RuntimeError if the ranks meet for different purposes, or one does not come in time.
        """
        size, group = len(row), None if self.group == "world" else self.group
        call = self.calls[purpose] + 1
        header = row.new_tensor([self.layer, _PURPOSES.index(purpose), call])
        # Rows of one length for all layers: ranks that meet in different ones must still understand each other.
        padding = row.new_zeros(max(0, self.width - size))
        rows = row.new_empty(self.ranks() * (_HEADER + size + len(padding)))
        # A device works on meanwhile; waiting for it here would stall it.
        patience = self.timeout if row.device.type == "cpu" else None
        try:
            work = _all_gather(rows, torch.cat([header, row, padding]), group=group, async_op=True)
            work.wait(*[] if patience is None else [timedelta(seconds=patience)])
        except RuntimeError as error:
            raise RuntimeError(
                f"{self._where(purpose, call)} did not meet the other ranks ({str(error).strip()}). Every rank "
                "must call every synchronized layer equally often: a rank that would skip it, or has no batch "
                "left, must still pass an empty one"
            ) from error
        self.calls[purpose] = call
        rows = rows.view(self.ranks(), -1)
        self._check(rows[:, :_HEADER], purpose, call)
        return rows[:, _HEADER : _HEADER + size]

    def _check(self, headers: Tensor, purpose: str, call: int) -> None:
        if headers.device.type != "cpu":  # without stalling the device
            torch._assert_async((headers == headers[:1]).all(), "ranks met in different synchronized layers")
            return
        if bool((headers == headers[0]).all()):
            return
        seen = "; ".join(
            f"rank {rank} is in {_PURPOSES[int(what)]} call {int(which)} of layer {int(layer)}"
            for rank, (layer, what, which) in enumerate(headers.tolist())
        )
        raise RuntimeError(
            f"{self._where(purpose, call)} met ranks that are elsewhere: {seen}. Every rank must call the same "
            "synchronized layers in the same order"
        )

    def _where(self, purpose: str, call: int) -> str:
        rank = dist.get_rank(None if self.group == "world" else self.group)
        name = f"'{self.path}'" if self.path else "without a name"
        return f"synchronized layer {self.layer} {name}, {purpose} call {call} on rank {rank},"


def merged(mean: Tensor, var: Tensor, number: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and number of all values together, `(C,)`, from those of the parts, `(parts, C)`."""
    total = number.sum(0)
    weight = number / total.clamp(min=1)
    together = (weight * mean).sum(0)
    spread = (weight * (var + (mean - together).square())).sum(0)  # no difference of large numbers
    return together, spread, total


def unbiased(var: Tensor, number: Tensor) -> Tensor:
    """The unbiased variance, from the biased one and the number of values; 0 of one value."""
    return var * (number / (number - 1).clamp(min=1))


def _unpickled(group: ProcessGroup, layer: int, path: str, width: int, timeout: float | None) -> Meeting:
    return Meeting(group, layer=layer, path=path, width=width, timeout=timeout)


@torch.library.custom_op("bnlight::gather", mutates_args=())
def _gather_op(row: Tensor, meeting: int, purpose: int, ranks: int) -> Tensor:
    return _meetings[meeting].gather(row, _PURPOSES[purpose]).clone()


@_gather_op.register_fake
def _(row: Tensor, meeting: int, purpose: int, ranks: int) -> Tensor:
    return row.new_empty(ranks, len(row))
