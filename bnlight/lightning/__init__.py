"""bnlight for PyTorch Lightning: modules and callbacks, imported when they are first named."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bnlight.lightning.checkpoint import Checkpoint as Checkpoint
    from bnlight.lightning.classifier import Classifier as Classifier
    from bnlight.lightning.divergence import StopOnDivergence as StopOnDivergence
    from bnlight.lightning.last import LastCheckpoint as LastCheckpoint
    from bnlight.lightning.sync import NormSync as NormSync
    from bnlight.lightning.timing import StepTimer as StepTimer

_HOMES = {
    "NormSync": "sync",
    "Checkpoint": "checkpoint",
    "Classifier": "classifier",
    "LastCheckpoint": "last",
    "StepTimer": "timing",
    "StopOnDivergence": "divergence",
}
__all__ = ["Checkpoint", "Classifier", "LastCheckpoint", "NormSync", "StepTimer", "StopOnDivergence"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
