"""Layers and networks for the tests of weight normalization and weight standardization."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bnlight.models import CNN
from bnlight.norm import NORMS

# name: how to build the layer, and the shape of an input
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(5, 4), (6, 5)),
    "linear on steps": (lambda: nn.Linear(5, 4), (6, 3, 5)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), (5, 4, 7)),
    "conv2d, groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), (5, 4, 7, 6)),
    "conv2d without bias": (lambda: nn.Conv2d(4, 6, 3, bias=False), (5, 4, 7, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (4, 2, 4, 5, 4)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 6, 3), (5, 4, 7)),
    "transposed 2d, groups": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), (5, 4, 5, 6)),
    "transposed 3d, groups": (lambda: nn.ConvTranspose3d(6, 3, 2, groups=3), (4, 6, 3, 4, 3)),
}


@pytest.fixture(params=LAYERS)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    """A layer and an input, float64."""
    torch.manual_seed(0)
    build, shape = LAYERS[request.param]
    return build().double(), torch.randn(shape, dtype=torch.float64)


def outputs(layer: Any, weight: Tensor) -> list[Tensor]:
    """For each output channel, in order, the weights that it is a sum with, found channel by channel."""
    if not isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        return [row.flatten() for row in weight]
    inputs, each = weight.size(0) // layer.groups, weight.size(1)
    return [
        weight[group * inputs : (group + 1) * inputs, i].flatten()
        for group in range(layer.groups)
        for i in range(each)
    ]


def originals(layer: nn.Module) -> tuple[Tensor, Tensor]:
    made: Any = layer.parametrizations["weight"]  # type: ignore[index]
    return made.original0, made.original1


def network(norm: str = "none", **options: Any) -> CNN:
    torch.manual_seed(1)
    return CNN((1, 8, 8), 10, NORMS[norm], widths=(4, 8), depth=1, **options)


def parametrized(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if parametrize.is_parametrized(module)]
