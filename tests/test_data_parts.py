"""How samples are shared out: over steps and ranks, over splits, over epochs."""

from itertools import chain

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from bnlight.data import ShuffledBatches, TensorBatches, eval_parts, split, stratified_order, train_parts

sizes = st.integers(1, 300)
worlds = st.integers(1, 9)
batch_sizes = st.integers(1, 70)


def rows(parts: list[slice]) -> list[list[int]]:
    return [list(range(part.start, part.stop)) for part in parts]


@given(sizes, worlds, batch_sizes, st.booleans())
def test_training_gives_all_ranks_equal_batches_of_different_samples(
    n: int, world: int, batch_size: int, drop_last: bool
) -> None:
    assume(n >= world * batch_size)
    ranks = [
        rows(train_parts(n, batch_size, rank=rank, world_size=world, drop_last=drop_last))
        for rank in range(world)
    ]
    lengths = [[len(batch) for batch in batches] for batches in ranks]
    assert all(each == lengths[0] for each in lengths)
    assert all(length == batch_size for length in lengths[0][: n // (world * batch_size)])
    used = [row for batches in ranks for batch in batches for row in batch]
    assert len(used) == len(set(used))
    assert set(used) <= set(range(n))
    rest = n % (world * batch_size)
    left_out = n - len(used)
    if drop_last or rest < 2 * world:
        assert left_out == rest
    else:
        assert left_out == rest % world
    if batch_size > 1:
        assert min(lengths[0]) > 1


@given(sizes, worlds, batch_sizes)
def test_a_step_takes_the_next_samples_of_the_order_over_all_ranks(
    n: int, world: int, batch_size: int
) -> None:
    assume(n >= world * batch_size)
    ranks = [rows(train_parts(n, batch_size, rank=rank, world_size=world)) for rank in range(world)]
    taken = [row for step in zip(*ranks, strict=True) for batch in step for row in batch]
    assert taken == list(range(len(taken)))


@given(sizes, worlds, batch_sizes)
def test_evaluation_sees_each_sample_once_in_equally_many_batches(
    n: int, world: int, batch_size: int
) -> None:
    assume(n >= world)
    ranks = [rows(eval_parts(n, batch_size, rank=rank, world_size=world)) for rank in range(world)]
    assert sorted(row for batches in ranks for batch in batches for row in batch) == list(range(n))
    assert len({len(batches) for batches in ranks}) == 1
    lengths = [len(batch) for batches in ranks for batch in batches]
    assert min(lengths) >= 1
    assert max(lengths) <= max(batch_size, 2 if world > 1 else 1)
    assert len(ranks[0]) <= -(-n // (world * batch_size))


def test_a_batch_larger_than_the_training_split_is_an_error_with_a_way_out() -> None:
    with pytest.raises(
        ValueError, match=r"2 process\(es\) takes 128 samples per step, of 100.*batch_size=50"
    ):
        train_parts(100, 64, world_size=2)


def test_fewer_samples_than_processes_is_an_error() -> None:
    with pytest.raises(ValueError, match="3 samples are too few for 4 processes"):
        eval_parts(3, 64, world_size=4)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=120), st.integers(0, 5))
def test_any_beginning_of_a_stratified_order_holds_the_classes_in_proportion_up_to_rounding(
    labels: list[int], seed: int
) -> None:
    y = torch.tensor(labels)
    order = stratified_order(y, torch.Generator().manual_seed(seed))
    assert sorted(order.tolist()) == list(range(len(y)))
    shares = y.bincount(minlength=5) / len(y)
    for k in range(1, len(y) + 1):
        counts = y[order[:k]].bincount(minlength=5)
        assert (counts - k * shares).abs().max() <= 1.5


LABELS = torch.arange(200) % 4


def test_a_split_is_decided_by_its_seed_and_stratified() -> None:
    train, val = split(LABELS, 0.2, split_seed=3)
    torch.manual_seed(99)
    again, _ = split(LABELS, 0.2, split_seed=3)
    other, _ = split(LABELS, 0.2, split_seed=4)
    assert train.equal(again)
    assert set(train.tolist()) != set(other.tolist())
    assert sorted(torch.cat([train, val]).tolist()) == list(range(200))
    assert LABELS[val].bincount().tolist() == [10] * 4


def test_a_smaller_limit_keeps_some_of_the_same_samples_and_all_of_validation() -> None:
    small, val_small = split(LABELS, 0.2, 0, limit=40)
    large, val_large = split(LABELS, 0.2, 0, limit=80)
    assert val_small.equal(val_large)
    assert set(small.tolist()) < set(large.tolist())
    assert not set(large.tolist()) & set(val_large.tolist())
    assert LABELS[small].bincount().tolist() == [10] * 4


@pytest.mark.parametrize("val_fraction", [0.0, 1.0, 0.001, -0.5, 1.5])
def test_a_split_that_leaves_nothing_is_an_error(val_fraction: float) -> None:
    with pytest.raises(ValueError, match="both need some"):
        split(LABELS, val_fraction, 0)


@pytest.mark.parametrize("limit", [0, -1, 161])
def test_a_limit_beyond_the_training_samples_is_an_error(limit: int) -> None:
    with pytest.raises(ValueError, match="choose 1 to 160 training samples"):
        split(LABELS, 0.2, 0, limit)


def loader(seed: int = 0, *, rank: int = 0, world_size: int = 1, batch_size: int = 8) -> ShuffledBatches:
    x = torch.arange(50.0)[:, None]
    parts = train_parts(50, batch_size, rank=rank, world_size=world_size)
    return ShuffledBatches(x, x[:, 0].long(), parts, seed=seed)


def seen(batches: TensorBatches) -> list[list[int]]:
    return [y.tolist() for _, y in batches]


def test_epochs_have_different_orders_and_a_seed_repeats_them() -> None:
    torch.manual_seed(0)
    batches = loader()
    first, second = seen(batches), seen(batches)
    torch.manual_seed(1)
    torch.rand(7)
    again = loader()
    assert first != second
    assert [seen(again), seen(again)] == [first, second]
    assert sorted(chain.from_iterable(first)) == list(range(50))
    assert seen(loader(seed=1)) not in (first, second)


def test_reading_batches_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    seen(loader())
    assert torch.get_rng_state().equal(before)


def test_samples_and_labels_stay_together() -> None:
    for x, y in loader():
        assert x[:, 0].tolist() == y.tolist()


@pytest.mark.parametrize("epoch", [0, 5])
def test_ranks_share_one_order(epoch: int) -> None:
    whole = loader(batch_size=16)
    ranks = [loader(rank=rank, world_size=2) for rank in range(2)]
    for batches in [whole, *ranks]:
        batches.set_epoch(epoch)
    joined = [list(chain.from_iterable(step)) for step in zip(*map(seen, ranks), strict=True)]
    assert joined == seen(whole)[: len(joined)]
    assert len(joined) == 3


def test_the_epoch_may_be_told_after_the_iterator_was_made() -> None:
    late, early = loader(), loader()
    iterator = iter(late)
    late.set_epoch(3)
    early.set_epoch(3)
    assert [y.tolist() for _, y in iterator] == seen(early)


@pytest.mark.parametrize("done", range(8))
def test_a_state_continues_the_epoch_with_the_next_batch(done: int) -> None:
    batches = loader()
    seen(batches)
    iterator = iter(batches)
    for _ in range(done):
        next(iterator)
    state = batches.state_dict()
    rest = [y.tolist() for _, y in iterator]
    following = seen(batches)
    resumed = loader(seed=123)
    resumed.load_state_dict(state)
    if done == 0 or rest:  # nothing of the second epoch was read, so the first is the last one known
        assert seen(resumed) == rest
    assert seen(resumed) == following


def test_a_pass_by_the_way_leaves_the_told_epoch_and_its_state_alone() -> None:
    batches, plain = loader(), loader()
    for each in (batches, plain):
        each.set_epoch(2)
    iterator = iter(batches)
    got = [next(iterator)[1].tolist()]
    state = batches.state_dict()
    assert seen(batches) == seen(plain)
    assert batches.state_dict() == state
    got += [y.tolist() for _, y in iterator]
    plain.set_epoch(2)
    assert got == seen(plain)


def test_a_state_from_the_middle_of_another_epoch_length_is_refused() -> None:
    batches = loader(batch_size=8)
    next(iter(batches))
    with pytest.raises(ValueError, match="batch 1 of 7, but an epoch has 4 batches now"):
        loader(batch_size=16).load_state_dict(batches.state_dict())


def test_a_state_from_the_end_of_an_epoch_fits_any_batch_size() -> None:
    batches = loader(batch_size=8)
    seen(batches)
    resumed = loader(batch_size=16)
    resumed.load_state_dict(batches.state_dict())
    assert resumed.state_dict() == {"seed": 0, "epoch": 1, "batch": 0, "batches": 4}
