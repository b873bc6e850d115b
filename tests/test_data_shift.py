"""Shifted test images: by the published formulas, the same for the same seed, and nothing but the test images."""

from __future__ import annotations

import colorsys
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage

from bnlight.data import Digits, Shift
from bnlight.run.identity import NO_SHIFT


def images(n: int = 3, channels: int = 3) -> torch.Tensor:
    return torch.rand(n, channels, 9, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_brightness_is_the_value_of_hsv() -> None:
    x = images()
    x[0, :, 0, 0] = 0  # black
    x[0, :, 0, 1] = 1
    for added in (0.3, -0.2):
        y = Shift(brightness=added)(x)
        for place in np.ndindex(3, 9, 7):
            n, row, column = place
            h, s, v = colorsys.rgb_to_hsv(*x[n, :, row, column].tolist())
            expected = colorsys.hsv_to_rgb(h, s, min(1.0, max(0.0, v + added)))
            assert y[n, :, row, column].tolist() == pytest.approx(expected, abs=1e-9)


def test_brightness_of_grey_is_an_addition() -> None:
    x = images(channels=1)
    assert torch.allclose(Shift(brightness=0.2)(x), (x + 0.2).clamp(0, 1))


def test_contrast_is_towards_the_mean_of_each_image_and_channel() -> None:
    x = images()
    mean = x.mean(dim=(2, 3), keepdim=True)
    assert torch.equal(Shift(contrast=0.3)(x), ((x - mean) * 0.3 + mean).clamp(0, 1))


def test_blur_is_scipys() -> None:
    x = images()
    expected = ndimage.gaussian_filter(x.numpy(), sigma=(0, 0, 1.3, 1.3), mode="nearest", radius=(0, 0, 5, 5))
    assert torch.allclose(Shift(blur=1.3)(x), torch.from_numpy(expected), atol=1e-12)


def test_rotation_is_counter_clockwise_about_the_centre() -> None:
    x = torch.rand(2, 1, 8, 8, dtype=torch.float64)
    assert torch.allclose(Shift(rotate=90)(x), torch.rot90(x, 1, (2, 3)), atol=1e-9)
    wide = images(channels=1)
    assert torch.allclose(Shift(rotate=180)(wide), torch.rot90(wide, 2, (2, 3)), atol=1e-9)
    turned = ndimage.rotate(wide[0, 0].numpy(), 20, reshape=False, order=1, mode="grid-constant")
    assert torch.allclose(Shift(rotate=20)(wide)[0, 0], torch.from_numpy(turned), atol=1e-9)


def test_noise_has_its_deviation_and_its_seed() -> None:
    x = torch.full((4, 1, 50, 50), 0.5)
    y = Shift(noise=0.1)(x)
    assert (y - x).std().item() == pytest.approx(0.1, rel=0.02)
    assert torch.equal(y, Shift(noise=0.1)(x))
    assert not torch.equal(y, Shift(noise=0.1, seed=1)(x))


def test_inversion_comes_before_noise_and_after_brightness() -> None:
    x = images(channels=1)
    expected = Shift(noise=0.1)(1 - Shift(brightness=0.1)(x))
    assert torch.equal(Shift(noise=0.1, brightness=0.1, invert=True)(x), expected)


@pytest.mark.parametrize(
    "wrong", [{"noise": -1}, {"contrast": -0.1}, {"blur": float("inf")}, {"brightness": 2}]
)
def test_values_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"shift.{next(iter(wrong))}"):
        Shift(**wrong)


def test_samples_that_are_no_images_are_refused() -> None:
    with pytest.raises(ValueError, match=r"these samples are \(5,\)"):
        Shift(noise=1)(torch.rand(3, 5))


def test_only_the_test_images_are_shifted_and_they_are_scaled_as_before() -> None:
    plain, shifted = Digits(), Digits(shift={"brightness": 0.25})
    for data in (plain, shifted):
        data.setup()
    for name in ("train", "val"):
        assert torch.equal(plain._split(name)[0], shifted._split(name)[0])
    x, _ = plain._split("test")
    y, _ = shifted._split("test")
    train = torch.from_numpy(Digits().load().x_train).double()  # the split's statistics are near these
    moved = (y - x)[x < x.max() - 2]
    assert moved.median().item() == pytest.approx(0.25 * 16 / train.std().item(), rel=0.02)
    assert bool(plain.shift) is False


def test_what_is_off_in_an_identity_is_what_is_off_in_a_shift() -> None:
    assert {name: getattr(Shift(), name) for name in NO_SHIFT} == NO_SHIFT
    assert {*vars(Shift())} == {*NO_SHIFT, "seed"}
