"""A training batch with an infinity or NaN moves no running average, and is counted."""

import copy
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from norm_table import CHANNELS, ROWS
from ranks import start
from torch import Tensor, nn

from bnlight import pool_statistics, precise_statistics
from bnlight.norm import BatchNorm, BatchRenorm, FullNorm
from bnlight.norm.batch import BatchStatistics

LAYERS = [name for name, row in ROWS.items() if row.by_batch and row.make().track_running_stats]
BAD = [math.inf, -math.inf, math.nan]
VIRTUAL = [name for name in LAYERS if name != "full" and not ROWS[name].options]


def batch(seed: int, dtype: torch.dtype = torch.float64, samples: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, CHANNELS, 3, 2, generator=generator, dtype=dtype) * 2 + 1


def spoiled(x: Tensor, value: float) -> Tensor:
    """The batch with one such value in its second sample."""
    x = x.clone()
    x[1, 2, 0, 1] = value
    return x


def averages(layer: nn.Module) -> dict[str, Tensor]:
    return {name: b for name, b in layer.named_buffers() if "running" in name or "tracked" in name}


def assert_equal(mine: nn.Module, twin: nn.Module, **tolerance: float) -> None:
    for name, average in averages(mine).items():
        expected = averages(twin)[name]
        assert expected.isfinite().all()
        torch.testing.assert_close(average, expected, **(tolerance or {"rtol": 0, "atol": 0}), msg=name)


def train(layer: nn.Module, x: Tensor) -> None:
    layer(x.clone().requires_grad_()).square().mean().backward()


def made(name: str, dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    layer = ROWS[name].make(dtype)
    for setting, value in settings.items():
        setattr(layer, setting, value)
    return layer


def pair(layer: BatchStatistics) -> tuple[Any, Any]:
    return layer, copy.deepcopy(layer)


def check(mine: Any, twin: Any, bad: Tensor, **tolerance: float) -> None:
    """Both see two batches and two more, and only `mine` a bad one in between."""
    for layer in (mine, twin):
        for seed in range(2):
            train(layer, batch(seed, bad.dtype))
    train(mine, bad)
    assert_equal(mine, twin, **tolerance)
    for layer in (mine, twin):
        layer.zero_grad()
        for seed in range(2, 4):
            train(layer, batch(seed, bad.dtype))
        assert all(p.grad.isfinite().all() for p in layer.parameters() if p.grad is not None)
    assert_equal(mine, twin, **tolerance)


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LAYERS)
def test_a_batch_that_is_not_finite_moves_no_average_and_is_counted(name, dtype, momentum, value):
    mine, twin = pair(made(name, dtype, momentum=momentum))
    check(mine, twin, spoiled(batch(9, dtype), value))
    assert (mine.skipped_batches, twin.skipped_batches) == (1, 0)
    assert mine.num_batches_tracked == 4
    assert "skipped_batches" not in mine.state_dict()
    mine.reset_running_stats()
    assert mine.skipped_batches == 0


@pytest.mark.parametrize("name", VIRTUAL)
def test_one_group_that_is_not_finite_is_enough(name):
    mine, twin = pair(made(name, virtual_batch_size=2))
    check(mine, twin, spoiled(batch(9), math.nan))
    assert mine.skipped_batches == 1


@pytest.mark.parametrize("name", LAYERS)
def test_what_a_mask_hides_is_not_looked_at_and_what_it_shows_is(name):
    mine, twin = pair(made(name))
    bad, mask = spoiled(batch(9), math.inf), torch.ones(6, 3, 2, dtype=torch.bool)
    mask[1] = False
    for layer in (mine, twin):
        layer(batch(0), mask=mask)
    mine(bad, mask=mask)
    assert mine.skipped_batches == 0
    mask[1, 0, 1] = True
    mine(bad, mask=mask)
    twin(batch(9), mask=mask & ~bad.isinf().any(1))
    assert mine.skipped_batches == 1
    assert_equal(mine, twin)


@pytest.mark.filterwarnings(
    "ignore:.*Function.* should not be instantiated:DeprecationWarning"
)  # by torch.compile
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("name", [name for name in LAYERS if "," not in name])
def test_a_compiled_layer_skips_it_without_a_count(name, momentum):
    torch._dynamo.reset()
    mine, twin = pair(made(name, momentum=momentum))
    mine.compile(backend="aot_eager", fullgraph=True)
    check(mine, twin, spoiled(batch(9), math.nan), rtol=1e-12, atol=1e-12)
    assert mine.skipped_batches == 0


@pytest.mark.parametrize("name", LAYERS)
def test_large_finite_values_are_no_infinities(name):
    layer = made(name, torch.float32)
    before = copy.deepcopy(averages(layer))
    layer(batch(0, torch.float32) * 1e18)
    assert layer.skipped_batches == 0
    assert not torch.equal(layer.running_mean, before["running_mean"])


def test_batch_norm_stays_bit_equal_to_torchs_and_a_backward_may_span_the_bad_batch():
    mine, torchs = BatchNorm(CHANNELS), nn.BatchNorm2d(CHANNELS)
    for seed in range(5):
        x = batch(seed, torch.float32)
        assert torch.equal(mine(x), torchs(x))
    assert all(torch.equal(a, b) for a, b in zip(mine.buffers(), torchs.buffers(), strict=True))
    x = batch(7, torch.float32).requires_grad_()
    good = mine(x)
    mine(spoiled(batch(8, torch.float32), math.nan))
    good.pow(3).sum().backward()
    assert x.grad.isfinite().all()
    assert mine.skipped_batches == 1


@pytest.mark.parametrize("name", ["batch", "renorm"])
def test_averages_that_are_not_finite_already_stay_and_the_other_channels_go_on(name):
    layer = made(name)
    layer.running_mean[0] = math.nan
    before = layer.running_mean.clone()
    layer(batch(0))
    assert layer.running_mean[0].isnan()
    assert (layer.running_mean[1:] != before[1:]).all()
    assert layer.skipped_batches == 0
    layer(spoiled(batch(1), math.inf))
    assert layer.running_mean[1:].isfinite().all()
    assert layer.skipped_batches == 1


@pytest.mark.parametrize("make", [BatchNorm, BatchRenorm, FullNorm])
def test_pooled_micro_batches_are_skipped_together(make):
    layer = make(CHANNELS).double()
    before = copy.deepcopy(averages(layer))
    with pool_statistics(layer):
        layer(batch(0))
        layer(spoiled(batch(1), math.inf))
    assert all(torch.equal(average, before[name]) for name, average in averages(layer).items())
    assert layer.skipped_batches == 1


def test_full_norm_keeps_the_averages_of_its_gradients():
    layer = FullNorm(CHANNELS).double()
    train(layer, batch(0))
    before = layer.mean_grad.clone(), layer.var_grad.clone()
    train(layer, spoiled(batch(1), math.inf))
    assert torch.equal(layer.mean_grad, before[0])
    assert torch.equal(layer.var_grad, before[1])


def on_a_rank(name: str, virtual: bool) -> tuple[int, dict[str, Tensor]]:
    rank, layer = dist.get_rank(), made(name, process_group="world")
    layer.virtual_batch_size = 2 if virtual else None
    for step in range(3):
        x = batch(2 * step + rank)
        layer(spoiled(x, math.nan) if (rank, step) == (1, 1) else x)
    return layer.skipped_batches, averages(layer)


def test_all_ranks_skip_what_one_of_them_has(tmp_path):
    with start(2, tmp_path) as ranks:
        for name in LAYERS:
            for virtual in (False, True) if name in VIRTUAL else (False,):
                (skipped, mine), (skipped_there, theirs) = ranks.run(on_a_rank, name, virtual)
                assert skipped == skipped_there == 1
                assert mine["num_batches_tracked"] == 2
                for key, average in mine.items():
                    assert average.isfinite().all()
                    assert torch.equal(average, theirs[key])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_full_norm_keeps_the_gradients_of_a_skipped_batch_out_of_their_averages(dtype):
    layer = FullNorm(CHANNELS, dtype=dtype)
    train(layer, batch(0, dtype))
    before = [average.clone() for average in (layer.mean_grad, layer.var_grad)]
    layer(spoiled(batch(1, dtype), torch.finfo(dtype).max / 4).requires_grad_()).sum().backward()
    assert layer.skipped_batches == 1
    assert torch.equal(layer.mean_grad, before[0])
    assert torch.equal(layer.var_grad, before[1])


def test_precise_statistics_leave_out_a_batch_that_is_not_finite_and_warn():
    mine, twin = BatchNorm(CHANNELS), BatchNorm(CHANNELS)
    good = [batch(seed, torch.float32) for seed in range(2)]
    precise_statistics(twin, good)
    with pytest.warns(UserWarning, match=r"left out at '' \(1\)"):
        precise_statistics(mine, [good[0], spoiled(batch(2, torch.float32), math.nan), good[1]])
    assert_equal(mine, twin)
