"""Data modules that keep a whole data set in memory and hand out batches by indexing."""

from bnlight.data.augment import CropFlip
from bnlight.data.batches import ShuffledBatches, TensorBatches
from bnlight.data.module import TensorData
from bnlight.data.parts import eval_parts, train_parts
from bnlight.data.shift import Shift
from bnlight.data.sources import CIFAR10, MNIST, Digits, FashionMNIST
from bnlight.data.split import split, stratified_order

__all__ = [
    "CIFAR10",
    "MNIST",
    "CropFlip",
    "Digits",
    "FashionMNIST",
    "Shift",
    "ShuffledBatches",
    "TensorBatches",
    "TensorData",
    "eval_parts",
    "split",
    "stratified_order",
    "train_parts",
]
