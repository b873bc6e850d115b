"""Who takes which samples: the parts of one order over steps and ranks."""

from __future__ import annotations

from itertools import pairwise


def train_parts(
    n: int, batch_size: int, *, rank: int = 0, world_size: int = 1, drop_last: bool = False
) -> list[slice]:
    """The batches of a training epoch, as slices of a common order of n samples.

    Step t takes the next ``world_size * batch_size`` places, and rank r the r-th ``batch_size`` of them. The
    rest at the end is shared out evenly; up to ``world_size - 1`` samples beyond that are left out. So in
    every step all ranks have batches of the same size.

    A last batch of one sample per rank is left out too (unless ``batch_size`` is 1): one value has no batch
    statistics. What is left out differs from epoch to epoch, as the order does.

    Args:
        n: number of samples.
        batch_size: samples per step on each rank.
        rank: this process.
        world_size: number of processes.
        drop_last: leave out the whole rest.

    Raises:
        ValueError: n is less than one step takes.
    """
    step = world_size * batch_size
    if n < step:
        raise ValueError(
            f"batch_size={batch_size} on {world_size} process(es) takes {step} samples per step, of {n}: "
            f"use data.batch_size={max(1, n // world_size)} or less, data.batch_size=full, or more samples"
        )
    full = n // step
    parts = [slice(start, start + batch_size) for start in range(rank * batch_size, full * step, step)]
    share = (n - full * step) // world_size
    if share > 1 and not drop_last:
        start = full * step + rank * share
        parts.append(slice(start, start + share))
    return parts


def eval_parts(n: int, batch_size: int, *, rank: int = 0, world_size: int = 1) -> list[slice]:
    """The batches of an evaluation, as slices of n samples: each sample once over all ranks, none twice.

    Every rank gets the same number of batches, because under DDP each forward is a meeting of all ranks, and
    no batch is empty. To that end the batches of a rank differ in size by up to one, and where
    ``batch_size=1`` does not divide evenly, some have two samples.

    Args:
        n: number of samples.
        batch_size: largest batch on each rank.
        rank: this process.
        world_size: number of processes.

    Raises:
        ValueError: fewer samples than processes.
    """
    if n < world_size:
        raise ValueError(
            f"{n} samples are too few for {world_size} processes: use fewer processes or more data"
        )
    largest_share = -(-n // world_size)
    steps = min(-(-largest_share // batch_size), n // world_size)
    first, last = n * rank // world_size, n * (rank + 1) // world_size
    bounds = [first + (last - first) * step // steps for step in range(steps + 1)]
    return [slice(start, stop) for start, stop in pairwise(bounds)]
