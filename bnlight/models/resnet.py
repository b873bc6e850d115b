"""Residual networks, for small images (6n+2 layers) and for ImageNet (18 to 152 layers), with any norm."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from bnlight.models.block import Blocks, GlobalPool, NormFactory, check_size, image_shape

# depth: blocks per stage, bottleneck blocks or not (He et al. 2016, table 1)
IMAGENET: dict[int, tuple[tuple[int, ...], bool]] = {
    18: ((2, 2, 2, 2), False),
    34: ((3, 4, 6, 3), False),
    50: ((3, 4, 6, 3), True),
    101: ((3, 4, 23, 3), True),
    152: ((3, 8, 36, 3), True),
}


class ResNet(nn.Module):
    """Deep residual learning (He et al. 2016, arXiv:1512.03385).

    ``style="cifar"`` (section 4.2): 3x3 stem, three stages of two-convolution blocks with 1, 2 and 4 times
    ``width`` channels, shortcuts without parameters.
    ``style="imagenet"`` (table 1): 7x7 stem with max pooling, four stages, projection shortcuts, bottleneck
    blocks from 50 layers on with the stride in the 3x3 convolution; as many parameters as torchvision's.

    ``placement="before"``: the last activation of a block follows the addition, ``act(x + branch(x))``.
    ``"after"``: every norm stands behind its activation within the branch, ``x + branch(x)``. So no norm ever
    stands in the path of the identity shortcuts.

    Args:
        input_shape: (channels, height, width).
        num_classes: number of logits.
        norm: called as ``norm(channels)`` for each convolution; its layer gets (N, channels, H, W).
        activation: a name from ``bnlight.models.ACTIVATIONS``.
        placement: the norm ``"before"`` or ``"after"`` the activation.
        depth: layers with weights: 6n+2 (20, 32, 44, 56, 110, ...) or 18, 34, 50, 101, 152.
        width: channels of the first stage; ``None`` is the paper's 16 (cifar) or 64 (imagenet).
        style: ``"cifar"`` or ``"imagenet"``.
        zero_init_residual: start the weight of each branch's last norm at 0, where it has a weight, so that
            every block starts as its shortcut (Goyal et al. 2017, arXiv:1706.02677, section 5.1).

    Shapes: (N, channels, height, width) to logits (N, num_classes).

    Raises:
        ValueError: unknown style, activation or placement, a depth the style does not have, images too small.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        norm: NormFactory,
        *,
        activation: str = "relu",
        placement: str = "before",
        depth: int = 20,
        width: int | None = None,
        style: str = "cifar",
        zero_init_residual: bool = False,
    ) -> None:
        super().__init__()
        repeats, bottleneck = _plan(style, depth)
        shape = image_shape(input_shape, "ResNet")
        blocks = Blocks(norm, activation, placement)
        if style == "cifar":
            check_size(
                shape, 2, "ResNet with style='cifar'", "Use model=cnn with fewer widths, or model=mlp."
            )
            channels = width or 16
            stem = blocks(nn.Conv2d, shape[0], channels, kernel_size=3, padding=1)
        else:
            check_size(shape, 5, "ResNet with style='imagenet'", "Use style='cifar'.")
            channels = width or 64
            stem = blocks(nn.Conv2d, shape[0], channels, kernel_size=7, stride=2, padding=3)
            stem.append(nn.MaxPool2d(kernel_size=3, stride=2, padding=1))
        stages: list[nn.Module] = []
        inputs = channels
        for stage, repeat in enumerate(repeats):
            inner = channels * 2**stage
            outputs = 4 * inner if bottleneck else inner
            for block in range(repeat):
                stride = 2 if stage > 0 and block == 0 else 1
                stages.append(
                    Residual(
                        blocks,
                        (inputs, inner, outputs),
                        stride,
                        bottleneck=bottleneck,
                        projection=style == "imagenet",
                        zero_init=zero_init_residual,
                    )
                )
                inputs = outputs
        self.features = nn.Sequential(*stem, *stages, GlobalPool())
        self.classifier = blocks.layer(nn.Linear, inputs, num_classes, gain=1.0)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(x))
        return logits


class Residual(nn.Module):
    """One residual block: a branch of two (or three, bottleneck) convolutions and the shortcut around it.

    Args:
        blocks: builds layer, norm and activation.
        channels: of the input, inside the branch, of the output.
        stride: of the first 3x3 convolution.
        bottleneck: 1x1, 3x3, 1x1 in place of 3x3, 3x3.
        projection: where the shape changes, the shortcut is a 1x1 convolution with a norm; otherwise it takes
            every ``stride``-th position and fills the new channels with zeros.
        zero_init: start the weight of the branch's last norm at 0.
    """

    def __init__(
        self,
        blocks: Blocks,
        channels: tuple[int, int, int],
        stride: int,
        *,
        bottleneck: bool,
        projection: bool,
        zero_init: bool,
    ) -> None:
        super().__init__()
        inputs, inner, outputs = channels
        if bottleneck:
            branch = blocks(nn.Conv2d, inputs, inner, kernel_size=1)
            branch += blocks(nn.Conv2d, inner, inner, kernel_size=3, stride=stride, padding=1)
            branch += blocks(nn.Conv2d, inner, outputs, kernel_size=1)
        else:
            branch = blocks(nn.Conv2d, inputs, inner, kernel_size=3, stride=stride, padding=1)
            branch += blocks(nn.Conv2d, inner, outputs, kernel_size=3, padding=1)
        before = blocks.placement == "before"
        weight = getattr(branch[-2 if before else -1], "weight", None)
        if zero_init and weight is not None:
            nn.init.zeros_(weight)
        # The branch's last activation follows the addition when the norms come first.
        self.activation = branch.pop() if before else nn.Identity()
        self.branch = nn.Sequential(*branch)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            if projection:
                self.shortcut = nn.Sequential(
                    *blocks.normed(nn.Conv2d, inputs, outputs, kernel_size=1, stride=stride)
                )
            else:
                self.shortcut = PadShortcut(stride, outputs - inputs)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.activation(self.shortcut(x) + self.branch(x))
        return out


class PadShortcut(nn.Module):
    """A shortcut without parameters: every ``stride``-th position, ``extra`` channels of zeros (option A)."""

    def __init__(self, stride: int, extra: int) -> None:
        super().__init__()
        self.stride = stride
        self.extra = extra

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra))


def _plan(style: str, depth: int) -> tuple[tuple[int, ...], bool]:
    """Blocks per stage, and whether they are bottlenecks."""
    if style == "cifar":
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(
                f"style='cifar' has depths 6n+2 (8, 14, 20, 32, 44, 56, 110, ...), got depth={depth}"
            )
        return ((depth - 2) // 6,) * 3, False
    if style == "imagenet":
        if depth not in IMAGENET:
            raise ValueError(
                f"style='imagenet' has the depths {', '.join(map(str, IMAGENET))}; got depth={depth}"
            )
        return IMAGENET[depth]
    raise ValueError(f"unknown style {style!r}: choose 'cifar' or 'imagenet'")
