"""Statistics that ranks have gathered apart are merged exactly, and everybody has the same bits."""

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks, start
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import bnlight.population.ranks
from bnlight import freeze_norm, reduce_statistics, sync_norm
from bnlight.norm import NORMS, BatchLayerNorm, BatchNorm, BatchRenorm, FullNorm, MeanOnlyBatchNorm
from bnlight.norm.batch import BatchStatistics

TYPES: dict[str, Any] = {n: t for n, t in NORMS.items() if issubclass(t, BatchStatistics)} | {
    "mean only": MeanOnlyBatchNorm,
    "torch": nn.BatchNorm1d,
    "torch sync": nn.SyncBatchNorm,
    "torch instance": lambda c: nn.InstanceNorm1d(c, affine=True, track_running_stats=True),
}
CUMULATIVE = {"batch": BatchNorm, "full": FullNorm, "renorm": BatchRenorm, "torch": nn.BatchNorm1d}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    with start(2, tmp_path_factory.mktemp("ranks")) as ranks:
        yield ranks


def data(rank: int, batches: int, size: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rank)
    draw = [torch.randn(size, 3, 4, generator=generator, dtype=torch.float64) for _ in range(batches)]
    return [x * (rank + 1) + 5 * rank for x in draw]


def trained(layer: nn.Module, batches: list[Tensor]) -> Any:
    layer = layer.double()
    for x in batches:
        layer(x).square().mean().backward()
    return layer


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def reduced(name: str, counts: list[int]) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    rank = dist.get_rank()
    layer = trained(TYPES[name](3), data(rank, counts[rank]))
    before = state(layer)
    assert reduce_statistics(layer) is layer
    after = state(layer)
    reduce_statistics(layer)
    return before, after, state(layer)


@pytest.mark.parametrize("counts", [[3, 3], [4, 1], [3, 0]], ids=str)
@pytest.mark.parametrize("name", [name for name in TYPES if name != "torch sync"])
def test_means_variances_and_counts_are_those_of_the_joined_data(ranks: Ranks, name, counts):
    results = ranks.run(reduced, name, counts)
    (one, after, again), (two, other, _) = results
    if name == "torch instance":  # which counts no batches
        counts = [1, 1]
    first, second = (count / sum(counts) for count in counts)
    assert all(torch.equal(after[key], other[key]) for key in after)
    assert all(torch.equal(after[key], again[key]) for key in after), "merged twice is merged once"
    mean = first * one["running_mean"] + second * two["running_mean"]
    var = first * (one["running_var"] + (one["running_mean"] - mean).square())
    var += second * (two["running_var"] + (two["running_mean"] - mean).square())
    torch.testing.assert_close(after["running_mean"], mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(after["running_var"], var, rtol=1e-12, atol=1e-12)
    assert after["num_batches_tracked"] == (0 if name == "torch instance" else max(counts))
    for key in ("mean_grad", "var_grad"):
        if key in one:
            torch.testing.assert_close(after[key], first * one[key] + second * two[key])
    for key in ("r_max", "d_max", "weight", "bias", "rho", "mean_weight"):
        if key in one:
            assert torch.equal(after[key], one[key])


def cumulative(name: str, counts: list[int], rounds: int) -> dict[str, Tensor]:
    rank = dist.get_rank()
    layer = CUMULATIVE[name](3, momentum=None).double()
    batches = iter(data(rank, counts[rank] * rounds))
    for _ in range(rounds):
        for _ in range(counts[rank]):
            layer(next(batches)).sum().backward()
        reduce_statistics(layer)
    return state(layer)


@pytest.mark.parametrize(("counts", "rounds"), [([3, 3], 1), ([4, 1], 1), ([2, 2], 3)])
@pytest.mark.parametrize("name", ["batch", "torch", "full"])
def test_plain_averages_of_all_batches_merge_exactly(ranks: Ranks, name, counts, rounds):
    """However often they are merged: the mean over every batch of every rank, and the E[x**2] it implies."""
    after, _ = ranks.run(cumulative, name, counts, rounds)
    every = [x.movedim(1, -1).flatten(0, 1) for rank in (0, 1) for x in data(rank, counts[rank] * rounds)]
    mean = torch.stack([x.mean(0) for x in every]).mean(0)
    torch.testing.assert_close(after["running_mean"], mean, rtol=1e-12, atol=1e-12)
    if name == "full":  # its variance is about the running mean, so that nothing at all is lost
        second = torch.stack([x.square().mean(0) for x in every]).mean(0)
        torch.testing.assert_close(after["running_var"], second - mean.square(), rtol=1e-10, atol=0)


def large() -> list[Tensor]:
    rank = dist.get_rank()
    layer = with_statistics_of(BatchRenorm(3).double(), data(rank, 4, 500))
    reduce_statistics(layer)
    return [layer.running_mean, layer.running_var]


def with_statistics_of(layer: Any, batches: list[Tensor]) -> Any:
    rows = torch.cat(batches).movedim(1, -1).flatten(0, 1)
    layer.running_mean.copy_(rows.mean(0))
    layer.running_var.copy_(rows.var(0))
    return layer


def test_a_renorm_that_is_merged_has_the_standard_deviation_of_the_joined_data(ranks: Ranks):
    (mean, var), _ = ranks.run(large)
    rows = torch.cat([x for rank in (0, 1) for x in data(rank, 4, 500)]).movedim(1, -1).flatten(0, 1)
    torch.testing.assert_close(mean, rows.mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(var, rows.var(0), rtol=2e-4, atol=0)  # but for n / (n - 1)
    averaged = torch.stack([torch.cat(data(r, 4, 500)).movedim(1, -1).flatten(0, 1).std(0) for r in (0, 1)])
    assert (averaged.mean(0).square() / var).max() < 0.5, "the mean of the ranks' deviations is far from it"


def weighed(weights: list[float]) -> Tensor:
    rank = dist.get_rank()
    layer = trained(nn.BatchNorm1d(3), data(rank, 2))
    before = layer.running_mean.clone()
    reduce_statistics(layer, weight=weights[rank])
    return torch.stack([before, layer.running_mean])


def test_a_given_weight_counts_instead(ranks: Ranks):
    (one, after), (two, other) = ranks.run(weighed, [30.0, 10.0])
    torch.testing.assert_close(after, 0.75 * one + 0.25 * two)
    assert torch.equal(after, other)
    with pytest.raises(TypeError, match="process_group must be None, 'world' or a ProcessGroup, got 'word'"):
        reduce_statistics(BatchNorm(3), "word")  # also in a process that is alone
    with pytest.raises(ValueError, match="weight must be a number of at least 0, got -1"):
        reduce_statistics(nn.BatchNorm1d(3), weight=-1)


def left_alone() -> dict[str, list[Tensor]]:
    rank = dist.get_rank()
    model = nn.ModuleDict({"free": BatchNorm(3), "frozen": nn.BatchNorm1d(3), "kept": BatchNorm(3)}).double()
    for layer in model.values():
        trained(layer, data(rank, 2))
    freeze_norm(model["frozen"])
    model["kept"].eval()
    before = state(model)
    reduce_statistics(model)
    after = state(model)
    return {name: [before[f"{name}.running_mean"], after[f"{name}.running_mean"]] for name in model}


def test_frozen_layers_stay_and_others_do_not(ranks: Ranks):
    for result in ranks.run(left_alone):
        for name, (before, after) in result.items():
            assert torch.equal(before, after) == (name != "free"), name


def synchronized() -> list[bool]:
    rank = dist.get_rank()
    kinds = [
        nn.BatchNorm1d(3),
        BatchNorm(3),
        BatchRenorm(3),
        FullNorm(3),
        BatchLayerNorm(3),
        BatchNorm(3, virtual_batch_size=2),
    ]
    model = sync_norm(nn.ModuleList(kinds).double())
    for layer in model:
        trained(layer, data(rank, 3))
    before = state(model)
    reduce_statistics(model)
    return [torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()]


def test_synchronized_layers_stay_to_the_bit(ranks: Ranks):
    for result in ranks.run(synchronized):
        assert all(result)


def different(case: str) -> None:
    rank = dist.get_rank()
    models = {
        "sizes": nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3 + rank)),
        "numbers": nn.Sequential(*[nn.BatchNorm1d(3) for _ in range(2 + rank)]),
        "same total": nn.ModuleDict({"ab"[rank]: nn.BatchNorm1d(3)}),
    }
    before = state(models[case])
    try:
        reduce_statistics(models[case])
    finally:
        assert all(torch.equal(t, before[name]) for name, t in models[case].state_dict().items())
        dist.barrier()


@pytest.mark.parametrize(
    ("case", "seen"),
    [
        ("sizes", r"rank 0 has '1' .* rank 1 has '1' \[1, 4, 4, 1\]"),
        ("numbers", "rank 0 has 2 layers; rank 1 has 3 layers"),
        ("same total", "rank 0 has 'a' .* rank 1 has 'b'"),
    ],
)
def test_different_models_are_an_error_on_every_rank(ranks: Ranks, case, seen):
    for error in ranks.run(different, case, patience=20):
        with pytest.raises(RuntimeError, match="reduce_statistics: the ranks have different models: " + seen):
            raise error


def collectives() -> int:
    model = trained(nn.Sequential(*[nn.BatchNorm1d(3) for _ in range(20)]), data(0, 1))
    calls = []
    real = bnlight.population.ranks._all_gather
    bnlight.population.ranks._all_gather = lambda *args, **kwargs: (calls.append(1), real(*args, **kwargs))[1]
    try:
        reduce_statistics(model)
    finally:
        bnlight.population.ranks._all_gather = real
    return len(calls)


def test_twenty_layers_take_two_collectives(ranks: Ranks):
    assert ranks.run(collectives) == [2, 2]


def test_alone_nothing_happens():
    model = trained(nn.BatchNorm1d(3), data(0, 2))
    before = copy.deepcopy(model.state_dict())
    assert reduce_statistics(model) is model
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def stock(broadcast: bool, merge: bool) -> list[Tensor]:
    rank = dist.get_rank()
    torch.manual_seed(0)
    net = nn.Sequential(nn.BatchNorm1d(3, momentum=None), nn.Conv1d(3, 2, 1)).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 has another name for it
        model = DistributedDataParallel(net, broadcast_buffers=broadcast)
    for x in data(rank, 5):
        model(x).sum().backward()
    if merge:
        reduce_statistics(model)
    model.eval()
    model(data(rank, 1)[0])
    return [net[0].running_mean.clone(), net[0].running_var.clone()]


def test_stock_ddp_evaluates_by_rank_0s_data_and_the_merge_by_everyones(ranks: Ranks):
    means = [torch.cat(data(rank, 5)).mean((0, 2)) for rank in (0, 1)]
    (mean, _), (other, _) = ranks.run(stock, False, False)
    torch.testing.assert_close(mean, means[0])
    torch.testing.assert_close(other, means[1])  # ranks differ
    (mean, _), (other, _) = ranks.run(stock, True, False)
    torch.testing.assert_close(mean, means[0])
    torch.testing.assert_close(other, means[0])  # rank 1's batches never count
    (mean, var), (other, _) = ranks.run(stock, False, True)
    torch.testing.assert_close(mean, (means[0] + means[1]) / 2)
    assert torch.equal(mean, other)
    torch.testing.assert_close(var, torch.full_like(var, (1 + 4) / 2 + 2.5**2), rtol=0.2, atol=0)
