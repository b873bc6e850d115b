"""Statistics estimated after training equal those of the whole data set, and nothing else moves."""

import copy
import doctest
import gc
import importlib
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import Ranks, start
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import bnlight.population.observe
from bnlight import freeze_norm, precise_statistics, sync_norm, unfreeze_norm
from bnlight.norm import NORMS, BatchLayerNorm, BatchNorm, BatchRenorm, FullNorm, MeanOnlyBatchNorm, NormLSTM
from bnlight.norm.batch import BatchStatistics

pytestmark = pytest.mark.filterwarnings("default::bnlight.population.UnconvergedAverages")  # trained a little

CHANNELS = 3
TYPES = {name: t for name, t in NORMS.items() if issubclass(t, BatchStatistics)} | {
    "mean only": MeanOnlyBatchNorm,
    "torch": nn.BatchNorm1d,
    "torch sync": nn.SyncBatchNorm,
}


def layer_of(name: str, **options: Any) -> Any:
    """A layer that has been trained a little."""
    layer = TYPES[name](CHANNELS, **options).double()
    if "torch" not in name:
        for x in batches([4, 5], seed=9):
            layer(x.movedim(1, -1) if options.get("channel_dim") == -1 else x)
    return layer


def batches(sizes: list[int], *, offset: float = 100.0, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randn(size, CHANNELS, 4, generator=generator, dtype=torch.float64) for size in sizes]
    return [x * 2 + offset + step for step, x in enumerate(draw)]


def population(values: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of the channels of the joined data set."""
    rows = torch.cat([x.movedim(1, -1).reshape(-1, x.size(1)) for x in values])
    return rows.mean(0), rows.var(0)


def assert_statistics(layer: Any, mean: Tensor, var: Tensor) -> None:
    torch.testing.assert_close(layer.running_mean, mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.running_var, var, rtol=1e-11, atol=1e-12)


def test_the_examples_in_the_docstrings_hold():
    for name in ("correct", "observe", "pool", "precise", "reduce"):
        module = importlib.import_module(f"bnlight.population.{name}")
        assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("name", TYPES)
def test_a_layers_statistics_are_those_of_the_joined_batches(name):
    data = batches([5, 3, 8, 2])
    layer = layer_of(name)
    assert precise_statistics(layer, data) is layer
    assert_statistics(layer, *population(data))


@settings(deadline=None, max_examples=30)
@given(
    sizes=st.lists(st.integers(2, 9), min_size=1, max_size=5),
    virtual=st.sampled_from([None, 2, 3]),
    offset=st.sampled_from([0.0, 1e4, -1e6]),
    last=st.booleans(),
)
def test_sizes_virtual_batches_and_offsets_make_no_difference(sizes, virtual, offset, last):
    data = batches(sizes, offset=offset)
    layer = BatchNorm(CHANNELS, virtual_batch_size=virtual, channel_dim=-1 if last else 1).double()
    precise_statistics(layer, [x.movedim(1, -1) if last else x for x in data])
    mean, var = population(data)
    torch.testing.assert_close(layer.running_mean, mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.running_var, var, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("virtual", [None, 2])
@pytest.mark.parametrize("name", ["batch", "renorm", "switchable", "batch_instance"])
def test_what_a_mask_hides_does_not_count(name, virtual):
    data = batches([5, 4, 3])
    masks = [torch.rand(len(x), 4, generator=torch.Generator().manual_seed(len(x))) < 0.7 for x in data]
    masks[1][0] = False
    layer = layer_of(name, virtual_batch_size=virtual)
    hidden = [torch.where(m[:, None], x, torch.nan) for x, m in zip(data, masks, strict=True)]
    precise_statistics(layer, zip(hidden, masks, strict=True), forward=lambda model, batch: model(*batch))
    rows = torch.cat([x.movedim(1, -1)[m] for x, m in zip(data, masks, strict=True)])
    assert_statistics(layer, rows.mean(0), rows.var(0))


def test_a_batch_that_small_batch_leaves_out_does_not_count():
    layer = BatchNorm(CHANNELS, small_batch="running").double()
    data = [x[:, :, 0] for x in batches([5, 1, 3])]
    precise_statistics(layer, data)
    assert_statistics(layer, *population([data[0], data[2]]))
    strict = BatchNorm(CHANNELS).double()
    with pytest.raises(ValueError, match="leaves one value per channel"):
        precise_statistics(strict, data)
    assert_statistics(strict, torch.zeros(CHANNELS).double(), torch.ones(CHANNELS).double())


def test_a_group_that_small_batch_leaves_out_does_not_count():
    layer = BatchNorm(CHANNELS, virtual_batch_size=2, small_batch="running").double()
    (x,) = batches([4])
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[0], mask[2, 1:] = False, False  # one value in the group of samples 0 and 2
    precise_statistics(layer, [(x, mask)], forward=lambda model, batch: model(*batch))
    assert_statistics(layer, *population([x[1::2]]))


def test_jitter_is_off():
    def model(jitter: tuple[float, float] | None) -> nn.Sequential:
        return nn.Sequential(BatchNorm(CHANNELS, jitter=jitter), BatchNorm(CHANNELS)).double()

    data = batches([5, 3])
    calm, jittered = (precise_statistics(model(jitter), data) for jitter in (None, (0.5, 0.5)))
    assert_statistics(jittered[1], calm[1].running_mean, calm[1].running_var)


@pytest.mark.parametrize("name", ["batch", "torch"])
def test_a_layer_that_is_called_twice_pools_both_calls(name):
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = layer_of(name)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x) + self.norm(x[:2] * 3).sum()

    model, data = Twins(), batches([4, 3])
    precise_statistics(model, data)
    assert_statistics(model.norm, *population([*data, *(x[:2] * 3 for x in data)]))


@pytest.mark.parametrize("kind", [BatchNorm, nn.BatchNorm1d])
def test_later_layers_see_what_the_batches_statistics_make(kind):
    model = nn.Sequential(kind(3), nn.Conv1d(3, 5, 2), nn.ReLU(), kind(5)).double()
    data = batches([5, 3, 8])
    seen = [nn.functional.batch_norm(x, None, None, training=True) for x in data]
    with torch.no_grad():
        seen = [model[2](model[1](x)) for x in seen]
    precise_statistics(model, data)
    assert_statistics(model[0], *population(data))
    assert_statistics(model[3], *population(seen))


def test_renorm_evaluates_by_the_populations_standard_deviation():
    layer, data = layer_of("renorm"), batches([4, 4, 4])
    precise_statistics(layer, data)
    mean, var = population(data)
    x = data[0]
    expected = (x - mean[:, None]) / (var[:, None] + layer.eps).sqrt()
    torch.testing.assert_close(layer.eval()(x), expected)


def test_float32_layers_pool_without_loss():
    layer = nn.Sequential(BatchNorm(CHANNELS), nn.BatchNorm1d(CHANNELS)).bfloat16()
    data = [x.bfloat16() for x in batches([64] * 40, offset=30.0)]
    precise_statistics(layer, data)
    assert layer[0].running_mean.dtype == torch.float32
    mean, var = population([x.double() for x in data])
    torch.testing.assert_close(layer[0].running_mean.double(), mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(layer[0].running_var.double(), var, rtol=1e-5, atol=0)


def test_statistics_per_position_find_their_positions():
    layer = BatchLayerNorm(CHANNELS, spatial=False).double()
    data = batches([5, 3])

    def lost(model: BatchLayerNorm, x: Tensor) -> None:
        model(x)
        assert model.running_mean.shape == (CHANNELS, 4)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        precise_statistics(layer, data, forward=lost)
    assert layer.running_mean.shape == (CHANNELS,)
    precise_statistics(layer, data)
    joined = torch.cat(data)
    assert_statistics(layer, joined.mean(0), joined.var(0))
    assert float(layer.batch_size) == 0


def test_the_steps_of_an_lstm_have_statistics_of_their_own():
    model = NormLSTM(CHANNELS, 2, norm="batch", max_length=4, noise=5.0).double()
    data = [x.movedim(2, 0) for x in batches([6, 4])]  # (T, N, C)
    precise_statistics(model, data)
    for step, layer in enumerate(model.norm_ih.steps):
        assert_statistics(layer, *population([x[step] @ model.weight_ih_l0.T.detach() for x in data]))
    # Without noise the first hidden state is zero, and so is what the norm of step 0 sees of it.
    assert_statistics(model.norm_hh.steps[0], torch.zeros(8).double(), torch.zeros(8).double())


def everything(model: nn.Module) -> dict[str, Any]:
    """All that a pass could move, apart from the statistics."""
    found: dict[str, Any] = {"rng": torch.get_rng_state()}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name in ("_buffers", "_parameters"):
                value = {key: (id(t), None if t is None else t.clone()) for key, t in value.items()}
            elif name.endswith("_hooks"):
                value = dict(value)
            elif name == "_calls":  # what a recomputation may ask for
                value = [id(call) for call in value._last]
            found[f"{path}.{name}"] = value
    return found


def assert_same(before: dict[str, Any], after: dict[str, Any], *, statistics: bool) -> None:
    assert before.keys() == after.keys()
    for key, value in before.items():
        if key.endswith("_buffers"):
            for name, (address, tensor) in value.items():
                assert after[key][name][0] == address, (key, name)
                if tensor is not None and (statistics or name not in ("running_mean", "running_var")):
                    assert torch.equal(after[key][name][1], tensor), (key, name)
        elif key.endswith("_parameters"):
            assert value.keys() == after[key].keys()
        elif isinstance(value, Tensor):
            assert torch.equal(value, after[key])
        else:
            assert value is after[key] or value == after[key], key


def model_of(name: str) -> nn.Sequential:
    options = (
        {} if "torch" in name or name in ("mean only", "full", "batch_layer") else {"jitter": (0.5, 0.5)}
    )
    model = nn.Sequential(
        nn.Dropout(0.5), layer_of(name, **options), nn.Conv1d(3, 3, 1).double(), layer_of(name)
    )
    for layer in (model[1], model[3]):
        if isinstance(layer, BatchStatistics):
            layer.process_group = "world"
    model[3].register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", TYPES)
def test_nothing_but_the_statistics_moves(name, training):
    model = model_of(name).train(training)
    model[0].train(not training)
    loader = DataLoader(TensorDataset(torch.cat(batches([16]))), batch_size=4, shuffle=True)
    before = everything(model)
    mean = model[3].running_mean.clone()
    precise_statistics(model, loader)
    assert_same(before, everything(model), statistics=False)
    assert not torch.equal(mean, model[3].running_mean)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", TYPES)
def test_an_interrupt_leaves_everything_as_it_was(name):
    model = model_of(name)
    before = everything(model)

    def stopped(model: nn.Module, x: Tensor) -> None:
        model(x)
        if len(x) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        precise_statistics(model, batches([4, 3, 4]), forward=stopped)
    assert_same(before, everything(model), statistics=True)


def test_pools_are_gone_after_the_pass():
    precise_statistics(model_of("batch"), batches([4, 3]))
    gc.collect()
    assert not [found for found in gc.get_objects() if type(found) is bnlight.population.observe.Pool]


def test_dropout_is_off():
    data = batches([5, 3])
    model = nn.Sequential(nn.Dropout(0.5), layer_of("batch")).train()
    precise_statistics(model, data)
    assert_statistics(model[1], *population(data))
    assert model[0].training


@pytest.mark.parametrize("name", ["batch", "renorm", "torch"])
def test_a_norm_in_evaluation_mode_is_frozen_in_a_model_in_training_mode_only(name):
    model = nn.Sequential(layer_of(name), layer_of("batch")).train()
    model[0].eval()
    before, data = copy.deepcopy(model[0]), batches([5, 3])
    precise_statistics(model, data)
    assert_statistics(model[0], before.running_mean, before.running_var)
    assert_statistics(model[1], *population([before(x).detach() for x in data]))
    precise_statistics(model.eval(), data)
    assert_statistics(model[0], *population(data))


def test_a_lazy_layer_that_has_seen_nothing_is_named():
    model = nn.Sequential(nn.LazyBatchNorm1d()).double()
    with pytest.raises(ValueError, match=r"'0' is a LazyBatchNorm1d .* call the model with a batch first"):
        precise_statistics(model, batches([4]))
    model(batches([4])[0])
    precise_statistics(model, batches([4]))
    assert_statistics(model[0], *population(batches([4])))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["batch", "torch"])
def test_what_freeze_norm_has_frozen_stays_in_any_mode(name, training):
    model = nn.Sequential(freeze_norm(layer_of(name)), layer_of("batch")).train(training)
    before = everything(model[0])
    precise_statistics(model, batches([5, 3]))
    assert_same(before, everything(model[0]), statistics=True)
    assert_statistics(model[1], *population([model[0](x).detach() for x in batches([5, 3])]))
    precise_statistics(unfreeze_norm(model), batches([5, 3]))
    assert_statistics(model[0], *population(batches([5, 3])))


def test_a_model_with_frozen_norms_only_says_that_nothing_was_estimated():
    model = nn.Sequential(layer_of("batch").eval())
    rest = iter(batches([4]))
    with pytest.warns(UserWarning, match="which counts as frozen.* model.eval") as caught:
        precise_statistics(model, rest)
    assert caught[0].filename == __file__
    assert len(list(rest)) == 1


def test_a_layer_that_no_batch_reaches_is_named_and_stays():
    model = nn.ModuleDict({"used": layer_of("batch"), "idle": layer_of("renorm"), "other": layer_of("torch")})
    before = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="reached 'idle', 'other', which stay as they were") as caught:
        precise_statistics(model, batches([4]), forward=lambda model, x: model["used"](x))
    assert caught[0].filename == __file__
    for name in ("idle", "other"):
        assert_statistics(model[name], before[name].running_mean, before[name].running_var)


def test_without_batches_there_is_nothing_to_estimate_from():
    model = layer_of("batch")
    used_up = iter(batches([4]))
    precise_statistics(model, used_up)
    before = everything(model)
    with pytest.raises(ValueError, match="no batches to estimate from; an iterator that was used up"):
        precise_statistics(model, used_up)
    assert_same(before, everything(model), statistics=True)


def test_a_model_without_running_averages_is_left_alone_and_reads_no_batch():
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), BatchNorm(3, track_running_stats=False))
    rest = iter([torch.randn(4, 3)])
    assert precise_statistics(model, rest) is model
    assert len(list(rest)) == 1


def test_a_batch_is_a_tensor_or_starts_with_one_or_needs_a_forward():
    data = batches([4, 3])
    for kind in (lambda x: x, lambda x: (x, "label"), lambda x: [x, 1]):
        layer = layer_of("batch")
        precise_statistics(layer, map(kind, data))
        assert_statistics(layer, *population(data))
    with pytest.raises(TypeError, match="starts with one, got dict; say what to do with it: forward="):
        precise_statistics(layer, [{"x": x} for x in data])
    layer = layer_of("batch")
    precise_statistics(layer, [{"x": x} for x in data], forward=lambda model, batch: model(**batch))
    assert_statistics(layer, *population(data))


@pytest.mark.parametrize("kind", [BatchNorm, nn.BatchNorm1d])
@pytest.mark.parametrize("in_place", [True, False])
def test_a_compiled_model_is_looked_at_too(kind, in_place):
    torch._dynamo.reset()
    model = nn.Sequential(nn.Conv1d(3, 3, 1), kind(3)).double()
    data = batches([5, 3])
    if in_place:
        model.compile(backend="eager")
    compiled = model if in_place else torch.compile(model, backend="eager")
    for training in (True, False):
        with torch.no_grad():
            compiled.train(training)(data[0])
    precise_statistics(compiled, data)
    assert_statistics(model[1], *population([model[0](x).detach() for x in data]))


def test_statistics_from_inference_mode_can_be_trained_with():
    layer, data = BatchLayerNorm(CHANNELS, spatial=False).double(), batches([5, 3])
    with torch.inference_mode():
        precise_statistics(layer, data)
    layer(data[0]).sum().backward()
    layer.eval()(data[0]).sum().backward()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    with start(2, tmp_path_factory.mktemp("ranks")) as ranks:
        yield ranks


RANKS_BATCHES = {"uneven": [[5, 3, 8], [4]], "one rank has none": [[], [4, 2]], "none": [[], []]}


def net(kind: str) -> nn.Sequential:
    torch.manual_seed(3)
    if kind == "torch dressed":
        return sync_norm(net("torch"))
    if "torch" in kind:
        last = {"torch": nn.BatchNorm1d, "torch sync": nn.SyncBatchNorm}[kind](4)
        return nn.Sequential(nn.BatchNorm1d(3), nn.Conv1d(3, 4, 2), last).double()
    model = nn.Sequential(BatchNorm(3), nn.Conv1d(3, 4, 2), BatchRenorm(4), FullNorm(4)).double()
    return sync_norm(model)


def pooled_over_ranks(kind: str, case: str, wrapped: bool) -> list[Tensor]:
    model = net(kind)
    rank = dist.get_rank()
    data = batches(RANKS_BATCHES[case][rank], seed=rank)
    precise_statistics(DistributedDataParallel(model) if wrapped else model, data)
    if kind in ("bnlight", "torch dressed"):
        assert all(layer.process_group == "world" for layer in model if hasattr(layer, "running_mean"))
    return [
        buffer for name, buffer in model.named_buffers() if name.endswith(("running_mean", "running_var"))
    ]


@pytest.mark.parametrize(
    ("kind", "wrapped"),
    [("bnlight", False), ("bnlight", True), ("torch", True), ("torch sync", False), ("torch dressed", False)],
)
@pytest.mark.parametrize("case", ["uneven", "one rank has none"])
def test_ranks_pool_whatever_batches_each_has(ranks: Ranks, kind, case, wrapped):
    first, second = ranks.run(pooled_over_ranks, kind, case, wrapped)
    alone = net(kind)
    precise_statistics(alone, [x for rank in range(2) for x in batches(RANKS_BATCHES[case][rank], seed=rank)])
    expected = [b for name, b in alone.named_buffers() if name.endswith(("running_mean", "running_var"))]
    for mine, other, together in zip(first, second, expected, strict=True):
        assert torch.equal(mine, other)
        torch.testing.assert_close(mine, together, rtol=1e-11, atol=1e-11)


def test_no_batch_on_any_rank_is_an_error_on_each(ranks: Ranks):
    for error in ranks.run(pooled_over_ranks, "bnlight", "none", False):
        assert isinstance(error, ValueError)
        assert "no batches to estimate from" in str(error)
