"""The data module behind all data sets: arrays in, scaled and split tensors on the training device out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from pytorch_lightning import LightningDataModule
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor

from bnlight.data.augment import CropFlip
from bnlight.data.batches import ShuffledBatches, TensorBatches
from bnlight.data.parts import eval_parts, train_parts
from bnlight.data.shift import Shift
from bnlight.data.split import split

SCALES = ("standardize", "unit", "none")


class Arrays(NamedTuple):
    """A published data set: samples (n, *input_shape), labels (n,) from 0 to num_classes - 1."""

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray


class TensorData(LightningDataModule):
    """A labelled data set held in memory as whole tensors.

    A subclass says ``input_shape``, ``num_classes`` and how to :meth:`load` the arrays:

    >>> class Noise(TensorData):
    ...     input_shape, num_classes, peak = (3, 4, 4), 2, 1.0
    ...
    ...     def load(self):
    ...         rng = np.random.default_rng(0)
    ...         x, y = rng.random((100, 3, 4, 4)), np.arange(100) % 2
    ...         return Arrays(x[:80], y[:80], x[80:], y[80:])
    >>> data = Noise(batch_size=16)
    >>> data.setup()
    >>> x, y = next(iter(data.train_dataloader()))
    >>> x.shape, y.shape, len(data.train_dataloader())
    (torch.Size([16, 3, 4, 4]), torch.Size([16]), 5)

    The published training samples are split into training and validation, stratified by class, by
    ``split_seed`` alone; the test samples are the published ones. With several ranks, a step takes
    ``batch_size`` samples on each (:func:`bnlight.data.train_parts`), and each validation or test sample is
    seen exactly once (:func:`bnlight.data.eval_parts`).

    Args:
        batch_size: training samples per step on each rank, or ``"full"`` for all of them in one step.
        eval_batch_size: at most so many validation or test samples at once on each rank, or ``"full"``.
        drop_last: leave out the smaller last batch of a training epoch.
        val_fraction: share of the training samples set aside for validation.
        split_seed: decides which ones.
        limit: train on only so many samples, stratified; ``None`` is all.
        scale: ``"standardize"`` gives each channel mean 0 and variance 1 over the training samples,
            ``"unit"`` divides by ``peak``, ``"none"`` keeps the values.
        augment: crop (border of 4 pixels) and mirror the training images at random; only for data sets whose
            images keep their meaning.
        shift: corruptions of the test images alone, the arguments of :class:`bnlight.data.Shift` such as
            ``{"noise": 0.2}``; before scaling, on values divided by ``peak``.
        seed: of the training order and the augmentation; ``None`` takes ``torch.initial_seed()`` at the first
            :meth:`setup` (rank 0's for all ranks of a trainer), so that ``seed_everything`` decides.

    Raises:
        ValueError: an option is out of range, or does not fit the data.
    """

    input_shape: tuple[int, ...]
    num_classes: int
    peak: float = 255.0  # the largest value a sample can have
    can_augment: bool = False

    def __init__(
        self,
        *,
        batch_size: int | Literal["full"] = 64,
        eval_batch_size: int | Literal["full"] = 256,
        drop_last: bool = False,
        val_fraction: float = 0.1,
        split_seed: int = 0,
        limit: int | None = None,
        scale: str = "standardize",
        augment: bool = False,
        shift: Mapping[str, Any] | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if scale not in SCALES:
            raise ValueError(f"unknown scale {scale!r}: choose one of {', '.join(SCALES)}")
        if augment and not self.can_augment:
            raise ValueError(
                f"augment is not for {type(self).__name__}: a mirrored sample may mean something else. "
                "It works with fashion_mnist and cifar10, and where a class sets can_augment = True"
            )
        for name, size in (("batch_size", batch_size), ("eval_batch_size", eval_batch_size)):
            if size != "full" and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
                raise ValueError(f"{name} is a whole number from 1 on, or 'full'; got {size!r}")
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.drop_last = drop_last
        self.val_fraction = val_fraction
        self.split_seed = split_seed
        self.limit = limit
        self.scale = scale
        self.augment = augment
        self.shift = Shift(**(shift or {}))
        self.seed = seed
        self._device: torch.device | None = None
        self._splits: dict[str, tuple[Tensor, Tensor]] = {}
        self._fill = torch.empty(0)
        self._told = False

    def __str__(self) -> str:
        sizes = ", ".join(f"{len(y)} {name}" for name, (_, y) in self._splits.items()) or "not set up"
        return f"{type(self).__name__}({sizes}; samples {self.input_shape}, {self.num_classes} classes)"

    def load(self) -> Arrays:
        """The published data; called by each process once, or more often, so a slow one caches."""
        raise NotImplementedError(f"{type(self).__name__} needs a load() that returns Arrays")

    def setup(self, stage: str | None = None) -> None:
        """Split and scale the data on the trainer's device (without one, the CPU); once for all stages."""
        trainer = self.trainer
        device = torch.device("cpu") if trainer is None else trainer.strategy.root_device
        if self._device == device:
            return
        x, y, x_test, y_test = self._checked(self.load())
        train, val = split(y, self.val_fraction, self.split_seed, self.limit)
        x_train = x[train].to(device).float()
        shift, factor = self._scaling(x_train)
        self._splits = {
            "train": (x_train.sub_(shift).mul_(factor), y[train].to(device)),
            "val": (x[val].to(device).float().sub_(shift).mul_(factor), y[val].to(device)),
            "test": (self._test_images(x_test, device).sub_(shift).mul_(factor), y_test.to(device)),
        }
        self._fill = (-shift * factor).flatten()
        if self.seed is None:
            seed = torch.initial_seed()
            self.seed = seed if trainer is None else trainer.strategy.broadcast(seed)
        self._device = device

    def train_dataloader(self) -> TensorBatches:
        x, y = self._split("train")
        place = self._place()
        batch_size = max(1, len(x) // place["world_size"]) if self.batch_size == "full" else self.batch_size
        parts = train_parts(len(x), batch_size, drop_last=self.drop_last, **place)
        used = place["world_size"] * sum(part.stop - part.start for part in parts)
        if used < len(x) and not self._told:
            self._told = True
            rank_zero_info(
                f"{len(x) - used} of {len(x)} training samples sit out each epoch, others every time: on "
                f"{place['world_size']} process(es) with batch_size={batch_size} they make no last batch"
            )
        if getattr(self.trainer, "overfit_batches", 0):
            return TensorBatches(x, y, parts)  # always the same batches
        assert self.seed is not None
        return ShuffledBatches(
            x, y, parts, seed=self.seed, augment=CropFlip(self._fill) if self.augment else None
        )

    def val_dataloader(self) -> TensorBatches:
        return self._in_order("val")

    def test_dataloader(self) -> TensorBatches:
        return self._in_order("test")

    def _in_order(self, name: str) -> TensorBatches:
        x, y = self._split(name)
        batch_size = len(x) if self.eval_batch_size == "full" else self.eval_batch_size
        return TensorBatches(x, y, eval_parts(len(x), batch_size, **self._place()))

    def _split(self, name: str) -> tuple[Tensor, Tensor]:
        if name not in self._splits:
            raise RuntimeError(
                f"{type(self).__name__} is not set up: call setup() before asking for a loader"
            )
        return self._splits[name]

    def _place(self) -> dict[str, int]:
        """Rank and world size, of the trainer where there is one."""
        if self.trainer is not None:
            ranks: dict[str, Any] = self.trainer.distributed_sampler_kwargs or {}
            return {"rank": ranks.get("rank", 0), "world_size": ranks.get("num_replicas", 1)}
        if dist.is_available() and dist.is_initialized():
            return {"rank": dist.get_rank(), "world_size": dist.get_world_size()}
        return {"rank": 0, "world_size": 1}

    def _test_images(self, x: Tensor, device: torch.device) -> Tensor:
        x = x.to(device, copy=True).float()
        return self.shift(x / self.peak) * self.peak if self.shift else x

    def _scaling(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Shift and factor of each channel, in x's rank: scaled = (x - shift) * factor."""
        shape = (1, x.shape[1], *(1,) * (x.dim() - 2))
        if self.scale == "standardize":
            others = [axis for axis in range(x.dim()) if axis != 1]
            variance, mean = torch.var_mean(x, dim=others, correction=0)
            variance[variance == 0] = 1.0  # a constant channel becomes 0
            return mean.view(shape), variance.rsqrt().view(shape)
        factor = 1 / self.peak if self.scale == "unit" else 1.0
        return x.new_zeros(shape), x.new_full(shape, factor)

    def _checked(self, arrays: Arrays) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The arrays as tensors, labels int64; an error if they are not what the class declares."""
        x_train, y_train, x_test, y_test = (torch.from_numpy(np.require(a, requirements="W")) for a in arrays)
        for name, x, y in (("training", x_train, y_train), ("test", x_test, y_test)):
            what = f"the {name} data of {type(self).__name__}"
            if x.shape[1:] != tuple(self.input_shape) or len(x) != len(y) or y.dim() != 1 or len(x) == 0:
                raise ValueError(
                    f"{what} should be samples (n, {', '.join(map(str, self.input_shape))}) and labels (n,), "
                    f"but the shapes are {tuple(x.shape)} and {tuple(y.shape)}"
                )
            if not 0 <= int(y.min()) <= int(y.max()) < self.num_classes:
                raise ValueError(
                    f"{what} should have labels from 0 to {self.num_classes - 1}, "
                    f"but they go from {int(y.min())} to {int(y.max())}"
                )
        return x_train, y_train.long(), x_test, y_test.long()
