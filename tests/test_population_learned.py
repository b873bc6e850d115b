"""Norms that train by running averages which have not converged: who is told, and what adapts them all the same."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

from bnlight import adapt_statistics, precise_statistics
from bnlight.norm import BatchNorm, BatchRenorm, FullNorm
from bnlight.norm.schedule import renorm_schedule
from bnlight.population import UnconvergedAverages


def trained(norm: nn.Module, steps: int) -> nn.Sequential:
    """A network that has seen batches of mean 4 and standard deviation 3."""
    torch.manual_seed(0)
    model = nn.Sequential(norm, nn.Linear(3, 4), type(norm)(4, momentum=norm.momentum)).double()
    if isinstance(norm, BatchRenorm):
        model[2].r_max.copy_(norm.r_max)
        model[2].d_max.copy_(norm.d_max)
    for x in data(steps):
        model(x)
    return model.eval()


def data(number: int = 20, scale: float = 3.0, shift: float = 4.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(16, 3, generator=generator, dtype=torch.float64) * scale + shift for _ in range(number)
    ]


@pytest.mark.parametrize("kind", [BatchRenorm, FullNorm])
@pytest.mark.parametrize("estimate", [precise_statistics, adapt_statistics])
def test_averages_that_remember_their_initial_values_are_named_before_they_are_replaced(kind, estimate):
    text = f"'0' and 1 more \\({kind.__name__}\\) train by running averages, and after 27 batches with momentum 0.01"
    with pytest.warns(UnconvergedAverages, match=f"{text} those are still 76% their initial values"):
        estimate(trained(kind(3, momentum=0.01), 27), data())


@pytest.mark.parametrize("estimate", [precise_statistics, adapt_statistics])
def test_averages_that_have_converged_or_train_nothing_are_not_named(estimate):
    scheduled = nn.Sequential(BatchRenorm(3)).double()
    renorm_schedule(scheduled, 9, 10)
    scheduled(data(1)[0])
    models = [
        trained(BatchRenorm(3, momentum=0.1), 40),
        trained(BatchNorm(3, momentum=0.01), 5),  # trains by its batches
        trained(BatchRenorm(3, momentum=None), 5),
        BatchRenorm(3).double(),  # has not trained
        scheduled,
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for model in models:
            estimate(model, data())


@pytest.mark.parametrize("norm", [BatchRenorm(3, r_max=1e3, d_max=1e3), FullNorm(3, momentum=0.01)])
def test_with_source_the_training_data_themselves_change_nothing_and_a_shift_disappears(norm):
    model = trained(copy.deepcopy(norm), 27)
    source = data(200)
    expected = model(source[0])
    same = adapt_statistics(copy.deepcopy(model), source, source=source)
    torch.testing.assert_close(same(source[0]), expected, rtol=0.05, atol=0.05)
    shifted = [x * 0.3 - 2 for x in source]
    assert (model(shifted[0]) - expected).abs().max() > 0.5
    plain = copy.deepcopy(model)
    adapt_statistics(model, shifted, source=source)
    torch.testing.assert_close(model(shifted[0]), expected, rtol=0.05, atol=0.05)
    with pytest.warns(UnconvergedAverages, match="source=, on the command line --with-source"):
        adapt_statistics(plain, source)
    assert (plain(source[0]) - expected).abs().max() > 0.5


def test_renorm_whose_bounds_make_it_batch_norm_adapts_as_one():
    model = trained(BatchRenorm(3, r_max=1, d_max=0), 5)
    target = data(5, 1.0, 0.0)
    with_source = adapt_statistics(copy.deepcopy(model), target, source=data())
    adapt_statistics(model, target)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(with_source.state_dict()[key], value)
