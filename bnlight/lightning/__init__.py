"""bnlight for PyTorch Lightning: modules and callbacks."""

from bnlight.lightning.classifier import Classifier
from bnlight.lightning.timing import StepTimer

__all__ = ["Classifier", "StepTimer"]
