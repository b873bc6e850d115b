"""renorm_schedule moves the bounds of every BatchRenorm along the paper's lines, and starts its averages well."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bnlight.norm import BatchNorm, BatchRenorm, renorm_schedule

PAPER = 125_000


def bounds(layer: BatchRenorm) -> tuple[float, float]:
    return layer.r_max.item(), layer.d_max.item()


def test_the_papers_settings_are_met_at_the_papers_steps():
    layer = BatchRenorm(4)
    found = {}
    for step in (0, 4_999, 5_000, 15_000, 22_500, 25_000, 40_000, 125_000, 200_000):
        renorm_schedule(layer, step, PAPER)
        found[step] = bounds(layer)
    expected = {
        0: (1, 0),
        4_999: (1, 0),
        5_000: (1, 0),
        15_000: (1 + 2 * 10 / 35, 5 * 10 / 20),
        22_500: (2, 5 * 17.5 / 20),
        25_000: (1 + 2 * 20 / 35, 5),
        40_000: (3, 5),
        125_000: (3, 5),
        200_000: (3, 5),
    }
    assert found == {step: pytest.approx(pair, rel=1e-6) for step, pair in expected.items()}


@given(
    total=st.integers(1, 10_000),
    shares=st.tuples(*[st.floats(0, 1)] * 3),
    r_max=st.floats(1, 10),
    d_max=st.floats(0, 10),
)
def test_bounds_never_fall_and_end_at_their_targets(total, shares, r_max, d_max):
    warmup, *ends = sorted(shares)
    layer = BatchRenorm(2, dtype=torch.float64)
    options = {"r_max": r_max, "d_max": d_max, "warmup": warmup, "r_max_at": ends[0], "d_max_at": ends[1]}
    before = (1.0, 0.0)
    for step in sorted({0, total // 7, total // 3, int(total * 0.9), total}):
        renorm_schedule(layer, step, total, **options)
        now = bounds(layer)
        if step < warmup * total:
            assert now == (1, 0)
        assert now[0] >= before[0] - 1e-12
        assert now[1] >= before[1] - 1e-12
        before = now
    assert before == (pytest.approx(r_max), pytest.approx(d_max))


def test_a_run_without_warm_up_may_start_at_its_targets():
    layer = BatchRenorm(2)
    renorm_schedule(layer, 0, 10, warmup=0, r_max_at=0, d_max_at=0, r_max=2, d_max=1)
    assert bounds(layer) == (2, 1)


def test_every_layer_is_set_once_in_place_and_nothing_else_is_touched():
    shared = BatchRenorm(4)
    model = nn.Sequential(shared, BatchNorm(4), nn.Sequential(shared, BatchRenorm(4)))
    kept = shared.r_max
    assert renorm_schedule(model, 20_000, PAPER) == 2
    assert shared.r_max is kept
    assert bounds(shared) == bounds(model[2][1]) != (3, 5)
    assert renorm_schedule(nn.Linear(2, 2), 0, 1) == 0


def test_during_warm_up_it_is_batch_norm():
    renorm, batch = BatchRenorm(3), BatchNorm(3)
    renorm_schedule(renorm, 0, 100)
    x = torch.randn(16, 3) * 3 + 5
    torch.testing.assert_close(renorm(x), batch(x))


def test_the_averages_are_plain_ones_until_momentum_outweighs_them():
    layer = BatchRenorm(2, momentum=0.25, dtype=torch.float64)
    batches = torch.randn(7, 8, 2, dtype=torch.float64) * 3 + 100
    for step, x in enumerate(batches[:4]):
        renorm_schedule(layer, step, 100)
        layer(x)
    torch.testing.assert_close(layer.running_mean, batches[:4].mean((0, 1)))
    stds = (batches.var(1, correction=0) + layer.eps).sqrt()
    torch.testing.assert_close(layer.running_var, stds[:4].mean(0).square() - layer.eps)
    mean = layer.running_mean.clone()
    for step, x in enumerate(batches[4:], start=4):
        renorm_schedule(layer, step, 100)
        layer(x)
        mean.lerp_(x.mean(0), 0.25)
    torch.testing.assert_close(layer.running_mean, mean)


def test_corrections_are_small_when_the_bounds_open_on_data_far_from_the_initial_averages():
    """Without the warm start the mean is 100 standard deviations off, and d is at its bound for hundreds of steps."""
    torch.manual_seed(0)
    layer = BatchRenorm(1)
    for step in range(20):
        renorm_schedule(layer, step, 40, warmup=0.25, r_max_at=0.5, d_max_at=0.5)
        y = layer(torch.randn(64, 1) + 100)
    assert y.mean().abs() < 0.5
    assert abs(y.std() - 1) < 0.3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"step": -1}, "step=-1"),
        ({"total_steps": 0}, "total_steps=0"),
        ({"r_max": 0.5}, "r_max=0.5"),
        ({"d_max": -1.0}, "d_max=-1"),
        ({"warmup": 0.5}, "warmup=0.5"),
        ({"r_max_at": 1.5}, "r_max_at=1.5"),
        ({"warmup": -0.1}, "warmup=-0.1"),
    ],
)
def test_what_is_no_schedule_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        renorm_schedule(BatchRenorm(2), **{"step": 0, "total_steps": 10} | arguments)


def test_the_layers_and_the_functions_need_no_lightning():
    code = "import sys, bnlight, bnlight.norm, bnlight.surgery; assert 'pytorch_lightning' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
