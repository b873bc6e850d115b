"""Splits that give every class its share."""

from __future__ import annotations

import torch
from torch import Tensor


def stratified_order(y: Tensor, generator: torch.Generator) -> Tensor:
    """A random order of which any first k samples hold the classes in proportion, up to rounding.

    The j-th (from 0, in random order) of the c samples of a class gets the place (j + 1/2) / c; sorted by
    place, the classes mix evenly.

    Args:
        y: class labels, (n,).
        generator: source of the randomness.

    Returns:
        A permutation of range(n), (n,) int64.
    """
    order = torch.randperm(len(y), generator=generator)
    places = torch.empty(len(y), dtype=torch.float64)
    for label in set(y.tolist()):
        members = y[order] == label
        count = int(members.sum())
        places[members] = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return order[places.argsort(stable=True)]


def split(y: Tensor, val_fraction: float, split_seed: int, limit: int | None = None) -> tuple[Tensor, Tensor]:
    """Indices of the training and of the validation samples, both stratified by class.

    Args:
        y: class labels, (n,).
        val_fraction: share of the samples for validation, between 0 and 1.
        split_seed: the same seed gives the same split.
        limit: keep only so many training samples. The validation samples stay the same, and the samples of a
            smaller limit are among those of a larger one.

    Raises:
        ValueError: one of the two would be empty, or the limit is more than there is.
    """
    n_val = round(len(y) * val_fraction)
    if not 0 < n_val < len(y):
        raise ValueError(
            f"val_fraction={val_fraction} of {len(y)} samples leaves {n_val} for validation and "
            f"{len(y) - n_val} for training, but both need some: choose a share such as data.val_fraction=0.1"
        )
    generator = torch.Generator().manual_seed(split_seed)
    order = stratified_order(y, generator)
    train, val = order[n_val:], order[:n_val]
    if limit is not None:
        if not 0 < limit <= len(train):
            raise ValueError(f"limit={limit}: choose 1 to {len(train)} training samples, or null for all")
        train = train[stratified_order(y[train], generator)[:limit]]
    return train, val
