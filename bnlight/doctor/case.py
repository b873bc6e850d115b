"""What the doctor's checks look at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnlight.doctor.look import Call, Look, uses_batch
from bnlight.norm.batch import BatchStatistics
from bnlight.norm.paths import named_layers
from bnlight.surgery.fold_rules import is_norm
from bnlight.surgery.synchronized import Synchronized


@dataclass
class Case:
    """What the checks look at: `look` is None without a batch; paths are those of `model`."""

    model: nn.Module
    look: Look | None = None
    devices: int = 1
    accumulate: int = 1
    synchronized: bool = False
    """Whether the layers will be, though they are not yet."""
    batches: int | None = None
    """How many batches of a rank the training will take; None where that is not known."""
    estimated: bool = False
    """Whether the averages are replaced by statistics of the data before each evaluation (`PreciseStatistics`)."""
    merged: bool = False
    """Whether the ranks' averages are merged before each evaluation (`ReduceStatistics`, `PreciseStatistics`)."""

    def __post_init__(self) -> None:
        self.paths = {module: path for path, module in named_layers(self.model)}
        frozen_alone = self.model.training  # in a model in evaluation mode none counts as frozen
        self.norms = {module: path for module, path in self.paths.items() if is_norm(module)}
        self.batch_norms = {
            module: path
            for module, path in self.norms.items()
            if isinstance(module, BatchStatistics | _BatchNorm) and (uses_batch(module) or not frozen_alone)
        }

    def calls(self) -> Iterator[tuple[nn.Module, str, list[Call]]]:
        """The calls of each norm that was seen."""
        seen = (
            {} if self.look is None else {self.look.paths[m]: calls for m, calls in self.look.calls.items()}
        )
        for norm, path in self.norms.items():
            if path in seen:
                yield norm, path, seen[path]

    def is_synchronized(self, norm: nn.Module) -> bool:
        """Whether a layer takes its statistics over all ranks."""
        if isinstance(norm, BatchStatistics):
            return self.synchronized or norm.process_group is not None
        return self.synchronized or isinstance(norm, nn.SyncBatchNorm | Synchronized)
