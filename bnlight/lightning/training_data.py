"""Batches of the training data for something else than training, which never notices."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.seed import isolate_rng
from torch.utils.data import DataLoader, IterableDataset

from bnlight.data.batches import TensorBatches

Dataloader = Iterable[Any] | Callable[[], Iterable[Any]]


@contextmanager
def training_batches(
    trainer: pl.Trainer, pl_module: pl.LightningModule, number: int, dataloader: Dataloader | None
) -> Iterator[Iterator[Any]]:
    """At most `number` batches as this rank trains by, on its device: its sampler's, with its workers.

    Another loader than the training's: iterators, samplers and their generators, workers and all random numbers
    of the training stay as they are. Which batches come depends on the optimizer step, so that a resumed run
    sees the same. With `dataloader` its batches come instead.
    """
    seed = trainer.global_step * trainer.world_size + trainer.global_rank
    with isolate_rng():
        torch.manual_seed(seed)
        random.seed(seed)
        if dataloader is None:
            loader: Iterable[Any] = _another(trainer.train_dataloader, seed)
            number = int(min(number, trainer.num_training_batches))
        else:
            loader = dataloader() if callable(dataloader) else dataloader
        yield (_on_device(trainer, pl_module, batch) for batch in islice(loader, number))


def _another(loader: Any, seed: int) -> Iterable[Any]:
    if isinstance(loader, TensorBatches):
        return copy.copy(loader)  # with its own count of batches, in the epoch's order
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        seen = type(loader).__name__
        if isinstance(loader, DataLoader):
            seen += f" of the {type(loader.dataset).__name__} {loader.dataset!r}, an IterableDataset"
        raise TypeError(
            f"the training data are a {seen}, which cannot be read a second time without disturbing the training; "
            "give the callback batches of its own: dataloader=..., a DataLoader or a function that returns one"
        )
    memo: dict[int, Any] = {id(loader.dataset): loader.dataset}
    samplers = [loader.batch_sampler, loader.sampler, getattr(loader.batch_sampler, "sampler", None)]
    for sampler in samplers:
        generator = getattr(sampler, "generator", None)
        if isinstance(generator, torch.Generator):
            memo[id(generator)] = torch.Generator(generator.device).manual_seed(seed)
    if loader.batch_sampler is None:
        order: dict[str, Any] = {"batch_size": None, "sampler": copy.deepcopy(loader.sampler, memo)}
    else:
        order = {"batch_sampler": copy.deepcopy(loader.batch_sampler, memo)}
    return DataLoader(
        loader.dataset,
        **order,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=torch.Generator().manual_seed(seed),
    )


def _on_device(trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> Any:
    batch = trainer.precision_plugin.convert_input(batch)
    batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)
