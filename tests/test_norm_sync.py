"""Synchronized statistics on real gloo ranks equal one process that has the joined batch."""

import copy
import pickle
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from norm_table import CHANNELS, ROWS
from ranks import Ranks, start
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bnlight.norm.sync
from bnlight import sync_norm, unsync_norm
from bnlight.norm import BatchNorm, BatchRenorm, LayerNorm
from bnlight.norm.batch import BatchStatistics

LAST_AXIS = "batch, last axis"
# Virtual batches stay on a rank, and each rank draws its own jitter.
LAYERS = [
    name
    for name, row in ROWS.items()
    if row.by_batch and not {"virtual_batch_size", "jitter"} & {*row.options}
] + [LAST_AXIS]
SPLITS = [(5, 3), (4, 4), (6, 0), (1, 1), (5, 0, 2)]
GATHERS = [0]


def layer_of(case: str) -> BatchStatistics:
    layer = ROWS["batch"].make(channel_dim=-1) if case == LAST_AXIS else ROWS[case].make()
    if layer.track_running_stats:
        layer.small_batch = "running"
    return layer


def batch(step: int, shape: tuple[int, ...], last: bool) -> tuple[Tensor, Tensor]:
    """A batch, far from zero, and what its outputs are weighted by in the loss."""
    generator = torch.Generator().manual_seed(step)
    x, w = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    x = x * 2 + 100
    return (x.movedim(1, -1), w.movedim(1, -1)) if last else (x, w)


def count_gathers() -> None:
    GATHERS[0] = 0
    if not hasattr(bnlight.norm.sync, "_counted"):
        gather = bnlight.norm.sync._counted = bnlight.norm.sync._all_gather

        def counted(*arguments: Any, **options: Any) -> Any:
            GATHERS[0] += 1
            return gather(*arguments, **options)

        bnlight.norm.sync._all_gather = counted


def train(layer: nn.Module, batches: list[tuple[Tensor, Tensor, Tensor | None]]) -> dict[str, Any]:
    """Forward and backward of each batch, then an evaluation; everything that comes out."""
    out: dict[str, Any] = {"y": [], "dx": []}
    for x, w, mask in batches:
        x = x.clone().requires_grad_()
        y = layer(x, mask)
        (y * w).sum().backward()
        out["y"].append(y.detach())
        out["dx"].append(x.grad)
    out["gradients"] = {name: parameter.grad for name, parameter in layer.named_parameters()}
    out["buffers"] = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    out["evaluated"] = layer.eval()(batches[0][0], batches[0][2]).detach()
    return out


def part(tensor: Tensor, sizes: tuple[int, ...]) -> Tensor:
    return tensor.split(sizes)[dist.get_rank()]


def on_a_rank(case: str, sizes: tuple[int, ...], spatial: tuple[int, ...], masked: bool) -> dict[str, Any]:
    layer = layer_of(case)
    layer.process_group = "world"
    count_gathers()
    joined = batches_of(case, sum(sizes), spatial, masked)
    parts = [tuple(None if t is None else part(t, sizes) for t in whole) for whole in joined]
    return train(layer, parts) | {"gathers": GATHERS[0]}


def batches_of(
    case: str, samples: int, spatial: tuple[int, ...], masked: bool
) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    last = case == LAST_AXIS
    batches = []
    for step in range(3):
        x, w = batch(step, (samples, CHANNELS, *spatial), last)
        mask = None
        if masked:
            mask = torch.rand(samples, *spatial, generator=torch.Generator().manual_seed(step)) < 0.7
            mask[: samples // 2] &= step != 1  # at one step rank 0 has no valid value at all
            mask[-2:] |= samples > 2
        batches.append((x, w, mask))
    return batches


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, Ranks]]:
    with (
        start(2, tmp_path_factory.mktemp("two")) as two,
        start(3, tmp_path_factory.mktemp("three")) as three,
    ):
        yield {2: two, 3: three}


def compare(results: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    def close(mine: Tensor, theirs: Tensor) -> None:
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)

    for key in ("y", "dx"):
        for step, whole in enumerate(expected[key]):
            close(torch.cat([result[key][step] for result in results]), whole)
    for name, gradient in expected["gradients"].items():
        close(sum(result["gradients"][name] for result in results), gradient)
    for name, buffer in expected["buffers"].items():
        close(results[0]["buffers"][name], buffer)
        assert all(torch.equal(result["buffers"][name], results[0]["buffers"][name]) for result in results)
    if expected["buffers"]:  # otherwise each rank evaluates by its own batch
        close(torch.cat([result["evaluated"] for result in results]), expected["evaluated"])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("spatial", [(), (2, 3)], ids=str)
@pytest.mark.parametrize("sizes", SPLITS, ids=str)
@pytest.mark.parametrize("case", LAYERS)
def test_ranks_compute_what_one_process_does_with_the_joined_batch(ranks, case, sizes, spatial, masked):
    if case.startswith("batch_instance") and not spatial:
        pytest.skip("needs positions")
    if sizes == (1, 1) and case == "batch, no averages" and (masked or not spatial):
        pytest.skip("one value per channel, which this layer refuses")
    results = ranks[len(sizes)].run(on_a_rank, case, sizes, spatial, masked)
    for result in results:
        assert isinstance(result, dict), str(result) + str(result.__notes__)
        assert result["gathers"] == 3 * 2  # one forward and one backward at each of three steps
    compare(results, train(layer_of(case), batches_of(case, sum(sizes), spatial, masked)))


def uneven_shapes(case: str) -> list[dict[str, Any]]:
    """Ranks whose samples have other spatial sizes, and the joined batch that holds the same values."""
    shapes = [(2, CHANNELS, 3, 4), (3, CHANNELS, 2, 2)]
    batches = [batch(step, shape, False) for step, shape in enumerate(shapes)]
    layer = layer_of(case)
    layer.process_group = "world"
    mine = train(layer, [(*batches[dist.get_rank()], None)])
    joined = layer_of(case)
    rows = [torch.cat([t.movedim(1, -1).flatten(0, -2) for t in pair]) for pair in zip(*batches, strict=True)]
    return [mine, train(joined, [(*rows, None)])]


@pytest.mark.parametrize("case", ["batch", "renorm", "full", "mean only"])
def test_ranks_may_have_other_spatial_sizes(ranks, case):
    (first, joined), (second, _) = ranks[2].run(uneven_shapes, case)
    for key in ("y", "dx"):
        mine = [result[key][0].movedim(1, -1).flatten(0, -2) for result in (first, second)]
        torch.testing.assert_close(torch.cat(mine), joined[key][0], rtol=1e-10, atol=1e-10)
    for name, buffer in joined["buffers"].items():
        torch.testing.assert_close(first["buffers"][name], buffer, rtol=1e-10, atol=1e-10)


def virtual(case: str) -> list[dict[str, Any]]:
    rank, sizes = dist.get_rank(), [6, 2]
    results = []
    for synchronized in (True, False):
        layer = layer_of(case)
        layer.virtual_batch_size = 2
        layer.process_group = "world" if synchronized else None
        count_gathers()
        results.append(train(layer, [(*batch(rank, (sizes[rank], CHANNELS, 2), False), None)]))
        results[-1]["gathers"] = GATHERS[0]
    return results


@pytest.mark.parametrize("case", ["batch", "renorm", "mean only"])
def test_virtual_batches_stay_inside_a_rank_and_only_the_running_averages_merge(ranks, case):
    (first, alone), (second, other) = ranks[2].run(virtual, case)
    assert first["gathers"] == second["gathers"] == 1
    assert alone["gathers"] == 0
    for mine, local in ((first, alone), (second, other)):
        assert torch.equal(mine["y"][0], local["y"][0])
        assert torch.equal(mine["dx"][0], local["dx"][0])
    # Three groups on rank 0 and one on rank 1 count equally.
    merged = (3 * alone["buffers"]["running_mean"] + other["buffers"]["running_mean"]) / 4
    for result in (first, second):
        torch.testing.assert_close(result["buffers"]["running_mean"], merged, rtol=1e-10, atol=1e-10)


def one_value_in_all() -> None:
    layer = BatchNorm(CHANNELS)
    layer.process_group = "world"
    layer(torch.randn(dist.get_rank(), CHANNELS))


def test_one_value_on_all_ranks_together_is_an_error_on_each_rank(ranks):
    for error in ranks[2].run(one_value_in_all):
        assert isinstance(error, ValueError)
        assert "one value per channel" in str(error)


def net() -> nn.Sequential:
    return sync_norm(nn.Sequential(nn.Linear(4, 6), BatchNorm(6), nn.Linear(6, 2), BatchRenorm(2)), timeout=3)


def in_other_layers() -> float:
    model = net()
    x = torch.randn(5, 6 if dist.get_rank() == 0 else 2)
    begin = time.monotonic()
    try:
        model[1 if dist.get_rank() == 0 else 3](x)
    except RuntimeError as error:
        error.args = (f"{error} after {time.monotonic() - begin:.1f} s", time.monotonic() - begin)
        raise


def test_ranks_in_different_layers_fail_at_once_and_name_layer_rank_and_call(tmp_path):
    with start(2, tmp_path) as ranks:
        errors = ranks.run(in_other_layers)
    for rank, (error, path) in enumerate(zip(errors, ("1", "3"), strict=True)):
        assert isinstance(error, RuntimeError)
        message, seconds = error.args
        assert seconds < 2
        assert f"synchronized layer {rank} '{path}', forward call 1 on rank {rank}" in message
        assert "rank 0 is in forward call 1 of layer 0; rank 1 is in forward call 1 of layer 1" in message


def in_other_passes() -> None:
    layer = layer_of("batch")
    layer.process_group = "world"
    x = torch.randn(4, CHANNELS, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    if dist.get_rank() == 0:
        y.sum().backward()
    else:
        layer(x)


def test_ranks_in_other_passes_fail_at_once_too(tmp_path):
    with start(2, tmp_path) as ranks:
        for error in ranks.run(in_other_passes):
            assert isinstance(error, RuntimeError)
            assert "rank 0 is in backward call 1 of layer 0; rank 1 is in forward call 2 of layer 0" in str(
                error
            )


def without_the_last_rank() -> float | None:
    model = net()
    if dist.get_rank() == 1:
        return None
    begin = time.monotonic()
    with pytest.raises(
        RuntimeError, match="layer 0 '1', forward call 1 on rank 0, did not meet the other ranks"
    ):
        model(torch.randn(5, 4))
    return time.monotonic() - begin


def test_a_rank_that_never_comes_is_an_error_after_the_timeout(tmp_path):
    with start(2, tmp_path) as ranks:
        seconds, other = ranks.run(without_the_last_rank)
    assert other is None
    assert isinstance(seconds, float), seconds
    assert 2 < seconds < 10


def test_sync_norm_changes_nothing_but_the_group_and_can_be_undone():
    model = nn.Sequential(nn.Linear(4, 6), BatchNorm(6), LayerNorm(6), BatchRenorm(6))
    before = copy.deepcopy(model.state_dict())
    assert sync_norm(model) is model
    assert [layer.process_group for layer in (model[1], model[3])] == ["world", "world"]
    assert [layer.meeting.path for layer in (model[1], model[3])] == ["1", "3"]
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert twin[1].process_group == "world"
    x = torch.randn(5, 4)
    assert torch.equal(model(x), unsync_norm(twin)(x))  # no process group: local
    assert twin[1].process_group is None
    assert {*before} == {*model.state_dict()}
    with pytest.raises(TypeError, match="process_group must be None, 'world' or a ProcessGroup, got 3"):
        model[1].process_group = 3


def with_a_process_group() -> list[Any]:
    layer = BatchNorm(CHANNELS)
    layer.process_group = dist.new_group([0, 1])
    copied = copy.deepcopy(layer)
    with pytest.warns(UserWarning, match="cannot be pickled"):
        pickled = pickle.loads(pickle.dumps(layer))
    alone = BatchNorm(CHANNELS)
    groups = [dist.new_group([rank]) for rank in range(2)]
    alone.process_group = groups[dist.get_rank()]
    x = torch.randn(4, CHANNELS)
    local = BatchNorm(CHANNELS)
    same = torch.equal(alone(x), local(x))
    return [copied.process_group is layer.process_group, pickled.process_group, same]


def test_a_process_group_is_shared_by_copies_and_world_when_pickled(ranks):
    assert ranks[2].run(with_a_process_group) == [[True, "world", True]] * 2


def checkpointed(case: str, reentrant: bool) -> dict[str, Any]:
    layer = layer_of(case)
    layer.process_group = "world"
    x, w = batch(dist.get_rank(), (5, CHANNELS, 2), False)
    count_gathers()
    x.requires_grad_()
    for _ in range(2):
        (checkpoint(layer, x, use_reentrant=reentrant) * w).sum().backward()
    plain = layer_of(case)
    plain.process_group = "world"
    gathers, z = GATHERS[0], x.detach().clone().requires_grad_()
    for _ in range(2):
        (plain(z) * w).sum().backward()
    torch.testing.assert_close(x.grad, z.grad, rtol=1e-10, atol=1e-10)
    for mine, theirs in zip(layer.buffers(), plain.buffers(), strict=True):
        assert torch.equal(mine, theirs)
    return gathers


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("case", ["batch", "renorm, clipped", "full"])
def test_recomputed_activations_neither_update_nor_meet_twice(ranks, case, reentrant):
    assert ranks[2].run(checkpointed, case, reentrant) == [4, 4]


def compiled(case: str) -> float:
    layer, eager = layer_of(case), layer_of(case)
    layer.process_group = eager.process_group = "world"
    fast = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for step in range(2):
        x, w = batch(2 * step + dist.get_rank(), (5, CHANNELS, 2), False)
        results = []
        for run in (fast, eager):
            z = x.clone().requires_grad_()
            (run(z) * w).sum().backward()
            results.append(z.grad)
        torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)
    for mine, theirs in zip(layer.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs)
    return float(layer.running_mean.sum())


@pytest.mark.parametrize("case", ["batch", "renorm", "full"])
def test_synchronized_layers_compile_to_one_graph(ranks, case):
    first, second = ranks[2].run(compiled, case)
    assert first == second


def virtual_on_an_empty_rank() -> dict[str, Any]:
    layer = layer_of("batch")
    layer.virtual_batch_size, layer.process_group = 2, "world"
    return train(layer, [(*batch(0, (6 * (1 - dist.get_rank()), CHANNELS, 2), False), None)])


def test_a_rank_without_samples_takes_the_running_averages_of_the_others_virtual_batches(ranks):
    first, second = ranks[2].run(virtual_on_an_empty_rank)
    layer = layer_of("batch")
    layer.virtual_batch_size = 2
    alone = train(layer, [(*batch(0, (6, CHANNELS, 2), False), None)])
    for result in (first, second):
        torch.testing.assert_close(result["buffers"]["running_var"], alone["buffers"]["running_var"])
    assert torch.equal(first["y"][0], alone["y"][0])
