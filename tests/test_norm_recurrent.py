"""NormLSTM is torch's LSTM without a norm, and the papers' formulas with one; padding reaches nothing."""

import copy
import itertools
import warnings
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lstm_by_hand import (
    EPS,
    LENGTHS,
    MOMENTUM,
    SIZES,
    assert_close,
    batch,
    batch_statistics,
    by_hand,
    flat,
    gradients,
    made,
    own_statistics,
)
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from bnlight.norm import NORMS, BatchNorm, GroupNorm, NormLSTM


@pytest.mark.parametrize("norm", [None, "none", NORMS["none"]])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_without_a_norm_it_is_torchs_lstm_and_shares_its_state_dicts(norm, batch_first, bias):
    options = {"batch_first": batch_first, "bias": bias, "dtype": torch.float64}
    torch.manual_seed(1)
    theirs = nn.LSTM(*SIZES, **options)
    torch.manual_seed(1)
    mine = NormLSTM(*SIZES, norm=norm, **options)
    assert_close([*mine.parameters()], [*theirs.parameters()])
    nn.init.uniform_(theirs.weight_hh_l0, -1, 1)
    mine.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(mine.state_dict())
    x = batch(5, 6).requires_grad_()
    state = torch.randn(2, 1, 5 if batch_first else 6, 4, dtype=torch.float64)
    for given_state in (None, (state[0], state[1])):
        found, expected = flat(mine(x, given_state)), flat(theirs(x, given_state))
        assert_close(found, expected)
        assert_close(
            gradients(found, [x, *mine.parameters()]), gradients(expected, [x, *theirs.parameters()])
        )


@pytest.mark.parametrize("enforce_sorted", [False, True])
@pytest.mark.parametrize("norm", [None, "batch", "layer"])
def test_a_packed_sequence_gives_what_torchs_lstm_gives(norm, enforce_sorted):
    lengths = torch.tensor([6, 5, 5, 2, 1, 1] if enforce_sorted else [5, 2, 6, 1, 5, 1])
    packed = pack_padded_sequence(batch(), lengths, enforce_sorted=enforce_sorted)
    state = tuple(torch.randn(2, 1, 6, 4, dtype=torch.float64))
    mine, theirs = made(norm), nn.LSTM(*SIZES, dtype=torch.float64)
    twin = copy.deepcopy(mine)
    output, (h, c) = mine(packed, state)
    assert isinstance(output, PackedSequence)
    padded, found = pad_packed_sequence(output)
    assert torch.equal(found, lengths)
    assert_close([padded, h, c], flat(twin(batch(), state, lengths=lengths)))
    if norm is None:
        theirs.load_state_dict(mine.state_dict())
        output, (h_n, c_n) = theirs(packed, state)
        assert_close([padded, h, c], [pad_packed_sequence(output)[0], h_n, c_n])


@pytest.mark.parametrize("norm", ["batch", "layer"])
@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 5), min_size=1, max_size=6),
    with_state=st.booleans(),
    seed=st.integers(0, 99),
)
def test_training_and_its_gradients_are_the_papers_formulas(norm, lengths, with_state, seed):
    layer, x, number = made(norm), batch(5, len(lengths), seed).requires_grad_(), torch.tensor(lengths)
    state = tuple(torch.randn(2, 1, len(lengths), 4, dtype=torch.float64)) if with_state else None
    statistics = {"batch": batch_statistics, "layer": own_statistics}[norm]
    expected = by_hand(layer, x, number, state, lambda name, step, rows: statistics(rows))
    found = flat(layer(x, state, lengths=number))
    assert_close(found, [*expected])
    if max(lengths) > 1:
        inputs = [x, *layer.parameters()]
        assert_close(gradients(found, inputs), gradients([*expected], inputs))


def test_every_step_has_running_averages_of_the_sequences_that_reach_it():
    layer, seen = made("batch"), {}

    def record(name: str, step: int, rows: Tensor) -> Tensor:
        seen[name, step] = rows.detach()
        return batch_statistics(rows)

    by_hand(layer, batch(), LENGTHS, None, record)
    layer(batch(), lengths=LENGTHS)
    assert len(seen) == 18
    for (name, step), rows in seen.items():
        averages = getattr(layer, name).steps[step]
        torch.testing.assert_close(averages.running_mean, MOMENTUM * rows.mean(0))
        torch.testing.assert_close(averages.running_var, 1 - MOMENTUM + MOMENTUM * rows.var(0))
        assert averages.num_batches_tracked == 1


def test_evaluation_uses_each_steps_averages_and_after_the_last_step_its():
    layer = made("batch", length=4)
    for seed in range(3):
        layer(batch(6, 6, seed), lengths=LENGTHS)
    layer.eval()
    x, lengths = batch(9, 3, 7), torch.tensor([9, 1, 5])

    def running(name: str, step: int, rows: Tensor) -> Tensor:
        averages = getattr(layer, name).steps[min(step, 3)]
        return (rows - averages.running_mean) / (averages.running_var + EPS).sqrt()

    before = copy.deepcopy(layer.state_dict())
    expected = by_hand(layer, x, lengths, None, running)
    assert_close(flat(layer(x, lengths=lengths)), [*expected])
    assert_close([*layer.state_dict().values()], [*before.values()])


@pytest.mark.parametrize("norm", ["batch", "renorm", "full"])
def test_steps_beyond_max_length_train_the_last_steps_averages(norm):
    layer, x = made(norm, length=2), batch(5, 6).requires_grad_()
    found = flat(layer(x))
    if norm == "batch":
        expected = by_hand(
            layer, x, torch.full((6,), 5), None, lambda name, step, rows: batch_statistics(rows)
        )
        assert_close(found, [*expected])
        inputs = [x, *layer.parameters()]
        assert_close(gradients(found, inputs), gradients([*expected], inputs))
    else:
        found[0].sum().backward()
    assert [int(step.num_batches_tracked) for step in layer.norm_hh.steps] == [1, 4]


@pytest.mark.parametrize("norm", ["batch", "renorm", "full", partial(BatchNorm, momentum=None)], ids=str)
def test_steps_that_no_batch_has_reached_have_the_averages_of_the_last_one_that_has(norm):
    layer = made(norm, length=8)
    # 6 steps, of which the last has one sequence: too few for any but full normalization
    lengths, reached = torch.tensor([3, 6, 5, 4, 5]), 6 if norm == "full" else 5
    for seed in range(3):
        layer(batch(6, 5, seed), lengths=lengths)
    for steps in (layer.norm_ih.steps, layer.norm_hh.steps, layer.norm_cell.steps):
        assert [int(step.num_batches_tracked) for step in steps] == [3] * reached + [0] * (8 - reached)
        means = [step.running_mean for step in steps]
        assert all(torch.equal(mean, means[reached - 1]) for mean in means[reached:])
        assert not any(torch.equal(a, b) for a, b in itertools.pairwise(means[:reached]))
        assert torch.equal(steps[-1].running_var, steps[reached - 1].running_var)
    layer(batch(8, 5))  # and now all have
    assert all(int(step.num_batches_tracked) >= 1 for step in layer.norm_hh.steps)
    assert not torch.equal(layer.norm_hh.steps[7].running_mean, layer.norm_hh.steps[reached].running_mean)


def test_a_step_with_one_sequence_is_normalized_by_running_averages_unless_that_is_an_error():
    layer, lengths = made("batch"), torch.tensor([6, 3, 3])
    layer(batch(6, 3), lengths=lengths)
    averages = copy.deepcopy(layer)

    def mixed(name: str, step: int, rows: Tensor) -> Tensor:
        last = getattr(averages, name).steps[2]  # the last that had a batch
        if len(rows) > 1:
            return batch_statistics(rows)
        return (rows - last.running_mean) / (last.running_var + EPS).sqrt()

    # The third step's averages, which the lone sequence takes, are those before this batch.
    expected = by_hand(layer, batch(6, 3, 1), lengths, None, mixed)
    assert_close(flat(layer(batch(6, 3, 1), lengths=lengths)), [*expected])
    strict = made(partial(BatchNorm, small_batch="error"))
    with pytest.raises(ValueError, match=r"leaves one value per channel.*small_batch='running'"):
        strict(batch(6, 3), lengths=lengths)


@pytest.mark.parametrize("norm", ["batch", "renorm", "full", "layer", "group", "rms", "tanh"])
@pytest.mark.parametrize("how", ["lengths", "mask"])
def test_padding_reaches_no_result_statistic_or_gradient(norm, how):
    layer = made(norm, batch_first=True)
    valid = torch.arange(6)[None] < LENGTHS[:, None]
    told = {"lengths": LENGTHS} if how == "lengths" else {"mask": valid}
    results = []
    for padding in (0.0, float("nan")):
        run = copy.deepcopy(layer)
        x = torch.where(valid[..., None], batch().transpose(0, 1), padding).requires_grad_()
        found = flat(run(x, **told))
        grads = gradients(found, [x, *run.parameters()])
        assert (found[0][~valid] == 0).all()
        assert (grads[0][~valid] == 0).all()
        ends = found[0][torch.arange(6), (LENGTHS - 1).clamp(min=0)]
        assert_close([found[1][0]], [ends])
        results.append([*found, *grads, *run.buffers()])
    assert_close(*results)


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_the_order_of_the_sequences_and_more_padding_change_nothing(norm):
    layer, order = made(norm), torch.tensor([3, 1, 5, 0, 4, 2])
    twin = copy.deepcopy(layer)
    output, (h, c) = layer(batch(), lengths=LENGTHS)
    longer = torch.cat([batch(), batch(3, 6, 1)])[:, order]
    found, (h_n, c_n) = twin(longer, lengths=LENGTHS[order])
    assert_close([found[:6], h_n, c_n], [output[:, order], h[:, order], c[:, order]])
    assert_close([*twin.buffers()], [*layer.buffers()])


@pytest.mark.parametrize("norm", ["batch", "layer", "renorm", None])
def test_gradients_pass_gradcheck_in_training_and_in_evaluation(norm):
    layer = NormLSTM(2, 2, norm=norm, max_length=3, noise=0, dtype=torch.float64)
    lengths = torch.tensor([3, 2, 2])
    x = torch.randn(3, 3, 2, dtype=torch.float64, requires_grad=True)
    layer(x, lengths=lengths)
    names = [name for name, _ in layer.named_parameters()]

    def call(x: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        parameters = dict(zip(names, values, strict=True))
        run = copy.deepcopy(layer)  # the averages of one call are not those of the next
        return tuple(flat(torch.func.functional_call(run, parameters, (x,), {"lengths": lengths})))

    for training in (True, False):
        layer.train(training)
        if not (norm == "renorm" and training):  # whose r and d are constants for the gradient
            values = [p.detach().clone().requires_grad_() for p in layer.parameters()]
            assert torch.autograd.gradcheck(call, (x, *values), fast_mode=True)


def constant_start(noise: float | None) -> list[Tensor]:
    torch.manual_seed(0)
    layer = NormLSTM(1, 16, norm="batch", max_length=40, noise=noise)
    x = torch.cat([torch.zeros(30, 32, 1), torch.randn(10, 32, 1)]).requires_grad_()
    return [*torch.autograd.grad(layer(x)[0][-1].square().sum(), [x, *layer.parameters()])]


def test_noise_on_the_initial_state_keeps_gradients_bounded_where_sequences_start_alike():
    assert not all(g.isfinite().all() for g in constant_start(0.0))
    assert all(g.norm() < 10 for g in constant_start(None))


def test_noise_is_drawn_in_training_only_and_only_without_a_state():
    x, zeros = torch.randn(5, 4, 3), torch.zeros(2, 1, 4, 4)
    layer = NormLSTM(*SIZES, norm="batch", max_length=5)
    assert layer.noise == 0.1
    assert not torch.equal(layer(x)[0], layer(x)[0])
    assert torch.equal(layer(x, (zeros[0], zeros[1]))[0], layer(x, (zeros[0], zeros[1]))[0])
    layer.eval()
    assert torch.equal(layer(x)[0], layer(x)[0])
    assert NormLSTM(*SIZES, norm="layer").noise == 0


@pytest.mark.parametrize("name", NORMS)
def test_every_norm_of_the_table_trains_or_says_why_not(name):
    layer = NormLSTM(3, 8, norm=name, max_length=5)
    x = torch.randn(5, 6, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of layers for which one position is too few
        if name in ("instance", "batch_instance"):
            with pytest.raises(ValueError, match=r"one value per channel and sample; use .* here"):
                layer(x)
            return
        layer(x)[0][-1].square().sum().backward()
        assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())
        assert layer.eval()(x)[0].isfinite().all()


@pytest.mark.parametrize(("name", "initial"), [("batch", 0.1), ("full", 0.1), ("layer", 1.0), ("group", 1.0)])
def test_weights_start_at_a_tenth_with_batch_statistics(name, initial):
    layer = NormLSTM(3, 8, norm=name, max_length=5)
    for norm in (layer.norm_ih, layer.norm_hh, layer.norm_cell):
        assert torch.equal(norm.steps[0].weight, torch.full_like(norm.steps[0].weight, initial))


@pytest.mark.parametrize(
    ("norm", "name"),
    [(nn.BatchNorm1d, "batch"), (partial(BatchNorm, affine=True), "batch"), (nn.LayerNorm, "layer")],
    ids=str,
)
def test_a_factory_may_make_any_layer(norm, name):
    mine, named = made(norm), made(name)
    with torch.no_grad():
        for one, other in zip(
            (mine.norm_ih, mine.norm_hh, mine.norm_cell),
            (named.norm_ih, named.norm_hh, named.norm_cell),
            strict=True,
        ):
            one.steps[0].weight.copy_(other.steps[0].weight)
            if one.steps[0].bias is not None:
                one.steps[0].bias.copy_(
                    torch.zeros(()) if other.steps[0].bias is None else other.steps[0].bias
                )
    lengths = torch.tensor([6, 6, 2, 4, 4, 6])
    for run in (NormLSTM.train, NormLSTM.eval):
        assert_close(flat(run(mine)(batch(), lengths=lengths)), flat(run(named)(batch(), lengths=lengths)))


def test_a_factory_keeps_what_it_fixes_and_gets_the_rest():
    layer = NormLSTM(*SIZES, norm=partial(BatchNorm, momentum=0.3, weight_init=0.5, eps=1e-3), max_length=2)
    norm = layer.norm_cell.steps[1]
    assert (norm.momentum, norm.eps, norm.small_batch) == (0.3, 1e-3, "running")
    assert norm.weight.tolist() == [0.5] * 4
    assert layer.norm_ih.steps[0].bias is None
    chosen = NormLSTM(*SIZES, norm="batch", max_length=2, weight_init=0.7, bias=False)
    assert chosen.norm_cell.steps[1].weight[0].item() == pytest.approx(0.7)
    assert [n for n, _ in chosen.named_parameters() if "bias" in n] == []
    assert NormLSTM(3, 8, norm=partial(GroupNorm, num_groups=2)).norm_cell.steps[0].num_groups == 2


def test_virtual_batches_normalize_each_group_of_sequences():
    layer = made(partial(BatchNorm, virtual_batch_size=3))

    def by_groups(name: str, step: int, rows: Tensor) -> Tensor:
        groups = max(1, len(rows) // 3)
        found = torch.empty_like(rows)
        for group in range(groups):
            found[group::groups] = batch_statistics(rows[group::groups])
        return found

    lengths = torch.tensor([6, 6, 5, 5, 4, 2])
    assert_close(flat(layer(batch(), lengths=lengths)), [*by_hand(layer, batch(), lengths, None, by_groups)])
