"""Sequences of different lengths, arranged so that no step computes padding."""

from typing import NamedTuple, Self

import torch
from torch import Tensor


class Rows(NamedTuple):
    """Sequences step by step: at each step one row for every sequence that reaches it, the longest first."""

    data: Tensor
    """The rows of all steps, `(sum(sizes), C)`."""
    sizes: list[int]
    """Number of rows at each step, never growing."""
    number: int
    """Number of sequences."""
    order: Tensor | None = None
    """The sequences from the longest to the shortest; None if they have this order."""
    places: Tensor | None = None
    """Where the rows are among the T * N of `x.flatten(0, 1)`; None if they are all of them."""

    @classmethod
    def of(cls, x: Tensor, lengths: Tensor | None) -> Self:
        """The valid steps of `x`, `(T, N, C)`, where `lengths`, `(N,)` on the CPU, says how many each has."""
        steps, number = x.shape[:2]
        if lengths is None:
            return cls(x.flatten(0, 1), [number] * steps, number)
        order = lengths.argsort(descending=True, stable=True)
        time = torch.arange(steps).unsqueeze(1)
        valid = time < lengths[order]
        places = (time * number + order)[valid].to(x.device)
        data = x.flatten(0, 1).index_select(0, places)
        return cls(data, valid.sum(1).tolist(), number, order.to(x.device), places)

    def put_back(self, data: Tensor, like: Tensor) -> Tensor:
        """Rows of results at their places among zeros, `(T, N, C)`."""
        if self.places is not None:
            zeros = data.new_zeros(like.size(0) * self.number, data.size(1))
            data = zeros.index_copy(0, self.places, data)
        return data.view(like.size(0), self.number, data.size(1))


def valid_steps(x: Tensor, lengths: Tensor | list[int] | None, mask: Tensor | None) -> Tensor | None:
    """Each sequence's number of valid steps in `x`, `(T, N, C)`, on the CPU; None if all are valid."""
    steps, number = x.shape[:2]
    if lengths is None and mask is None:
        return None
    if lengths is not None and mask is not None:
        raise ValueError("NormLSTM: give lengths or mask, not both")
    if mask is not None:
        if mask.shape != (steps, number) or mask.dtype != torch.bool:
            raise ValueError(
                f"NormLSTM: expected a bool mask of x's shape without its last axis, got {mask.dtype} for "
                f"{steps} steps of {number} sequences and shape {tuple(mask.shape)} (steps, sequences)"
            )
        mask = mask.cpu()
        lengths = mask.sum(0)
        if not torch.equal(mask, torch.arange(steps).unsqueeze(1) < lengths):
            raise ValueError(
                "NormLSTM: each sequence's valid steps must come first, the mask has an invalid step before a valid "
                "one; move padding to the end"
            )
        return lengths
    lengths = torch.as_tensor(lengths).cpu()
    if lengths.shape != (number,) or lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise ValueError(
            f"NormLSTM: expected {number} integer lengths, one for each sequence, got {lengths.dtype} of shape "
            f"{tuple(lengths.shape)}"
        )
    if number and not 0 <= int(lengths.min()) <= int(lengths.max()) <= steps:
        raise ValueError(
            f"NormLSTM: expected lengths from 0 to the {steps} steps of x, got {lengths.tolist()}"
        )
    return lengths
