"""Batches straight from tensors in memory, in an order that depends on a seed and the epoch only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnlight.data.augment import CropFlip

Batch = tuple[Tensor, Tensor]


class TensorBatches:
    """Batches ``(x[part], y[part])``, always the same: the loader of validation and test.

    Indexing whole tensors costs microseconds per batch where a ``DataLoader`` calls Python for each sample.
    The batches are views of the tensors: do not write into them.

    Args:
        x: samples, (n, ...).
        y: labels, (n,), on the same device.
        parts: the rows of each batch, from :func:`bnlight.data.eval_parts`.
    """

    def __init__(self, x: Tensor, y: Tensor, parts: Sequence[slice]) -> None:
        self.x = x
        self.y = y
        self.parts = parts

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[Batch]:
        for part in self.parts:
            yield self.x[part], self.y[part]


class ShuffledBatches(TensorBatches):
    """Batches in a new order each epoch: the loader of training.

    The order comes from ``seed`` and the epoch alone, not from torch's global generator: it is the same on
    every rank and device, whatever else draws random numbers, and again after a resume.

    In a plain loop each pass is the next epoch. Once somebody tells the epoch with :meth:`set_epoch`, as
    Lightning does, the first pass after that is the epoch's own; further passes (a callback that wants some
    training batches) see the same order and leave the state alone.

    ``state_dict`` says how many batches of the epoch were handed out, so that a run resumed in the middle of
    an epoch goes on with the next batch of the same order. Lightning saves and restores it by itself.

    Args:
        x: samples, (n, ...).
        y: labels, (n,), on the same device.
        parts: the places of each batch in an epoch's order, from :func:`bnlight.data.train_parts`.
        seed: of the order and of the augmentation.
        augment: changes the images of a batch.
    """

    batch_sampler = None  # Lightning takes it for granted beside a sampler

    def __init__(
        self, x: Tensor, y: Tensor, parts: Sequence[slice], *, seed: int, augment: CropFlip | None = None
    ) -> None:
        super().__init__(x, y, parts)
        self.seed = seed
        self.augment = augment
        self.epoch = 0
        self.batch = 0  # batches of this epoch handed out
        self._begun = False  # this epoch's own pass has begun
        self._told = False  # somebody tells the epochs
        self._resumed = False

    @property
    def sampler(self) -> ShuffledBatches:
        """Itself: Lightning tells the epoch to ``loader.sampler``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """The next pass is this epoch, from its first batch or, just after a resume, from where it was."""
        if not (self._resumed and epoch == self.epoch):
            self.epoch, self.batch = epoch, 0
        self._begun, self._told = False, True

    def order(self, epoch: int) -> Tensor:
        """The order of an epoch: a permutation of the n samples, (n,) int64 on x's device."""
        return torch.randperm(len(self.x), generator=_generator(self.seed, epoch, 0)).to(self.x.device)

    def __iter__(self) -> Iterator[Batch]:
        # A generator runs from its first next() on. Lightning makes the iterator before it tells the epoch.
        if self._begun and not self._told:
            self.epoch, self.batch, self._begun = self.epoch + 1, 0, False
        own = not self._begun
        self._begun, self._resumed = True, False
        order = self.order(self.epoch)
        changes = None
        if self.augment is not None:
            changes = self.augment.draw(len(self.x), _generator(self.seed, self.epoch, 1)).to(self.x.device)
        for index in range(self.batch if own else 0, len(self.parts)):
            rows = order[self.parts[index]]
            x = self.x.index_select(0, rows)
            if self.augment is not None and changes is not None:
                x = self.augment(x, changes.index_select(0, rows))
            if own:
                self.batch = index + 1
            yield x, self.y.index_select(0, rows)

    def state_dict(self) -> dict[str, Any]:
        """Where the epoch is: seed, epoch, batches handed out, batches in an epoch."""
        return {"seed": self.seed, "epoch": self.epoch, "batch": self.batch, "batches": len(self)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the state was taken, with its seed.

        Raises:
            ValueError: the state is from the middle of an epoch with another number of batches.
        """
        epoch, batch, batches = state["epoch"], state["batch"], state["batches"]
        if batch == batches:
            epoch, batch = epoch + 1, 0
        elif batch and batches != len(self):
            raise ValueError(
                f"the checkpoint is at batch {batch} of {batches}, but an epoch has {len(self)} batches now: "
                "resume with the same data, batch_size and number of processes, or from the end of an epoch"
            )
        self.seed, self.epoch, self.batch = state["seed"], epoch, batch
        self._begun, self._resumed = False, True


def _generator(seed: int, epoch: int, stream: int) -> torch.Generator:
    """One for each (seed, epoch, stream); made from seed + epoch, neighbouring seeds would share orders."""
    words = np.random.SeedSequence([seed % 2**64, epoch, stream]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(words[0] >> np.uint64(1)))
