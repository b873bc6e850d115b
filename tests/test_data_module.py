"""Data modules by themselves: sizes, scaling, seeds, augmentation, what they refuse."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from bnlight.data import (
    CIFAR10,
    MNIST,
    CropFlip,
    Digits,
    FashionMNIST,
    ShuffledBatches,
    TensorData,
)
from bnlight.data.module import Arrays


class Numbers(TensorData):
    """Sample i has the value i, so that a batch shows which samples it holds."""

    input_shape = (1,)
    num_classes = 2
    train, test = 53, 19

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"scale": "none", "batch_size": 8, "val_fraction": 0.2} | options)

    def load(self) -> Arrays:
        x = np.arange(self.train + self.test, dtype=np.float32)[:, None]
        y = np.arange(len(x)) % 2
        return Arrays(x[: self.train], y[: self.train], x[self.train :], y[self.train :])


class Pixels(TensorData):
    """Random images with values from 0 to 4."""

    input_shape = (2, 6, 6)
    num_classes = 3
    peak = 4.0
    can_augment = True

    def load(self) -> Arrays:
        rng = np.random.default_rng(0)
        x = rng.integers(0, 5, (90, 2, 6, 6)).astype(np.uint8)
        return Arrays(x[:60], np.arange(60) % 3, x[60:], np.arange(30) % 3)


def test_digits_have_their_published_size_and_are_standardized() -> None:
    data = Digits()
    assert (data.input_shape, data.num_classes) == ((1, 8, 8), 10)
    data.setup()
    x = data.train_dataloader().x
    assert [len(x), len(data.val_dataloader().x), len(data.test_dataloader().x)] == [1150, 287, 360]
    assert x.mean().item() == pytest.approx(0, abs=1e-5)
    assert x.std().item() == pytest.approx(1, abs=1e-3)
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (64, 1, 8, 8)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64


def test_training_data_of_each_channel_are_standardized_and_the_others_by_the_same_numbers() -> None:
    raw, data = Pixels(batch_size=4, scale="none"), Pixels(batch_size=4)
    raw.setup()
    data.setup()
    x = raw.train_dataloader().x
    mean, std = x.mean(dim=(0, 2, 3), keepdim=True), x.std(dim=(0, 2, 3), keepdim=True, correction=0)
    torch.testing.assert_close(data.train_dataloader().x, (x - mean) / std)
    torch.testing.assert_close(data.val_dataloader().x, (raw.val_dataloader().x - mean) / std)
    torch.testing.assert_close(data.test_dataloader().x, (raw.test_dataloader().x - mean) / std)


def test_the_unit_scale_divides_by_the_largest_value() -> None:
    data = Pixels(batch_size=4, scale="unit")
    data.setup()
    assert data.test_dataloader().x.unique().tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_a_constant_channel_becomes_zero() -> None:
    class Constant(Numbers):
        def load(self) -> Arrays:
            x_train, y_train, x_test, y_test = super().load()
            return Arrays(x_train * 0 + 7, y_train, x_test * 0 + 7, y_test)

    data = Constant(scale="standardize")
    data.setup()
    assert not data.test_dataloader().x.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": "minmax"}, "unknown scale 'minmax': choose one of standardize, unit, none"),
        ({"augment": True}, "augment is not for Numbers"),
        ({"batch_size": 0}, "batch_size is a whole number from 1 on, or 'full'; got 0"),
        ({"batch_size": "all"}, "got 'all'"),
        ({"batch_size": True}, "got True"),
        ({"eval_batch_size": 1.5}, "eval_batch_size is a whole number"),
    ],
)
def test_an_impossible_option_is_an_error_that_lists_the_choices(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Numbers(**options)


def test_a_batch_larger_than_the_training_split_is_an_error() -> None:
    data = Numbers(batch_size=64)
    data.setup()
    with pytest.raises(ValueError, match="takes 64 samples per step, of 42"):
        data.train_dataloader()


def test_full_takes_all_samples_in_one_step() -> None:
    data = Numbers(batch_size="full", eval_batch_size="full")
    data.setup()
    assert [len(x) for x, _ in data.train_dataloader()] == [42]
    assert [len(x) for x, _ in data.test_dataloader()] == [19]


def test_a_loader_before_setup_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"Numbers is not set up: call setup\(\)"):
        Numbers().train_dataloader()


def test_the_split_stays_while_the_seed_changes_the_order() -> None:
    first, second, other = Numbers(seed=0), Numbers(seed=1), Numbers(seed=0, split_seed=1)
    for data in (first, second, other):
        data.setup()
    assert first.val_dataloader().x.equal(second.val_dataloader().x)
    assert not first.val_dataloader().x.equal(other.val_dataloader().x)
    assert first.test_dataloader().x.equal(other.test_dataloader().x)
    orders = [[x.flatten().tolist() for x, _ in data.train_dataloader()] for data in (first, second)]
    assert orders[0] != orders[1]


def test_without_a_seed_seed_everything_decides_the_order() -> None:
    orders = []
    for seed, draws in ((3, 0), (3, 5), (4, 0)):
        pl.seed_everything(seed, verbose=False)
        torch.rand(draws)
        data = Numbers()
        data.setup()
        orders.append([x.flatten().tolist() for x, _ in data.train_dataloader()])
    assert orders[0] == orders[1] != orders[2]


def test_a_crop_shows_part_of_the_image_and_black_around_it() -> None:
    x = torch.rand(6, 2, 5, 4)
    crop = CropFlip(torch.tensor([7.0, 8.0]), padding=2)
    changes = torch.tensor([[2, 2, 0], [2, 2, 1], [0, 0, 0], [4, 4, 0], [1, 3, 1], [0, 4, 1]])
    out = crop(x, changes)
    assert out[0].equal(x[0])
    assert out[1].equal(x[1].flip(-1))
    assert out[2, :, 2:, 2:].equal(x[2, :, :3, :2])
    assert (out[2, 0, :2] == 7).all()
    assert (out[2, 1, :, :2] == 8).all()
    assert out[3, :, :3, :2].equal(x[3, :, 2:, 2:])
    unflipped = out[4].flip(-1)
    assert unflipped[:, 1:, :3].equal(x[4, :, :4, 1:])


def test_crops_are_drawn_over_the_whole_border_and_half_of_them_mirrored() -> None:
    changes = CropFlip(torch.zeros(1)).draw(5000, torch.Generator().manual_seed(0))
    assert sorted(changes[:, 0].unique().tolist()) == list(range(9))
    assert sorted(changes[:, 1].unique().tolist()) == list(range(9))
    assert changes[:, 2].float().mean().item() == pytest.approx(0.5, abs=0.05)


def test_augmentation_depends_on_the_epoch_and_the_sample_but_not_on_the_batch_size() -> None:
    images = []
    for batch_size in (6, 12):
        data = Pixels(batch_size=batch_size, augment=True, seed=0)
        data.setup()
        loader = data.train_dataloader()
        images.append([torch.cat([x for x, _ in loader])[:48] for _ in range(2)])
    assert images[0][0].equal(images[1][0])
    assert images[0][1].equal(images[1][1])
    plain = Pixels(batch_size=6, seed=0)
    plain.setup()
    x, _ = next(iter(plain.train_dataloader()))
    assert not images[0][0][:6].equal(x)


def test_the_border_of_a_crop_is_as_black_as_the_images() -> None:
    data = Pixels(batch_size=6, augment=True)
    data.setup()
    loader = data.train_dataloader()
    assert isinstance(loader, ShuffledBatches)
    assert loader.augment is not None
    torch.testing.assert_close(loader.augment.fill, loader.x.amin(dim=(0, 2, 3)))


def test_scaling_leaves_the_loaded_arrays_alone() -> None:
    class Kept(Numbers):
        arrays = Numbers().load()

        def load(self) -> Arrays:
            return self.arrays

    data = Kept(scale="unit")
    data.setup()
    for array, original in zip(Kept.arrays, Numbers().load(), strict=True):
        np.testing.assert_array_equal(array, original)


@pytest.mark.parametrize("source", [Digits, MNIST])
def test_mirrored_digits_are_refused(source: type[TensorData]) -> None:
    with pytest.raises(ValueError, match="augment is not for"):
        source(augment=True)
    assert FashionMNIST(augment=True).augment
    assert CIFAR10(augment=True).augment


def test_samples_left_out_are_reported_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = Numbers(limit=41)
    data.setup()
    with caplog.at_level("INFO"):
        assert [len(x) for x, _ in data.train_dataloader()] == [8] * 5
        data.train_dataloader()
    assert [record.message for record in caplog.records] == [
        "1 of 41 training samples sit out each epoch, others every time: on 1 process(es) with batch_size=8 "
        "they make no last batch"
    ]


def test_a_data_module_prints_its_sizes() -> None:
    data = Numbers()
    assert str(data) == "Numbers(not set up; samples (1,), 2 classes)"
    data.setup()
    assert str(data) == "Numbers(42 train, 11 val, 19 test; samples (1,), 2 classes)"
