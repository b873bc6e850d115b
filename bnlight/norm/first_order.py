"""A backward that cannot be differentiated again says so."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

Backward = Callable[..., tuple[Tensor | None, ...]]


def first_order(backward: Backward) -> Backward:
    """The backward of an autograd function whose second derivatives raise RuntimeError.

    torch's `once_differentiable` raises in `Tensor.backward` only: `torch.autograd.grad` never visits the node
    that would raise, and leaves out this part of the derivative where another path leads to the same input.
    """

    @wraps(backward)
    def wrapper(ctx: Any, *outgoing: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return backward(ctx, *outgoing)
        with torch.no_grad():
            gradients = backward(ctx, *outgoing)
        if torch.compiler.is_compiling():
            return gradients
        sources = [t for t in (*outgoing, *ctx.saved_tensors) if t is not None and t.requires_grad]
        return tuple(g if g is None or not sources else _End.apply(g, *sources) for g in gradients)  # type: ignore[no-untyped-call]

    return wrapper


class _End(torch.autograd.Function):
    """Its first argument, as a function of them all that has no derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor, *sources: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None: ...

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "batch statistics have first derivatives only here, and this differentiates a gradient again. Use "
            "torch.nn.BatchNorm, a norm of each sample such as GroupNorm, or evaluation mode"
        )
