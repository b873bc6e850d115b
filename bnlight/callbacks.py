"""The Lightning callbacks around norms: `from bnlight.callbacks import RenormSchedule`."""

from bnlight.lightning.regularize import ConstrainNorm, PenalizeNorm
from bnlight.lightning.renorm import RenormSchedule
from bnlight.lightning.weight import InitializeWeightNorm

__all__ = ["ConstrainNorm", "InitializeWeightNorm", "PenalizeNorm", "RenormSchedule"]
