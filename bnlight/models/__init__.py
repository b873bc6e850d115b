"""Networks that take a norm factory: MLP, CNN, ResNet."""

from bnlight.models.block import ACTIVATIONS
from bnlight.models.cnn import CNN
from bnlight.models.mlp import MLP
from bnlight.models.resnet import ResNet

__all__ = ["ACTIVATIONS", "CNN", "MLP", "ResNet"]
