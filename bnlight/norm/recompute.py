"""Activation checkpointing: a training batch that is computed again in the backward is no new batch."""

from collections import deque
from typing import Any

import torch
from torch import Tensor

from bnlight.norm.core import Moments, Plan, can_read_values


class Calls:
    """The last training batches of a layer and their plans, to find the plan of one that comes again.

    Activation checkpointing runs the forward a second time, inside the backward. By then the running averages
    have moved, which must neither happen twice nor change what the second run computes; and the other ranks
    of synchronized statistics need not be asked again. A batch is recognized by its statistics, the last ones
    first, as a backward meets them, each once. A copy of the layer starts without any.
    """

    def __init__(self) -> None:
        self._last: deque[tuple[Tensor, Tensor, Plan]] = deque(maxlen=64)

    def __reduce__(self) -> tuple[Any, ...]:
        return Calls, ()

    def recall(self, batch: Moments) -> Plan | None:
        """The plan of a batch that is computed again, None if there is none."""
        for index in reversed(range(len(self._last))):
            mean, var, plan = self._last[index]
            if mean.shape == batch.mean.shape and not bool(
                # The same numbers, NaN too; a kernel may sum them in another order.
                ((mean - batch.mean).square() > 1e-8 * (var + batch.var) + 1e-30).any()
            ):
                del self._last[index]
                return plan
        return None

    def remember(self, batch: Moments, plan: Plan) -> None:
        """Keep the plan of a training batch that may come again."""
        self._last.append((batch.mean, batch.var, plan))


def comes_again() -> bool:
    """Whether a backward may run this forward once more: without gradients, or with saved tensors in other hands.

    A compiled graph knows what it recomputes, and torch.func does not recompute.
    """
    if not can_read_values():
        return False
    return (
        not torch.is_grad_enabled() or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    )


def recomputing() -> bool:
    """Whether this is a forward inside a backward."""
    return can_read_values() and torch._C._current_graph_task_id() != -1
