"""In which order a tensor's values lie in memory, told so that torch's kernels cannot take it for another."""

import torch
from torch import Tensor


def memory_layout(x: Tensor) -> torch.memory_format | None:
    """The layout torch's kernels would see: contiguous, channels last, or None for any other strides."""
    if x.is_contiguous():
        return torch.contiguous_format
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if channels_last is not None and x.is_contiguous(memory_format=channels_last):
        return channels_last
    return None


def keep_layout(y: Tensor, like: Tensor) -> Tensor:
    """`y` in the memory layout of `like`."""
    if y.is_contiguous() and like.is_contiguous():
        return y
    return y.contiguous(memory_format=memory_layout(like) or torch.contiguous_format)


def in_few_axes(x: Tensor) -> Tensor:
    """`x`, `(N, C, *)`, or its values as `(N, C, positions)` or `(values, C)` where two layouts fit its strides.

    The stride of an axis of size 1 says nothing, and torch's CPU kernels guess the layout of four and five axes by
    it: if they guess differently for a batch and its gradient, the derivatives are wrong. With fewer axes there
    is one layout. It is a view, and so is `in_all_axes`, which the gradient comes back through.
    """
    if x.dim() < 4 or 1 not in x.shape:
        return x
    layout = memory_layout(x)
    if layout is None:
        return x
    return x.flatten(2) if layout is torch.contiguous_format else x.movedim(1, -1).flatten(0, -2)


def in_all_axes(y: Tensor, like: Tensor) -> Tensor:
    """What has the axes of `in_few_axes(like)` with those of `like`, and strides that everyone reads alike."""
    if y.dim() == like.dim():
        return y
    if y.dim() == 3:
        return y.view(like.shape)
    samples, channels, *space = like.shape
    return y.view(samples, *space, channels).movedim(-1, 1)


def canonical(x: Tensor) -> Tensor:
    """`x`, `(N, C, *)`, contiguous or in channels last with the strides that torch gives such a tensor itself."""
    if x.dim() < 4 or 1 not in x.shape or torch.compiler.is_compiling():
        return x
    step, order = 1, [*range(x.dim())] if x.is_contiguous() else [0, *range(2, x.dim()), 1]
    for axis in reversed(order):
        if x.stride(axis) != step:
            return in_all_axes(in_few_axes(x), x)
        step *= x.size(axis)
    return x


def batch_norm(x: Tensor, *arguments: Tensor | float | None) -> Tensor:
    """`torch.batch_norm`, with the right derivatives for a gradient in any memory layout."""
    rows = in_few_axes(x)
    return in_all_axes(torch.batch_norm(rows, *arguments), x)  # type: ignore[arg-type]
