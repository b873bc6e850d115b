"""A mask makes every layer see the valid positions only: equal to the norm of the packed values."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bnlight.norm import (
    BatchNorm,
    BatchRenorm,
    DynamicTanh,
    FilterResponseNorm,
    GroupNorm,
    InstanceNorm,
    LayerNorm,
    RMSNorm,
)

BATCH = {
    "batch": lambda **o: BatchNorm(4, momentum=0.3, **o),
    "cumulative": lambda **o: BatchNorm(4, momentum=None, **o),
    "renorm": lambda **o: BatchRenorm(4, momentum=0.3, r_max=1.2, d_max=0.1, **o),
}
SAMPLE = {
    "layer": lambda **o: LayerNorm(4, **o),
    "channels": lambda **o: LayerNorm(4, over="channels", **o),
    "group": lambda **o: GroupNorm(4, num_groups=2, **o),
    "instance": lambda **o: InstanceNorm(4, **o),
    "rms": lambda **o: RMSNorm(4, **o),
    "rms of the sample": lambda **o: RMSNorm(4, over="sample", **o),
    "frn": lambda **o: FilterResponseNorm(4, learn_eps=True, tlu=True, **o),
    "tanh": lambda **o: DynamicTanh(4, **o),
}
SHAPES = [(5, 4), (5, 4, 6), (3, 4, 3, 2)]


def randomized(layer: nn.Module) -> nn.Module:
    layer = layer.double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


def mask_for(shape: tuple[int, ...]) -> Tensor:
    """A random mask with at least two valid positions and one padded."""
    mask = torch.rand(shape[0], *shape[2:]) < 0.6
    mask.view(-1)[:3] = torch.tensor([True, True, False])
    return mask


def run(layer: nn.Module, x: Tensor, weights: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = layer(x) if mask is None else layer(x, mask=mask)
    (y * weights).sum().backward()
    return y.detach(), x.grad


def assert_equals_packed(make, x: Tensor, mask: Tensor, channels_last: bool = False) -> None:
    masked, packed = randomized(make()), make().double()
    packed.load_state_dict(masked.state_dict())
    weights = torch.randn_like(x)
    for _ in range(2):
        rows = x.movedim(1, -1)[mask]
        expected, expected_grad = run(packed, rows, weights.movedim(1, -1)[mask])
        z = x.masked_fill(~mask.unsqueeze(1), math.nan)
        z = z.to(memory_format=torch.channels_last) if channels_last else z
        y, grad = run(masked, z, weights, mask)
        assert y.stride() == grad.stride() == z.stride()
        for full, part in ((y, expected), (grad, expected_grad)):
            torch.testing.assert_close(full.movedim(1, -1)[mask], part)
            assert (full.movedim(1, -1)[~mask] == 0).all()
        for mine, theirs in zip(masked.parameters(), packed.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad)
        for mine, theirs in zip(masked.buffers(), packed.buffers(), strict=True):
            torch.testing.assert_close(mine, theirs)
        x = x * 2 + 1


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("make", BATCH.values(), ids=BATCH)
def test_batch_norms_equal_themselves_on_the_packed_values(make, shape):
    for channels_last in {False, len(shape) == 4}:
        assert_equals_packed(
            make, torch.randn(shape, dtype=torch.float64) * 3 + 1, mask_for(shape), channels_last
        )


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(1, 6),
    space=st.lists(st.integers(1, 4), max_size=2),
    mean=st.floats(-1e3, 1e3),
    make=st.sampled_from([*BATCH.values()]),
    data=st.data(),
)
def test_any_mask_equals_packing(n, space, mean, make, data):
    positions = n * math.prod(space)
    if positions < 2:
        return
    flat = data.draw(
        st.lists(st.booleans(), min_size=positions, max_size=positions).filter(lambda m: sum(m) > 1)
    )
    x = torch.randn(n, 4, *space, dtype=torch.float64) + mean
    assert_equals_packed(make, x, torch.tensor(flat).view(n, *space))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("make", SAMPLE.values(), ids=SAMPLE)
def test_sample_norms_equal_themselves_on_each_samples_valid_positions(make, shape):
    layer = randomized(make())
    if isinstance(layer, InstanceNorm) and len(shape) == 2:
        return
    x, weights, mask = (
        torch.randn(shape, dtype=torch.float64) * 3 + 1,
        torch.randn(shape).double(),
        mask_for(shape),
    )
    for channels_last in {False, len(shape) == 4}:
        z = x.masked_fill(~mask.unsqueeze(1), math.inf)
        z = z.to(memory_format=torch.channels_last) if channels_last else z
        y, grad = run(layer, z, weights, mask)
        assert y.stride() == z.stride()
        totals = [p.grad.clone() for p in layer.parameters()]
        for n in range(shape[0]):
            where = mask[n]
            assert (y[n][:, ~where] == 0).all()
            assert (grad[n][:, ~where] == 0).all()
            if where.sum() < 2:
                for total in totals:
                    total.zero_()  # checked on the other samples; here torch's layers would refuse one value
                continue
            expected, expected_grad = run(layer, x[n : n + 1][:, :, where], weights[n : n + 1][:, :, where])
            torch.testing.assert_close(y[n : n + 1][:, :, where], expected)
            torch.testing.assert_close(grad[n : n + 1][:, :, where], expected_grad)


@pytest.mark.parametrize("make", [*BATCH.values(), *SAMPLE.values()], ids=[*BATCH, *SAMPLE])
def test_an_all_valid_mask_is_no_mask(make):
    with_mask, without = randomized(make()), make().double()
    without.load_state_dict(with_mask.state_dict())
    x, weights = torch.randn(3, 4, 5, 2, dtype=torch.float64), torch.randn(3, 4, 5, 2, dtype=torch.float64)
    for found, expected in zip(
        run(with_mask, x, weights, torch.ones(3, 5, 2, dtype=torch.bool)),
        run(without, x, weights),
        strict=True,
    ):
        torch.testing.assert_close(found, expected)
    for mine, theirs in zip(with_mask.parameters(), without.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
    for mine, theirs in zip(with_mask.buffers(), without.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("n", [6, 7])
@pytest.mark.parametrize("make", [BATCH["batch"], BATCH["renorm"]], ids=["batch", "renorm"])
def test_masks_and_virtual_batches_compose(make, n, channels_last):
    layer, plain = randomized(make(virtual_batch_size=2)), make().double()
    groups = n // 2
    x, mask = torch.randn(n, 4, 3, 2, dtype=torch.float64) + 3, torch.rand(n, 3, 2) < 0.7
    mask[:groups, 0] = True
    mask[groups - 1 :: groups] = False  # the last group has nothing at all: it counts for nothing
    weights = torch.randn_like(x)
    start = {name: value.clone() for name, value in layer.state_dict().items()}
    z = x.masked_fill(~mask.unsqueeze(1), math.nan)
    y, grad = run(layer, z.to(memory_format=torch.channels_last) if channels_last else z, weights, mask)
    means = []
    for k in range(groups - 1):
        plain.load_state_dict(start)
        part = slice(k, None, groups)
        expected, expected_grad = run(plain, x[part], weights[part], mask[part])
        torch.testing.assert_close(y[part], expected)
        torch.testing.assert_close(grad[part], expected_grad)
        means.append(plain.running_mean.clone())
    assert (y[groups - 1 :: groups] == 0).all()
    torch.testing.assert_close(layer.running_mean, torch.stack(means).mean(0))
    assert layer.num_batches_tracked == 1


def test_one_valid_value_follows_small_batch():
    x, mask = torch.randn(3, 4, 5), torch.zeros(3, 5, dtype=torch.bool)
    mask[1, 2] = True
    with pytest.raises(ValueError, match="one value per channel"):
        BatchNorm(4)(x, mask=mask)
    layer = BatchNorm(4, small_batch="running")
    x.requires_grad_()
    y = layer(x, mask=mask)
    y.sum().backward()
    torch.testing.assert_close(y[1, :, 2], x[1, :, 2] / (1 + layer.eps) ** 0.5)
    torch.testing.assert_close(x.grad[1, :, 2], torch.full((4,), (1 + layer.eps) ** -0.5))
    assert layer.num_batches_tracked == 0
    assert torch.equal(layer.running_mean, torch.zeros(4))


def test_a_group_with_one_valid_value_can_use_the_running_statistics_beside_normal_groups():
    layer = BatchNorm(2, virtual_batch_size=2, small_batch="running").double()
    x, mask = torch.randn(4, 2, 3, dtype=torch.float64), torch.ones(4, 3, dtype=torch.bool)
    mask[1::2] = False
    mask[1, 0] = True
    y = layer(x, mask=mask)
    torch.testing.assert_close(y[1, :, 0], x[1, :, 0] / (1 + layer.eps) ** 0.5)
    torch.testing.assert_close(layer.running_mean, 0.1 * x[::2].mean((0, 2)))
    assert layer.num_batches_tracked == 1
