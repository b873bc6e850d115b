"""Normalization layers that need only torch: `from bnlight.norm import BatchNorm`."""

from bnlight.norm.base import Norm
from bnlight.norm.batchnorm import BatchNorm
from bnlight.norm.full import FullNorm
from bnlight.norm.keras import from_keras
from bnlight.norm.mean_only import MeanOnlyBatchNorm
from bnlight.norm.mixed import BatchInstanceNorm, BatchLayerNorm, SwitchableNorm
from bnlight.norm.recurrent import NormLSTM
from bnlight.norm.renorm import BatchRenorm
from bnlight.norm.rms import FilterResponseNorm, RMSNorm
from bnlight.norm.sample import GroupNorm, InstanceNorm, LayerNorm, NoNorm
from bnlight.norm.schedule import renorm_schedule
from bnlight.norm.tanh import DynamicTanh
from bnlight.norm.weight import weight_norm, weight_standardization
from bnlight.norm.weight_init import initialize_weight_norm

NORMS: dict[str, type[Norm]] = {
    "batch": BatchNorm,
    "renorm": BatchRenorm,
    "full": FullNorm,
    "batch_layer": BatchLayerNorm,
    "batch_instance": BatchInstanceNorm,
    "switchable": SwitchableNorm,
    "layer": LayerNorm,
    "group": GroupNorm,
    "instance": InstanceNorm,
    "rms": RMSNorm,
    "frn": FilterResponseNorm,
    "tanh": DynamicTanh,
    "none": NoNorm,
}
"""The one table of names."""

__all__ = [
    "NORMS",
    "BatchInstanceNorm",
    "BatchLayerNorm",
    "BatchNorm",
    "BatchRenorm",
    "DynamicTanh",
    "FilterResponseNorm",
    "FullNorm",
    "GroupNorm",
    "InstanceNorm",
    "LayerNorm",
    "MeanOnlyBatchNorm",
    "NoNorm",
    "Norm",
    "NormLSTM",
    "RMSNorm",
    "SwitchableNorm",
    "from_keras",
    "initialize_weight_norm",
    "renorm_schedule",
    "weight_norm",
    "weight_standardization",
]
