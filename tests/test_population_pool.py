"""Accumulated micro-batches move the running averages once, as one big batch would."""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks, start
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bnlight import pool_statistics, precise_statistics, sync_norm
from bnlight.norm import (
    NORMS,
    BatchLayerNorm,
    BatchNorm,
    BatchRenorm,
    FullNorm,
    MeanOnlyBatchNorm,
    SwitchableNorm,
)
from bnlight.norm.batch import BatchStatistics

TYPES: dict[str, Any] = {n: t for n, t in NORMS.items() if issubclass(t, BatchStatistics)} | {
    "mean only": MeanOnlyBatchNorm,
    "torch": nn.BatchNorm1d,
}
AVERAGES = ("running_mean", "running_var", "num_batches_tracked")


def batches(sizes: list[int], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randn(size, 3, 4, generator=generator, dtype=torch.float64) for size in sizes]
    return [x * 2 + 7 + step for step, x in enumerate(draw)]


def assert_same_averages(layer: Any, other: Any, tolerance: float = 1e-10) -> None:
    for name in AVERAGES:
        a, b = getattr(layer, name), getattr(other, name)
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, BatchNorm])
def test_stock_accumulation_counts_each_micro_batch(kind):
    layer, big = kind(3).double(), kind(3).double()
    for x in batches([4, 4, 4]):
        layer(x)
    big(torch.cat(batches([4, 4, 4])))
    assert (layer.num_batches_tracked, big.num_batches_tracked) == (3, 1)
    assert (layer.running_mean / big.running_mean).min() > 2


@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("sizes", [[4, 4, 4], [5, 3, 1, 8]], ids=str)
@pytest.mark.parametrize("name", TYPES)
def test_pooled_micro_batches_are_one_big_batch(name, sizes, momentum):
    layer = TYPES[name](3, momentum=momentum).double()
    big = copy.deepcopy(layer)
    for step in range(3):
        micro = batches(sizes, seed=step)
        with pool_statistics(layer):
            for x in micro:
                layer(x).sum().backward()
        big(torch.cat(micro))
        assert_same_averages(layer, big)


@pytest.mark.parametrize("name", TYPES)
def test_float32_pools_to_1e_6(name):
    layer = TYPES[name](3)
    big = copy.deepcopy(layer)
    micro = [x.float() for x in batches([16, 9, 30])]
    with pool_statistics(layer):
        for x in micro:
            layer(x)
    big(torch.cat(micro))
    assert_same_averages(layer, big, 1e-6)


@pytest.mark.parametrize("name", ["batch", "torch"])
def test_one_pool_around_the_training_steps_with_the_optimizer(name):
    layer = TYPES[name](3).double()
    big = copy.deepcopy(layer)
    with pool_statistics(layer) as pool:
        for step in range(3):
            for x in batches([4, 2], seed=step):
                layer(x)
            if step < 2:  # the last window ends with the block
                pool.step()
                pool.step()  # without values nothing moves
                assert layer.num_batches_tracked == step + 1
    for step in range(3):
        big(torch.cat(batches([4, 2], seed=step)))
    assert_same_averages(layer, big)
    layer(batches([4])[0])
    big(batches([4])[0])
    assert_same_averages(layer, big)


@pytest.mark.parametrize("name", TYPES)
def test_outputs_and_gradients_inside_are_those_of_each_micro_batch(name):
    layer = TYPES[name](3).double()
    plain = copy.deepcopy(layer)
    (x,) = batches([5])
    results = []
    for norm, context in ((plain, None), (layer, pool_statistics(layer))):
        mine = x.clone().requires_grad_()
        y = norm(mine)
        y.square().sum().backward()
        results.append((y.detach(), mine.grad))
        if context is not None:
            context.close()
    if name != "full":  # which would move its averages first, and then use them
        torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("name", TYPES)
def test_an_error_leaves_the_averages_and_the_layer_as_they_were(name):
    layer = TYPES[name](3).double()
    before = copy.deepcopy(layer)
    with pytest.raises((ValueError, RuntimeError), match=r"3 channels|contain 5"), pool_statistics(layer):
        layer(layer(batches([4])[0]).new_ones(4, 5, 4))
    for key in AVERAGES:
        assert torch.equal(getattr(layer, key), getattr(before, key))
    assert not layer._forward_hooks
    for key in ("observer", "track_running_stats"):
        assert getattr(layer, key, None) == getattr(before, key, None)


@pytest.mark.parametrize("name", ["batch", "renorm", "torch"])
def test_evaluation_in_between_uses_the_averages_and_is_not_pooled(name):
    layer = TYPES[name](3).double()
    big, start = copy.deepcopy(layer), copy.deepcopy(layer).eval()
    micro = batches([4, 6])
    with pool_statistics(layer):
        layer(micro[0])
        layer.eval()
        other = batches([9], seed=5)[0]
        torch.testing.assert_close(layer(other), start(other))
        layer.train()
        layer(micro[1])
    big(torch.cat(micro))
    assert_same_averages(layer, big)


def test_a_pass_of_estimation_in_between_is_not_pooled():
    model = nn.Sequential(nn.BatchNorm1d(3), BatchNorm(3)).double()
    other = copy.deepcopy(model)
    with pool_statistics(model):
        model(batches([4])[0])
        precise_statistics(model, batches([20], seed=3))
    precise_statistics(other, batches([20], seed=3))
    with pool_statistics(other):
        other(batches([4])[0])
    for layer, expected in zip(model, other, strict=True):
        assert_same_averages(layer, expected)


def test_frozen_layers_stay_and_work_as_before():
    model = nn.Sequential(nn.BatchNorm1d(3), BatchNorm(3)).double()
    model[0].eval()
    before = copy.deepcopy(model)
    with pool_statistics(model):
        model(batches([4])[0])
    assert torch.equal(model[0].running_mean, before[0].running_mean)
    assert model[0].num_batches_tracked == 0
    assert model[1].num_batches_tracked == 1


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["batch", "renorm", "torch"])
def test_what_checkpointing_computes_again_counts_once(name, reentrant):
    layer = TYPES[name](3).double()
    big = copy.deepcopy(layer)
    micro = [x.requires_grad_() for x in batches([4, 6])]
    with pool_statistics(layer):
        for x in micro:
            checkpoint(layer, x, use_reentrant=reentrant).sum().backward()
    big(torch.cat(micro))
    assert_same_averages(layer, big)


@pytest.mark.parametrize("kind", [BatchNorm, BatchRenorm, BatchLayerNorm, SwitchableNorm])
def test_virtual_batches_stay_groups_of_their_own(kind):
    """Micro-batches of one group each are the groups of one big batch."""
    layer, big = kind(3).double(), kind(3, virtual_batch_size=4).double()
    (x,) = batches([12])
    big(x)
    virtual = kind(3, virtual_batch_size=4).double()
    with pool_statistics(virtual):
        for group in range(3):
            virtual(x[group::3])
    assert_same_averages(virtual, big)
    halves = kind(3, virtual_batch_size=2).double()
    quarters = kind(3, virtual_batch_size=2).double()
    with pool_statistics(halves):
        for group in range(3):
            halves(x[group::3])  # two groups each
    quarters(
        torch.cat([x[group::3] for group in range(3)])[torch.tensor([0, 1, 4, 5, 8, 9, 2, 3, 6, 7, 10, 11])]
    )
    assert halves.num_batches_tracked == 1
    torch.testing.assert_close(halves.running_mean, quarters.running_mean)
    assert layer.num_batches_tracked == 0


@pytest.mark.parametrize("kind", [BatchNorm, BatchRenorm])
def test_what_a_mask_hides_does_not_count_and_a_channel_without_values_stays(kind):
    layer, big = kind(3, small_batch="running").double(), kind(3, small_batch="running").double()
    micro = batches([4, 3, 2])
    masks = [torch.rand(len(x), 4, generator=torch.Generator().manual_seed(len(x))) < 0.6 for x in micro]
    masks[2][:] = False
    with pool_statistics(layer):
        for x, mask in zip(micro, masks, strict=True):
            layer(x, mask=mask)
    big(torch.cat(micro), mask=torch.cat(masks))
    assert_same_averages(layer, big)
    before = copy.deepcopy(layer)
    with pool_statistics(layer):
        layer(micro[2], mask=masks[2])
    assert torch.equal(layer.running_mean, before.running_mean)


def test_full_norms_averages_of_gradients_move_in_each_backward():
    layer = FullNorm(3).double()
    with pool_statistics(layer):
        seen = []
        for x in batches([4, 4]):
            layer(x).square().sum().backward()
            seen.append(layer.mean_grad.clone())
    assert not torch.equal(seen[0], seen[1])
    assert layer.num_batches_tracked == 1


@pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("name", ["batch", "torch", "renorm"])
def test_compiled_layers_pool(name, before):
    layer = TYPES[name](3).double()
    big, model = copy.deepcopy(layer), torch.compile(nn.Sequential(layer), backend="aot_eager")
    if before:
        model(batches([4])[0])
        big(batches([4])[0])
    with pool_statistics(model):
        for x in batches([4, 6]):
            model(x).sum().backward()
    big(torch.cat(batches([4, 6])))
    assert_same_averages(layer, big)
    torch._dynamo.reset()


def test_state_dict_inside_is_complete():
    model = nn.Sequential(nn.BatchNorm1d(3), BatchNorm(3)).double()
    keys = model.state_dict().keys()
    with pool_statistics(model):
        model(batches([4])[0])
        assert model.state_dict().keys() == keys
        assert copy.deepcopy(model).eval()(batches([4])[0]).isfinite().all()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    with start(2, tmp_path_factory.mktemp("ranks")) as ranks:
        yield ranks


SIZES = [[5, 3, 4], [2, 6, 1]]


def synchronized(kind: str) -> list[Tensor]:
    layer = sync_norm(nn.Sequential(TYPES[kind](3).double()))
    rank = dist.get_rank()
    for step in range(2):
        with pool_statistics(layer):
            for x in batches(SIZES[rank], seed=10 * rank + step):
                layer(x).sum().backward()
    return [getattr(layer[0], name) for name in AVERAGES]


@pytest.mark.parametrize("kind", TYPES)
def test_synchronized_layers_pool_every_ranks_micro_batches(ranks: Ranks, kind):
    first, second = ranks.run(synchronized, kind)
    big = TYPES[kind](3).double()
    for step in range(2):
        big(torch.cat([x for rank in (0, 1) for x in batches(SIZES[rank], seed=10 * rank + step)]))
    for name, mine, other in zip(AVERAGES, first, second, strict=True):
        assert torch.equal(mine, other)
        torch.testing.assert_close(mine, getattr(big, name), rtol=1e-10, atol=1e-10)
