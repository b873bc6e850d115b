"""Shifted test images: other light, noise, blur or pose than those that were trained on."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Shift:
    """Corruptions of images with values in [0, 1], each off by default, applied in the order below.

    - `rotate`: by so many degrees counter-clockwise about the centre, bilinear, black outside;
    - `blur`: with a Gaussian of so many pixels' standard deviation, cut at four of them, edges repeated;
    - `contrast` c: `c * (x - m) + m` with each channel's mean m over the image; 1 is none;
    - `brightness` b: `V + b` for the value V = max(R, G, B) of HSV, hue and saturation kept; of grey images
      `x + b`;
    - `invert`: `1 - x`;
    - `noise` s: `x + s * n` with normal n, drawn once for the whole test set from `seed`.

    After each the values are cut to [0, 1]. Noise, contrast and brightness are those of ImageNet-C, whose five
    severities are noise 0.08, 0.12, 0.18, 0.26, 0.38 (0.04 to 0.1 for CIFAR-10-C), contrast 0.4, 0.3, 0.2,
    0.1, 0.05 and brightness 0.1 to 0.5; its blur, one of the extra ones, 1, 2, 3, 4, 6 pixels.

    Raises ValueError for values out of range, and when called for images that are none.

    Source: Hendrycks and Dietterich 2019 (arXiv 1903.12261), section 3; rotation and inversion as in MNIST-C
    (Mu and Gilmer 2019, arXiv 1906.02337).
    """

    noise: float = 0.0
    contrast: float = 1.0
    brightness: float = 0.0
    blur: float = 0.0
    rotate: float = 0.0
    invert: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("noise", "contrast", "blur"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"shift.{name} must be a number from 0 on, got {getattr(self, name)!r}")
        if not -1 <= self.brightness <= 1:
            raise ValueError(f"shift.brightness must be in [-1, 1], got {self.brightness!r}")

    def __bool__(self) -> bool:
        """Whether anything is shifted."""
        off = Shift()
        return any(getattr(self, f.name) != getattr(off, f.name) for f in fields(self) if f.name != "seed")

    def __call__(self, x: Tensor) -> Tensor:
        """Images x (N, C, H, W) in [0, 1], float; a new tensor of the same shape."""
        if x.dim() != 4:
            raise ValueError(f"a shift is for images (N, C, H, W); these samples are {tuple(x.shape[1:])}")
        if self.rotate:
            x = _rotated(x, self.rotate).clamp(0, 1)
        if self.blur:
            x = _blurred(x, self.blur).clamp(0, 1)
        if self.contrast != 1:
            mean = x.mean(dim=(2, 3), keepdim=True)
            x = ((x - mean) * self.contrast + mean).clamp(0, 1)
        if self.brightness:
            x = _brightened(x, self.brightness)
        if self.invert:
            x = 1 - x
        if self.noise:
            generator = torch.Generator().manual_seed(self.seed)
            x = (x + self.noise * torch.randn(x.shape, generator=generator).to(x)).clamp(0, 1)
        return x.clone() if not self else x


def _rotated(x: Tensor, degrees: float) -> Tensor:
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    height, width = x.shape[2:]
    # In grid_sample's coordinates, which go from -1 to 1 along each side, y downwards.
    turn = [[cos, -sin * height / width, 0.0], [sin * width / height, cos, 0.0]]
    theta = torch.tensor(turn, dtype=x.dtype, device=x.device).expand(len(x), 2, 3)
    return F.grid_sample(x, F.affine_grid(theta, list(x.shape), align_corners=False), align_corners=False)


def _blurred(x: Tensor, sigma: float) -> Tensor:
    radius = max(1, round(4 * sigma))
    places = torch.arange(-radius, radius + 1, dtype=x.dtype, device=x.device)
    kernel = torch.exp(-(places**2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(x.shape[1], 1, -1)
    x = F.pad(x, (radius, radius, radius, radius), mode="replicate")
    x = F.conv2d(x, kernel[:, :, None, :], groups=x.shape[1])
    return F.conv2d(x, kernel[:, :, :, None], groups=x.shape[1])


def _brightened(x: Tensor, added: float) -> Tensor:
    """V + added in HSV: all channels scaled alike, so that hue and saturation stay; black has no hue, and greys."""
    value = x.amax(dim=1, keepdim=True)
    brighter = (value + added).clamp(0, 1)
    return torch.where(value > 0, x * (brighter / value.clamp_min(1e-12)), brighter.expand_as(x))
