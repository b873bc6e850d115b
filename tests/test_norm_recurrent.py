"""NormLSTM is torch's LSTM without a norm, and the papers' formulas with one; padding reaches nothing."""

import copy
import io
import itertools
import pickle
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import start
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from bnlight import sync_norm
from bnlight.norm import NORMS, BatchNorm, BatchRenorm, GroupNorm, NormLSTM
from bnlight.surgery import norm_parameters

EPS, MOMENTUM, SIZES = 1e-5, 0.1, (3, 4)
LENGTHS = torch.tensor([2, 6, 0, 4, 4, 6])


def made(norm: Any, *, length: int | None = 6, **options: Any) -> NormLSTM:
    """A float64 layer without noise whose parameters are all different."""
    torch.manual_seed(3)
    options = {"noise": 0.0, "dtype": torch.float64, **options}
    layer = NormLSTM(*SIZES, norm=norm, max_length=length, **options)
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, -0.8, 0.8)
    return layer


def batch(steps: int = 6, number: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(steps, number, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_hand(layer: NormLSTM, x: Tensor, lengths: Tensor, state: Any, norm: Any) -> Any:
    """The papers' formulas, one sequence and one step at a time; `norm(name, step, rows)` has no affine map."""
    number, hidden = len(lengths), layer.hidden_size
    h, c = (list(s[0]) for s in state) if state else ([x.new_zeros(hidden)] * number for _ in range(2))
    output = [[x.new_zeros(hidden)] * number for _ in x]
    weights = {name: getattr(layer, name).steps[0].weight for name in ("norm_ih", "norm_hh", "norm_cell")}
    for step in range(len(x)):
        here = [n for n in range(number) if lengths[n] > step]
        if not here:
            break
        ih = torch.stack([layer.weight_ih_l0 @ x[step, n] for n in here])
        hh = torch.stack([layer.weight_hh_l0 @ h[n] for n in here])
        ih = norm("norm_ih", step, ih) * weights["norm_ih"] + layer.bias_ih_l0
        hh = norm("norm_hh", step, hh) * weights["norm_hh"] + layer.bias_hh_l0
        cells = []
        for n, gates in zip(here, ih + hh, strict=True):
            i, f, g, o = gates.split(hidden)
            c[n] = torch.sigmoid(f) * c[n] + torch.sigmoid(i) * torch.tanh(g)
            cells.append((c[n], o))
        cell = norm("norm_cell", step, torch.stack([c for c, _ in cells])) * weights["norm_cell"]
        for n, value, (_, o) in zip(here, cell + layer.norm_cell.steps[0].bias, cells, strict=True):
            h[n] = output[step][n] = torch.sigmoid(o) * torch.tanh(value)
    return torch.stack([torch.stack(row) for row in output]), torch.stack(h)[None], torch.stack(c)[None]


def batch_statistics(rows: Tensor) -> Tensor:
    if len(rows) == 1:
        return rows / (1 + EPS) ** 0.5  # by running averages that no batch has moved
    return (rows - rows.mean(0)) / (rows.var(0, correction=0) + EPS).sqrt()


def own_statistics(rows: Tensor) -> Tensor:
    return (rows - rows.mean(1, keepdim=True)) / (rows.var(1, keepdim=True, correction=0) + EPS).sqrt()


def flat(result: Any) -> list[Tensor]:
    output, (h, c) = result
    return [output, h, c]


def gradients(results: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    loss = sum((r * torch.linspace(-1, 2, r.numel(), dtype=r.dtype).view(r.shape)).sum() for r in results)
    return [*torch.autograd.grad(loss, inputs)]


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-9)


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


def test_all_steps_share_their_parameters_and_a_state_dict_has_them_once():
    layer = NormLSTM(*SIZES, norm="batch", max_length=3)
    names = [name for name, _ in layer.named_parameters()]
    norms = ["norm_ih.steps.0.weight", "norm_hh.steps.0.weight", "norm_cell.steps.0.weight"]
    assert names[:4] == [name for name, _ in nn.LSTM(*SIZES).named_parameters()]
    assert names[4:] == [*norms, "norm_cell.steps.0.bias"]
    buffers = ["running_mean", "running_var", "num_batches_tracked"]
    stored = [f"norm_{n}.steps.{t}.{b}" for n in ("ih", "hh", "cell") for t in range(3) for b in buffers]
    assert {*layer.state_dict()} == {*names, *stored}
    assert layer.norm_hh.steps[2].weight is layer.norm_hh.steps[0].weight
    free = {id(parameter) for parameter in norm_parameters(layer)}
    assert {name for name, p in layer.named_parameters() if id(p) not in free} == {
        "weight_ih_l0",
        "weight_hh_l0",
    }


def test_state_dicts_copies_and_pickles_are_whole():
    layer = made("batch", length=4)
    layer(batch())
    model = nn.Sequential(layer)
    stored = io.BytesIO()
    torch.save(model.state_dict(), stored)
    loaded = nn.Sequential(NormLSTM(*SIZES, norm="batch", max_length=4, noise=0, dtype=torch.float64))
    stored.seek(0)
    loaded.load_state_dict(torch.load(stored, weights_only=True))
    for twin in (
        loaded[0],
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        copy.deepcopy(layer).cpu(),
    ):
        assert twin.norm_hh.steps[3].weight is twin.norm_hh.steps[0].weight
        assert twin.norm_hh.steps[3].weight is not layer.norm_hh.steps[0].weight
        original = copy.deepcopy(layer)
        for _ in range(2):
            assert_close(flat(twin(batch())), flat(original(batch())))
        assert_close([*twin.state_dict().values()], [*original.state_dict().values()])


def test_a_state_dict_of_another_max_length_is_refused_and_its_max_length_named():
    layer, other = made("batch", length=4), made("batch", length=6)
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=r"norm_ih: .* 6 steps, this layer for 4.* max_length=6"):
            layer.load_state_dict(other.state_dict(), strict=strict)


@pytest.mark.parametrize("norm", ["batch", "layer", None])
def test_half_precision_has_torchs_dtypes_and_float32_statistics(norm):
    layer, theirs = NormLSTM(*SIZES, norm=norm, max_length=5), nn.LSTM(*SIZES)
    x = torch.randn(5, 6, 3)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = flat(layer(x)), flat(theirs(x))
        assert [r.dtype for r in found] == [r.dtype for r in expected] == [torch.bfloat16] * 3
    found[0].float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in layer.parameters())
    layer.bfloat16()
    assert all(
        r.dtype == torch.bfloat16 for r in flat(layer(x.bfloat16(), lengths=torch.tensor([5, 5, 4, 2, 1, 0])))
    )
    assert all(b.dtype in (torch.float32, torch.long) for b in layer.buffers())
    if norm == "batch":
        x = torch.randn(5, 64, 3)
        whole = NormLSTM(*SIZES, norm=norm, max_length=5, noise=0)
        half = copy.deepcopy(whole)
        with torch.autocast("cpu", torch.bfloat16):
            half(x)
        whole(x)
        for mine, exact in zip(half.buffers(), whole.buffers(), strict=True):
            torch.testing.assert_close(mine, exact, rtol=0.02, atol=0.02)


# torch.compile itself instantiates the autograd.Function it traces.
@pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("norm", ["batch", "renorm", "layer"])
@pytest.mark.parametrize("training", [True, False])
def test_batches_of_one_length_compile_to_one_graph(norm, training):
    torch._dynamo.reset()
    eager = NormLSTM(*SIZES, norm=norm, max_length=4, noise=0)
    eager(torch.randn(4, 6, 3))
    eager.train(training)
    other = copy.deepcopy(eager)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        x, results = torch.randn(3, 6, 3), []
        for run in (eager, compiled):
            z = x.clone().requires_grad_()
            found = flat(run(z))
            results.append([*found, *gradients(found, [z, *run.parameters()])])
        for mine, theirs in zip(*results, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    for mine, theirs in zip(other.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_no_sequence_and_no_step_are_no_error():
    for norm in ("batch", "layer", None):
        layer = made(norm)
        for shape in ((5, 0, 3), (0, 4, 3)):
            output, (h, c) = layer(torch.zeros(shape, dtype=torch.float64))
            assert output.shape == (*shape[:2], 4)
            assert h.shape == c.shape == (1, shape[1], 4)
        assert all((b == 0).all() for n, b in layer.named_buffers() if "tracked" in n)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "btach"}, r"unknown norm 'btach'; use one of \['batch', "),
        ({"norm": "batch"}, "BatchNorm keeps statistics for each step, so it needs max_length"),
        ({"norm": "batch", "max_length": 0}, "at least 1, got 0"),
        ({"norm": "layer", "noise": -1.0}, "noise must not be negative"),
        ({"norm": "layer", "hidden_size": 0}, "hidden_size must be at least 1"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        NormLSTM(**{"input_size": 3, "hidden_size": 4, **options})


GAP = torch.tensor([[1, 0], [0, 1], [1, 1]], dtype=torch.bool)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((3, 2), {}, r"expected input \(T, N, input_size\)"),
        ((3, 2, 4), {}, "expected 3 features on the last axis, got 4"),
        ((3, 2, 3), {"mask": GAP}, "valid steps must come first"),
        ((3, 2, 3), {"mask": GAP.T}, "expected a bool mask"),
        ((3, 2, 3), {"mask": GAP.float()}, "expected a bool mask"),
        ((3, 2, 3), {"lengths": torch.tensor([3])}, "expected 2 integer lengths"),
        ((3, 2, 3), {"lengths": torch.tensor([3.0, 2.0])}, "expected 2 integer lengths"),
        ((3, 2, 3), {"lengths": torch.tensor([3, 4])}, r"from 0 to the 3 steps of x, got \[3, 4\]"),
        ((3, 2, 3), {"lengths": torch.tensor([3, 2]), "mask": GAP}, "not both"),
        (
            (3, 2, 3),
            {"state": (torch.zeros(1, 2, 4), torch.zeros(1, 3, 4))},
            r"expected c_0 of shape \(1, 2, 4\)",
        ),
    ],
    ids=str,
)
def test_wrong_inputs_are_named(shape, options, message):
    with pytest.raises(ValueError, match=message):
        NormLSTM(*SIZES, norm="layer")(torch.zeros(shape), **options)
    if shape == (3, 2, 3) and "lengths" in options:
        packed = pack_padded_sequence(torch.zeros(shape), [3, 2])
        with pytest.raises(ValueError, match="a PackedSequence has its lengths"):
            NormLSTM(*SIZES, norm="layer")(packed, **options)


PARTS = [
    torch.tensor([6, 2, 4]),
    torch.tensor([3, 3, 0]),
]  # of two ranks; the second has none in the last steps


def train_on_part(norm: str, parts: list[Tensor]) -> dict[str, Tensor]:
    """What a layer with max_length 8 computes of this rank's part of a batch, padded to 7 steps."""
    layer = made(norm, length=8)
    rank = 0
    if len(parts) > 1:
        rank = torch.distributed.get_rank()
        sync_norm(layer)
    whole, first = batch(7, sum(map(len, parts))), sum(map(len, parts[:rank]))
    x = whole[:, first : first + len(parts[rank])].clone().requires_grad_()
    output, (h, c) = layer(x, lengths=parts[rank])
    (output.sin().sum() + (h * c).sum()).backward()
    return {"h": h.detach(), "dx": x.grad, **{n: b.clone() for n, b in layer.named_buffers()}}


def test_synchronized_ranks_with_different_lengths_are_one_process_with_all(tmp_path):
    norms = ["batch", "renorm"]
    with start(2, tmp_path) as ranks:
        results = [ranks.run(train_on_part, norm, PARTS) for norm in norms]
    for norm, found in zip(norms, results, strict=True):
        for result in found:
            assert not isinstance(result, Exception), result
        expected = train_on_part(norm, [torch.cat(PARTS)])
        for key in ("h", "dx"):
            assert_close([torch.cat([result[key] for result in found], 1)], [expected[key]])
        buffers = [key for key in expected if "norm" in key]
        for result in found:
            assert_close([result[key] for key in buffers], [expected[key] for key in buffers])


CASES = {"batch": "batch", "layer": "layer", "full": "full", "renorm": partial(BatchRenorm, momentum=0.1)}


@pytest.mark.parametrize("norm", CASES.values(), ids=CASES)
def test_it_learns_to_read_digits_row_by_row_of_which_some_are_cut_short(norm):
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32).view(-1, 8, 8) / 16, torch.tensor(labels)
    lengths = torch.randint(7, 9, (len(x),))
    train, test = torch.randperm(len(x)).split([1400, 397])
    layer, head = NormLSTM(8, 48, norm=norm, max_length=8, batch_first=True), nn.Linear(48, 10)
    optimizer = torch.optim.Adam([*layer.parameters(), *head.parameters()], lr=0.02)
    for _ in range(6):
        for chosen in train[torch.randperm(len(train))].split(64):
            _, (h, _) = layer(x[chosen], lengths=lengths[chosen])
            loss = nn.functional.cross_entropy(head(h[0]), y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    layer.eval()
    with torch.no_grad():
        found = head(layer(x[test], lengths=lengths[test])[1][0][0]).argmax(1)
    assert (found == y[test]).float().mean() > 0.9
