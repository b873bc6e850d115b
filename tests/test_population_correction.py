"""Evaluation that weighs each example with the running averages, against its formulas and against training."""

import copy
from typing import Any

import pytest
import torch
from ranks import Ranks, start
from torch import Tensor, nn

from bnlight import correct_inference, precise_statistics
from bnlight.norm import NORMS, BatchLayerNorm, BatchNorm, BatchRenorm, FullNorm, MeanOnlyBatchNorm, NormLSTM
from bnlight.norm.batch import BatchStatistics

CHANNELS = 3
TYPES = {
    name: t
    for name, t in NORMS.items()
    if issubclass(t, BatchStatistics) and t not in (BatchRenorm, FullNorm)
} | {"mean only": MeanOnlyBatchNorm}
CASES = [*[(name, {}) for name in TYPES], ("batch_layer", {"spatial": False}), ("batch", {"channel_dim": -1})]


def data(*sizes: int, positions: int = 4, seed: int = 0) -> list[Tensor]:
    """Batches whose examples have levels of their own."""
    torch.manual_seed(seed)
    shapes = [(size, CHANNELS) for size in sizes]
    return [
        torch.randn(*shape, positions).double() + 3 * torch.randn(*shape, 1).double() + 5 for shape in shapes
    ]


def layer_of(name: str, **options: Any) -> Any:
    """A layer that has been trained a little, in evaluation mode."""
    torch.manual_seed(1)
    layer = TYPES[name](CHANNELS, **options).double()
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, 0.2, 0.8)
    for x in data(6, 5, seed=2):
        layer(x.movedim(1, -1) if options.get("channel_dim") == -1 else x)
    return layer.eval()


def corrected(layer: Any, x: Tensor, a: float, example_var: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
    """The formula as it is written, for one example `(C, P)`, from its first two moments."""
    mean, var = layer.running_mean, layer.running_var
    axes = [] if mean.dim() > 1 else [1]
    first, second = (x.mean(axes), x.square().mean(axes)) if axes else (x, x.square())
    together = (1 - a) * mean + a * first
    return together, (1 - a) * (var + mean.square()) + a * second - together.square() - a * (
        1 - a
    ) * example_var


@pytest.mark.parametrize("estimated", [False, True])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_each_example_is_evaluated_by_statistics_in_which_it_has_a_part(name, options, estimated):
    layer, (x,) = layer_of(name, **options), data(5)
    plain = copy.deepcopy(layer)
    last = options.get("channel_dim") == -1
    batches = [b.movedim(1, -1) if last else b for b in data(7, 4, seed=3)] if estimated else None
    assert correct_inference(layer, 0.3, batches=batches) is layer
    example_var = (
        layer.example_var.view(-1, 4) if layer.running_mean.dim() > 1 and estimated else layer.example_var
    )
    if not estimated:
        assert float(example_var) == 0
    y = layer(x.movedim(1, -1) if last else x)
    for n, example in enumerate(x):
        one = copy.deepcopy(plain)
        mean, var = corrected(plain, example, 0.3, example_var)
        one.running_mean.copy_(mean)
        one.running_var.copy_(var)
        expected = one(example.T[None] if last else example[None])[0]
        torch.testing.assert_close(y[n], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["batch", "mean only", "switchable"])
def test_examples_of_one_value_have_no_variance_of_their_own(name):
    layer = layer_of(name)
    x = data(5)[0][:, :, 0]
    expected = copy.deepcopy(correct_inference(layer, 0.3))(x[:, :, None])[:, :, 0]
    torch.testing.assert_close(layer(x), expected)
    mean = layer.running_mean + 0.3 * (x - layer.running_mean)
    var = 0.7 * layer.running_var + 0.21 * (x - layer.running_mean).square()
    if name == "batch":
        y = (x - mean) / (var + layer.eps).sqrt() * layer.weight + layer.bias
        torch.testing.assert_close(layer(x), y)


@pytest.mark.parametrize("name", TYPES)
def test_a_mask_hides_positions_from_the_examples_statistics_too(name):
    layer, (x,) = layer_of(name), data(5)
    correct_inference(layer, 0.3, batches=[*data(7, seed=3)])
    mask = torch.ones(5, 4, dtype=torch.bool)
    mask[:, 3], mask[4] = False, False
    y = layer(torch.where(mask[:, None], x, torch.nan), mask)
    torch.testing.assert_close(y[:4, :, :3], layer(x[:4, :, :3]), rtol=1e-10, atol=1e-10)
    assert not y[4].any()
    assert not y[:, :, 3].any()


def test_the_variance_between_examples_is_that_of_their_means_over_all_batches():
    layer, batches = layer_of("batch"), data(7, 1, 4)
    correct_inference(layer, 0.25, batches=batches)
    torch.testing.assert_close(layer.example_var, torch.cat(batches).mean(2).var(0))
    masks = [torch.rand(len(x), 4) < 0.6 for x in batches]
    masks[0][0], masks[1][0] = False, True
    hidden = [torch.where(m[:, None], x, torch.nan) for x, m in zip(batches, masks, strict=True)]
    correct_inference(
        layer, 0.25, batches=zip(hidden, masks, strict=True), forward=lambda model, batch: model(*batch)
    )
    means = [
        v[:, seen].mean(1)
        for x, m in zip(batches, masks, strict=True)
        for v, seen in zip(x, m, strict=True)
        if seen.any()
    ]
    torch.testing.assert_close(layer.example_var, torch.stack(means).var(0))


def test_it_is_estimated_from_plain_evaluation_whatever_was_on_before():
    model = nn.Sequential(
        layer_of("batch"), nn.Conv1d(3, 3, 1).double(), nn.Dropout(0.5), layer_of("switchable")
    )
    batches = data(7, 4)
    expected = torch.cat([model.eval()[1](model[0](x)) for x in batches]).mean(2).var(0)
    correct_inference(model.train(), 0.9)
    correct_inference(model, 0.1, batches=batches)
    torch.testing.assert_close(model[3].example_var, expected)
    assert all(module.training for module in model.modules())


def statistics_behind(layer: BatchNorm, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance that normalized one example `(C, P)`, found from its outputs."""
    y = layer(x[None])[0]
    std = (x[:, 0] - x[:, 1]) / (y[:, 0] - y[:, 1])
    return x[:, 0] - y[:, 0] * std, std.square()


def test_with_batches_it_is_what_training_expects_for_the_example():
    n, trials = 4, 200_000
    (population,) = data(4000, positions=3)
    layer = BatchNorm(CHANNELS, eps=0.0, affine=False).double()
    precise_statistics(layer, population.split(100)).eval()
    x = population[17]
    others = population[torch.randint(len(population), (trials, n - 1))]
    batches = torch.cat([x.expand(trials, 1, -1, -1), others], 1)
    mean, var = batches.mean([1, 3]).mean(0), batches.var([1, 3], correction=0).mean(0)

    plain = statistics_behind(layer, x)
    weighed = statistics_behind(correct_inference(layer, 1 / n), x)
    exact = statistics_behind(correct_inference(layer, 1 / n, batches=population.split(100)), x)
    torch.testing.assert_close(exact[0], mean, rtol=5e-3, atol=0)
    torch.testing.assert_close(exact[1], var, rtol=5e-3, atol=0)
    for others in (plain, weighed):
        assert ((others[1] - var).abs() / var > 0.1).all()


@pytest.mark.parametrize("name", TYPES)
def test_a_weight_of_zero_is_plain_evaluation_bit_by_bit(name):
    layer, (x,) = layer_of(name), data(5)
    plain = copy.deepcopy(layer)
    correct_inference(layer, 0.5, batches=data(4))
    assert not torch.equal(layer(x), plain(x))
    correct_inference(layer, 0)
    assert torch.equal(layer(x), plain(x))
    assert layer.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("name", TYPES)
def test_training_is_not_affected(name):
    layer, (x,) = layer_of(name), data(5)
    plain = copy.deepcopy(layer)
    correct_inference(layer, 0.5, batches=data(4))
    assert torch.equal(layer.train()(x), plain.train()(x))
    for key, value in plain.state_dict().items():
        assert torch.equal(layer.state_dict()[key], value)
    layer.small_batch = plain.small_batch = "running"
    assert torch.equal(layer(x[:1, :, :1]), plain(x[:1, :, :1]))


@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_state_dict_and_a_copy_carry_the_correction(name, options):
    layer = layer_of(name, **options)
    x, *batches = (b.movedim(1, -1) if "channel_dim" in options else b for b in data(5, 4, 3))
    correct_inference(layer, 0.5, batches=batches)
    fresh = TYPES[name](CHANNELS, **options).double().eval()
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    torch.testing.assert_close(fresh.float()(x.float()), layer(x).float(), rtol=1e-4, atol=1e-4)


def test_a_state_dict_without_it_leaves_it_on():
    layer, torchs = correct_inference(BatchNorm(3), 0.5), nn.BatchNorm1d(3)
    layer.load_state_dict(torchs.state_dict())
    assert float(layer.example_weight) == 0.5
    with pytest.raises(RuntimeError, match="Unexpected key"):
        torchs.load_state_dict(layer.state_dict())


def test_half_precision_keeps_the_correction_in_float32():
    layer = correct_inference(BatchNorm(3).bfloat16().eval(), 0.1, batches=[x.bfloat16() for x in data(9)])
    layer = layer.bfloat16()
    assert layer.example_weight.dtype == layer.example_var.dtype == torch.float32
    assert layer(data(4)[0].bfloat16()).dtype == torch.bfloat16


def test_what_cannot_be_corrected_says_so_and_nothing_changes():
    model = nn.Sequential(BatchNorm(3), BatchRenorm(3))
    with pytest.raises(
        ValueError, match="'1' is a BatchRenorm, which normalizes by its running averages in train"
    ):
        correct_inference(model, 0.1)
    with pytest.raises(ValueError, match="'' is a FullNorm"):
        correct_inference(FullNorm(3), 0.1)
    with pytest.raises(TypeError, match="'1' is torch's BatchNorm1d; use bnlight"):
        correct_inference(nn.Sequential(model[0], nn.BatchNorm1d(3)), 0.1)
    for weight in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="example_weight must be in"):
            correct_inference(model[0], weight)
    with pytest.raises(ValueError, match="correct_inference: there were no batches"):
        correct_inference(model[0], 0.1, batches=[])
    assert model[0].example_weight is model[0].example_var is None
    none = nn.Sequential(nn.LayerNorm(3), BatchNorm(3, track_running_stats=False))
    assert correct_inference(none, 0.1, batches=[torch.zeros(2, 3)]) is none
    assert none[1].example_weight is None


def test_an_error_in_the_estimate_leaves_the_correction_of_before():
    layer = correct_inference(layer_of("batch"), 0.5)
    with pytest.raises(ValueError, match="expected 3 channels"):
        correct_inference(layer, 0.1, batches=[*data(4), torch.zeros(4, 2)])
    assert float(layer.example_weight) == 0.5
    assert float(layer.example_var) == 0
    assert layer.observer is None


def test_a_layer_without_examples_is_named_and_stays_uncorrected():
    model = nn.ModuleDict({"used": layer_of("batch"), "idle": layer_of("batch")})
    with pytest.warns(UserWarning, match="correct_inference: .* reached 'idle'") as caught:
        correct_inference(model, 0.1, batches=data(4), forward=lambda model, x: model["used"](x))
    assert caught[0].filename == __file__
    assert model["idle"].example_weight is None
    assert model["used"].example_weight is not None


def test_an_lstm_is_corrected_at_every_step():
    model = NormLSTM(CHANNELS, 2, norm="batch", max_length=4).double().eval()
    x = data(5)[0].movedim(2, 0)
    plain, _ = model(x)
    correct_inference(model, 0.2, batches=[x])
    assert not torch.allclose(model(x)[0], plain)
    alone, _ = model(x[:, :1])
    torch.testing.assert_close(model(x)[0][:, :1], alone)


@pytest.mark.parametrize("name", ["batch", "batch_instance", "switchable", "mean only"])
def test_gradients_pass_through_the_examples_statistics(name):
    layer = correct_inference(layer_of(name), 0.3, batches=data(4))
    x = data(3)[0].requires_grad_()
    assert torch.autograd.gradcheck(layer, x)


@pytest.mark.parametrize("name", TYPES)
def test_it_compiles_into_one_graph(name):
    torch._dynamo.reset()
    layer, (x, other) = layer_of(name), data(5, 7)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        plain = compiled(x)
        correct_inference(compiled, 0.3, batches=data(4))
        for batch in (x, other):
            torch.testing.assert_close(compiled(batch), layer(batch), rtol=1e-10, atol=1e-10)
        correct_inference(compiled, 0)
        torch.testing.assert_close(compiled(x), plain)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    with start(2, tmp_path_factory.mktemp("ranks")) as ranks:
        yield ranks


def estimated_over_ranks() -> Tensor:
    layer = layer_of("batch")
    layer.process_group = "world"
    sizes = [[5, 3], [4]][torch.distributed.get_rank()]
    correct_inference(layer, 0.1, batches=data(*sizes, seed=len(sizes)))
    return layer.example_var


def test_ranks_estimate_together(ranks: Ranks):
    first, second = ranks.run(estimated_over_ranks)
    assert torch.equal(first, second)
    together = torch.cat([*data(5, 3, seed=2), *data(4, seed=1)])
    torch.testing.assert_close(first, together.mean(2).var(0))


def test_positions_that_are_not_known_yet_are_learnt_from_the_batches():
    layer = BatchLayerNorm(CHANNELS, spatial=False).double().eval()
    (x,) = data(6)
    correct_inference(layer, 0.3, batches=[x])
    torch.testing.assert_close(layer.example_var, x.var(0).flatten())
    assert layer(x).shape == x.shape
