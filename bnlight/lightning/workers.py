"""Persistent workers of a DataLoader draw their random numbers in each epoch as new workers would.

A worker that outlives an epoch goes on with generators that no checkpoint has, and the loader then draws one number
less than for new workers: a resumed run, whose workers are new, would see other samples in another order.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from lightning_fabric.utilities.seed import pl_worker_init_function
from torch.utils.data import DataLoader
from torch.utils.data import dataloader as stock
from torch.utils.data._utils.worker import _generate_state


def persistent(loaders: Iterable[Any]) -> list[DataLoader[Any]]:
    """Those of the loaders whose workers outlive an epoch, and that cannot tell their own state."""
    return [
        one
        for one in loaders
        if isinstance(one, DataLoader) and one.persistent_workers and not hasattr(one, "load_state_dict")
    ]


def draw_anew(loader: DataLoader[Any]) -> None:
    """Have the loader's persistent workers, which have not started yet, seeded at the beginning of each epoch.

    A `worker_init_fn` of the user's is called once per worker, as ever.
    """
    if isinstance(loader.worker_init_fn, _Seeded):
        return
    init, make = _Seeded(loader.worker_init_fn), loader._get_iterator

    def make_seeded() -> Any:
        init.base.zero_()
        iterator: Any = make()
        reset = iterator._reset

        def seed_and_reset(of: DataLoader[Any], first_iter: bool = False) -> None:
            init.base.random_(generator=of.generator)  # as a new iterator does
            reset(of, first_iter)

        iterator._reset = seed_and_reset
        return iterator

    loader.worker_init_fn = init
    loader._get_iterator = make_seeded  # type: ignore[method-assign]


def restart(loader: DataLoader[Any]) -> None:
    """End the loader's workers; the next epoch starts new ones."""
    iterator: Any = loader._iterator
    if iterator is not None:
        iterator._shutdown_workers()
    loader._iterator = None


class _Seeded:
    """A `worker_init_fn` after which the worker looks for a new base seed whenever an epoch begins."""

    def __init__(self, first: Callable[[int], None] | None) -> None:
        self.first = first
        self.base = torch.zeros((), dtype=torch.int64)  # 0: the worker is new
        self.base.share_memory_()  # type: ignore[no-untyped-call]

    def __call__(self, worker: int) -> None:
        if self.first is not None:
            self.first(worker)
        kind: Any = stock._DatasetKind
        create = kind.create_fetcher  # what a worker calls when an epoch begins

        def seed_and_create(*arguments: Any) -> Any:
            if base := int(self.base):
                self._seed(base, worker)
            return create(*arguments)

        kind.create_fetcher = staticmethod(seed_and_create)

    def _seed(self, base: int, worker: int) -> None:
        """As torch seeds a new worker, and then Lightning's `seed_everything(workers=True)`."""
        random.seed(base + worker)
        torch.manual_seed(base + worker)
        np.random.seed(_generate_state(base, worker))  # type: ignore[no-untyped-call]
        if isinstance(self.first, functools.partial) and self.first.func is pl_worker_init_function:
            self.first(worker)
