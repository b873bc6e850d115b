"""The doctor at the start of every training."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable
from typing import Any

import pytorch_lightning as pl
from torch import Tensor, nn

from bnlight.doctor import BATCHES, Case, Diagnosis, Finding, Look, examine, sorted_classes
from bnlight.doctor.training import labels_of
from bnlight.lightning.precise import PreciseStatistics
from bnlight.lightning.statistics import ReduceStatistics

LINES = 5


class Doctor(pl.Callback):
    """Says in a few lines, once, what `bnlight.diagnose` finds in the first training batch and around it.

    It looks at the forward of the first training step as that happens, with hooks that are gone afterwards, and at
    the labels of the first 8 batches: no forward of its own, no collective, on rank 0 alone. Nothing in the
    training changes, and nothing that goes wrong here ends it; what could not be looked at is said. A compiled
    model is not hooked, since that would compile it twice: its layers' inputs are not looked at.

    Args:
        tell: called with each line.
        devices: number of ranks; None asks the Trainer.
        synchronized: whether statistics are taken over all ranks, though the layers do not say so.
        told: texts that need not be said again; those said now are added.

    After the first batches `diagnosis` has all findings.
    """

    def __init__(
        self,
        *,
        tell: Callable[[str], None] = print,
        devices: int | None = None,
        synchronized: bool = False,
        told: set[str] | None = None,
    ) -> None:
        self.tell = tell
        self.devices = devices
        self.synchronized = synchronized
        self.told = set() if told is None else told
        self.diagnosis = Diagnosis()
        self._look: Look | None = None
        self._batches = 0
        self._case: Case | None = None
        self._labels: list[Tensor] = []

    @property
    def finished(self) -> bool:
        """Whether everything was looked at."""
        case = self._case
        return case is not None and (
            self._batches >= BATCHES or len(self._labels) < self._batches or not case.batch_norms
        )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._look, self._case, self._batches, self._labels = None, None, 0, []
        self.diagnosis = Diagnosis()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not trainer.is_global_zero or self._batches >= BATCHES:
            return
        self._batches += 1
        labels = self._safely(lambda: labels_of(batch))
        if labels is not None:
            self._labels.append(labels)
        if self._batches == 1 and not _is_compiled(pl_module):
            self._look = Look(pl_module, count_root=False)
            self._look.begin()

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        self._report(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._report(trainer, pl_module)
        last = self._batches == BATCHES or trainer.is_last_batch
        if last and self._case is not None and len(self._labels) > 1:
            case, labels, self._labels, self._batches = self._case, self._labels, [], BATCHES
            loader = trainer.train_dataloader
            self._say(self._safely(lambda: list(sorted_classes(case, loader, labels))) or [])

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        if isinstance(exception, Exception):
            self._report(trainer, pl_module)
        elif self._look is not None:
            self._look.end()

    def _report(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say what the first forward shows, once it is over."""
        if self._batches == 0 or self._case is not None:
            return
        look = self._look
        if look is not None:
            self._safely(look.end)
        devices = trainer.world_size if self.devices is None else self.devices
        accumulate = trainer.accumulate_grad_batches
        self._case = case = Case(pl_module, look, devices, accumulate, self.synchronized)
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        case.estimated = any(isinstance(each, PreciseStatistics) for each in callbacks)
        case.merged = case.estimated or any(isinstance(each, ReduceStatistics) for each in callbacks)
        case.batches = self._safely(lambda: _planned(trainer, devices))
        found = self._safely(lambda: list(examine(case, trainer.optimizers, trainer.train_dataloader)))
        self._say([*(found or []), *([] if look is not None else [_COMPILED])])

    def _say(self, findings: Iterable[Finding]) -> None:
        found = Diagnosis(findings)
        self.diagnosis = Diagnosis([*self.diagnosis, *found])
        new = [text for text in map(str, found) if text not in self.told]
        self.told.update(new)
        for text in new[:LINES]:
            self.tell(f"doctor: {text}")
        if len(new) > LINES:
            self.tell(f"doctor: and {len(new) - LINES} more; `bnlight doctor` lists them")

    def _safely(self, look: Callable[[], Any]) -> Any:
        """What `look` returns; what goes wrong in it is said, and None."""
        try:
            return look()
        except Exception as error:
            self.tell(f"doctor: could not look at this training ({type(error).__name__}: {error})")
            return None


def _planned(trainer: pl.Trainer, devices: int) -> int | None:
    """The batches that each of so many ranks will train on; None for a training without an end."""
    steps = trainer.estimated_stepping_batches
    if not 0 < steps < math.inf:
        return None
    return math.ceil(steps * trainer.accumulate_grad_batches * trainer.world_size / devices)


_COMPILED = Finding(
    "compiled",
    "note",
    (),
    "the model is compiled, so its layers' inputs were not looked at",
    "bnlight.diagnose(the model, a batch) looks at it before torch.compile",
)


def _is_compiled(model: nn.Module) -> bool:
    dynamo = sys.modules.get("torch._dynamo")  # slow to import, and loaded where something is compiled
    wrappers = () if dynamo is None else (dynamo.OptimizedModule,)
    return any(
        isinstance(module, wrappers) or module._compiled_call_impl is not None for module in model.modules()
    )
