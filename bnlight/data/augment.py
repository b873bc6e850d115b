"""Random crops and mirror images of whole batches of small images."""

from __future__ import annotations

import torch
from torch import Tensor


class CropFlip:
    """Crop each image at random from itself with a border, and mirror it at random.

    As in He et al. 2016 (arXiv:1512.03385), section 4.2. Drawing and applying are apart, so that what happens
    to a sample in an epoch depends neither on its batch nor on its rank.

    Args:
        fill: value of the border for each channel, (C,): what black became by scaling.
        padding: width of the border in pixels.
    """

    def __init__(self, fill: Tensor, padding: int = 4) -> None:
        self.fill = fill
        self.padding = padding

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """One change for each of n samples: (n, 3) int64, the crop's top and left, mirrored or not."""
        corners = torch.randint(0, 2 * self.padding + 1, (n, 2), generator=generator)
        mirrored = torch.randint(0, 2, (n, 1), generator=generator)
        return torch.cat([corners, mirrored], dim=1)

    def __call__(self, x: Tensor, changes: Tensor) -> Tensor:
        """Images x (N, C, H, W), changed as ``changes`` (N, 3) says; same shape."""
        n, (height, width), pad = len(x), x.shape[2:], self.padding
        bordered = self.fill.view(1, -1, 1, 1).repeat(n, 1, height + 2 * pad, width + 2 * pad)
        bordered[:, :, pad : pad + height, pad : pad + width] = x
        top, left, mirrored = changes.unbind(1)
        crops = bordered.unfold(2, height, 1).unfold(3, width, 1)  # (N, C, tops, lefts, H, W), a view
        cropped = crops[torch.arange(n, device=x.device), :, top, left]
        return torch.where(mirrored[:, None, None, None].bool(), cropped.flip(-1), cropped)
