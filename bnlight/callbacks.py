"""The Lightning callbacks around norms: `from bnlight.callbacks import RenormSchedule`."""

from bnlight.lightning.doctor import Doctor
from bnlight.lightning.freeze import FreezeNorm
from bnlight.lightning.monitor import NormMonitor
from bnlight.lightning.precise import PreciseStatistics
from bnlight.lightning.regularize import ConstrainNorm, PenalizeNorm
from bnlight.lightning.renorm import RenormSchedule
from bnlight.lightning.replace import ReplaceNorm
from bnlight.lightning.statistics import PoolStatistics, ReduceStatistics
from bnlight.lightning.weight import InitializeWeightNorm

__all__ = [
    "ConstrainNorm",
    "Doctor",
    "FreezeNorm",
    "InitializeWeightNorm",
    "NormMonitor",
    "PenalizeNorm",
    "PoolStatistics",
    "PreciseStatistics",
    "ReduceStatistics",
    "RenormSchedule",
    "ReplaceNorm",
]
