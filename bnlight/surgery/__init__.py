"""Find and change the normalization layers of a model."""

from bnlight.surgery.fold import FoldReport, fold_norm
from bnlight.surgery.freeze import freeze_norm, unfreeze_norm
from bnlight.surgery.known import TORCH_NORMS, register_norm
from bnlight.surgery.parameters import norm_parameters
from bnlight.surgery.regularize import Bounds, constrain_norm, norm_penalty
from bnlight.surgery.replace import replace_norm
from bnlight.surgery.replace_report import Report
from bnlight.surgery.sync import sync_norm, unsync_norm

__all__ = [
    "TORCH_NORMS",
    "Bounds",
    "FoldReport",
    "Report",
    "constrain_norm",
    "fold_norm",
    "freeze_norm",
    "norm_parameters",
    "norm_penalty",
    "register_norm",
    "replace_norm",
    "sync_norm",
    "unfreeze_norm",
    "unsync_norm",
]
