"""A plain convolutional network in the manner of VGG, with any norm."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from bnlight.models.block import Blocks, GlobalPool, NormFactory, check_size, image_shape


class CNN(nn.Module):
    """Stages of 3x3 convolutions, each ended by 2x2 max pooling; then global mean pooling and a classifier.

    Args:
        input_shape: (channels, height, width).
        num_classes: number of logits.
        norm: called as ``norm(channels)`` for each convolution; its layer gets (N, channels, H, W).
        activation: a name from ``bnlight.models.ACTIVATIONS``.
        placement: the norm ``"before"`` or ``"after"`` the activation.
        widths: channels of each stage; their number is the number of stages.
        depth: convolutions in each stage, at least 1.
        dropout: probability of dropping a value behind each stage.
        normalize_input: put a norm on the raw images too.

    Shapes: (N, channels, height, width) to logits (N, num_classes).

    Raises:
        ValueError: no stage, depth below 1, images too small for the stages, unknown activation or placement.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        norm: NormFactory,
        *,
        activation: str = "relu",
        placement: str = "before",
        widths: Sequence[int] = (32, 64),
        depth: int = 2,
        dropout: float = 0.0,
        normalize_input: bool = False,
    ) -> None:
        super().__init__()
        if depth < 1 or not widths:
            raise ValueError(
                f"CNN needs depth >= 1 and at least one width, got depth={depth}, widths={widths}"
            )
        shape = image_shape(input_shape, "CNN")
        check_size(shape, len(widths), f"CNN with {len(widths)} stages", "Give fewer widths.")
        blocks = Blocks(norm, activation, placement)
        channels = shape[0]
        layers: list[nn.Module] = [norm(channels)] if normalize_input else []
        for width in widths:
            for _ in range(depth):
                layers += blocks(nn.Conv2d, channels, width, kernel_size=3, padding=1)
                channels = width
            layers.append(nn.MaxPool2d(2))
            if dropout:
                layers.append(nn.Dropout(dropout))
        self.features = nn.Sequential(*layers, GlobalPool())
        self.classifier = blocks.layer(nn.Linear, channels, num_classes, gain=1.0)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(x))
        return logits
