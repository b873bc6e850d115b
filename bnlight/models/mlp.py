"""A multilayer perceptron with any norm, from one hidden layer to hundreds."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from bnlight.models.block import Blocks, NormFactory


class MLP(nn.Module):
    """``depth`` hidden layers of ``width`` units, each with norm and activation, then a linear classifier.

    Args:
        input_shape: shape of one sample, of any rank; samples are flattened.
        num_classes: number of logits.
        norm: called as ``norm(width)`` for each hidden layer; the layer it returns gets (N, width).
        activation: a name from ``bnlight.models.ACTIVATIONS``.
        placement: the norm ``"before"`` or ``"after"`` the activation.
        width: units in each hidden layer.
        depth: number of hidden layers, at least 1.
        dropout: probability of dropping a unit behind each hidden layer.
        normalize_input: put a norm on the raw features too.

    Shapes: (N, *input_shape) to logits (N, num_classes).

    Raises:
        ValueError: depth or width below 1, unknown activation or placement.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        norm: NormFactory,
        *,
        activation: str = "relu",
        placement: str = "before",
        width: int = 128,
        depth: int = 3,
        dropout: float = 0.0,
        normalize_input: bool = False,
    ) -> None:
        super().__init__()
        if depth < 1 or width < 1:
            raise ValueError(f"MLP needs depth >= 1 and width >= 1, got depth={depth}, width={width}")
        blocks = Blocks(norm, activation, placement)
        features = math.prod(input_shape)
        layers: list[nn.Module] = [nn.Flatten()]
        if normalize_input:
            layers.append(norm(features))
        for _ in range(depth):
            layers += blocks(nn.Linear, features, width)
            if dropout:
                layers.append(nn.Dropout(dropout))
            features = width
        self.features = nn.Sequential(*layers)
        self.classifier = blocks.layer(nn.Linear, features, num_classes, gain=1.0)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(x))
        return logits
