"""AdaBN: a trained network takes the statistics of other data, or a mixture, and nothing else of it moves."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from bnlight import adapt_statistics, precise_statistics
from bnlight.norm import BatchNorm, BatchRenorm, FullNorm, MeanOnlyBatchNorm, SwitchableNorm

LAYERS = [nn.BatchNorm1d, BatchNorm, BatchRenorm, FullNorm, MeanOnlyBatchNorm, SwitchableNorm]


def source(kind: type[nn.Module]) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(kind(3), nn.Conv1d(3, 4, 2), kind(4), nn.Flatten(), nn.Linear(12, 2)).double()
    for _ in range(300):
        model(torch.randn(16, 3, 4, dtype=torch.float64))
    return model.eval()


def target(sizes: tuple[int, ...] = (7, 5), scale: float = 3.0, shift: float = 4.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    draw = [torch.randn(size, 3, 4, generator=generator, dtype=torch.float64) for size in sizes]
    return [x * scale + shift for x in draw]


def population(values: list[Tensor]) -> tuple[Tensor, Tensor]:
    rows = torch.cat([x.movedim(1, -1).flatten(0, 1) for x in values])
    return rows.mean(0), rows.var(0)


@pytest.mark.parametrize("kind", LAYERS)
def test_the_first_layers_statistics_are_the_targets(kind):
    model = source(kind)
    weights = [parameter.clone() for parameter in model.parameters()]
    assert adapt_statistics(model, target()) is model
    mean, var = population(target())
    torch.testing.assert_close(model[0].running_mean, mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(model[0].running_var, var, rtol=1e-12, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, BatchNorm, BatchRenorm])
def test_a_shift_of_scale_and_offset_disappears(kind):
    """What the network makes of shifted data is then what it makes of the data themselves."""
    data = target(scale=1, shift=0, sizes=(4000,))
    model = adapt_statistics(source(kind), data)
    shifted = [x * 3 + 4 for x in data]
    expected = model(data[0])
    assert (model(shifted[0]) - expected).abs().max() > 0.1
    assert torch.allclose(adapt_statistics(model, shifted)(shifted[0]), expected, atol=1e-4)


def test_later_layers_of_renorm_see_adapted_values_at_once_unlike_in_a_pass_with_its_own_correction():
    data = target((400,))
    by_batch = nn.functional.batch_norm(data[0], None, None, training=True)
    model = source(BatchRenorm)
    plain = precise_statistics(copy.deepcopy(model), data)
    with torch.no_grad():
        mean, var = population([model[1](by_batch)])
    adapt_statistics(model, data)
    torch.testing.assert_close(model[2].running_mean, mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model[2].running_var, var, rtol=1e-6, atol=0)
    assert (plain[2].running_var / var).max() > 1.5
    assert (float(model[0].r_max), float(model[0].d_max)) == (3, 5)


def test_full_norm_comes_close_when_called_again():
    data = target((400,))
    model = source(FullNorm)
    seen = []
    for _ in range(3):
        adapt_statistics(model, data)
        seen.append(model[2].running_mean.clone())
    assert (seen[1] - seen[0]).abs().max() > 0.1
    torch.testing.assert_close(seen[2], seen[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("number", [1, 12, 256, math.inf])
def test_source_samples_count_as_that_many(kind, number):
    model = source(kind)
    before = copy.deepcopy(model)
    adapt_statistics(model, target(), source_samples=number)
    mean, var = population(target())
    share = 0 if number == math.inf else 12 / (12 + number)  # of the 12 target samples
    for name, new in (("running_mean", mean), ("running_var", var)):
        mixed = (1 - share) * getattr(before[0], name) + share * new
        torch.testing.assert_close(getattr(model[0], name), mixed, rtol=1e-12, atol=0)


def test_samples_of_virtual_batches_count_once():
    model = BatchNorm(3, virtual_batch_size=2).double().eval()
    adapt_statistics(model, target((8, 4)), source_samples=12)
    mean, _ = population(target((8, 4)))
    torch.testing.assert_close(model.running_mean, mean / 2)


def test_a_few_target_samples_are_better_with_the_source_than_alone():
    """The claim of Schneider et al., on statistics: the error of the mixture is below both."""
    generator = torch.Generator().manual_seed(2)
    error = dict.fromkeys((0.0, 8.0, math.inf), 0.0)
    for _ in range(50):
        few = torch.randn(4, 64, generator=generator, dtype=torch.float64) + 0.5
        for number in error:
            layer = adapt_statistics(nn.BatchNorm1d(64).double().eval(), [few], source_samples=number)
            error[number] += float((layer.running_mean - 0.5).square().mean())
    assert error[8.0] < error[0.0]
    assert error[8.0] < error[math.inf]


def test_a_negative_number_is_refused_and_an_error_leaves_everything():
    model = source(BatchRenorm)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="source_samples must not be negative, got -1"):
        adapt_statistics(model, target(), source_samples=-1)
    with pytest.raises(ValueError, match="expected 3 channels"):
        adapt_statistics(model, [*target(), torch.randn(2, 5, 4).double()])
    with pytest.raises(TypeError, match="adapt_statistics: expected a batch that is a tensor"):
        adapt_statistics(model, [{"x": 1}])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_frozen_norms_in_a_model_in_training_mode_stay():
    model = source(BatchNorm).train()
    model[0].eval()
    before = copy.deepcopy(model[0].state_dict())
    adapt_statistics(model, target())
    assert all(torch.equal(value, before[name]) for name, value in model[0].state_dict().items())
    with pytest.warns(UserWarning, match="adapt_statistics: every norm is frozen") as caught:
        adapt_statistics(nn.Sequential(model[0]).train(True) and _all_frozen(), target())
    assert caught[0].filename == __file__


def _all_frozen() -> nn.Sequential:
    model = nn.Sequential(BatchNorm(3)).train()
    model[0].eval()
    return model
