"""NormLSTM in use: state dicts, copies, half precision, compilation, wrong input, ranks, training."""

import copy
import io
import pickle
from functools import partial

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from lstm_by_hand import SIZES, assert_close, batch, flat, gradients, made
from ranks import start
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from bnlight import replace_norm, sync_norm
from bnlight.norm import NORMS, BatchRenorm, NormLSTM
from bnlight.surgery import norm_parameters


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


def configured(name: str, *overrides: str) -> partial:
    """The norm of the config group, which lists all its arguments."""
    with initialize_config_module("bnlight.conf", version_base="1.3"):
        return instantiate(compose("train", [f"norm={name}", *overrides]).norm)


@pytest.mark.parametrize(
    "name", [name for name in NORMS if name not in ("batch_instance", "instance", "frn")]
)
def test_a_norm_of_the_config_group_at_its_defaults_makes_the_layer_that_its_name_makes(name):
    layer, known = (NormLSTM(*SIZES, norm=norm, max_length=4) for norm in (configured(name), name))
    known.load_state_dict(layer.state_dict())
    for module, other in zip(layer.modules(), known.modules(), strict=True):
        assert repr(module) == repr(other)
        assert vars(module).get("weight_init") == vars(other).get("weight_init")
        assert getattr(module, "small_batch", None) == getattr(other, "small_batch", None)
    assert layer.noise == known.noise
    layer(torch.randn(4, 3, SIZES[0]), lengths=[4, 1, 2])


def test_what_is_changed_in_the_config_group_is_chosen():
    norm = configured("batch", "norm.weight_init=0.5", "norm.eps=0.01")
    layer = NormLSTM(*SIZES, norm=norm, max_length=2).norm_hh.steps[0]
    assert (layer.weight == 0.5).all()
    assert (layer.eps, layer.small_batch) == (0.01, "running")


@pytest.mark.parametrize("name", NORMS)
def test_a_replacement_from_the_config_group_carries_what_its_name_carries(name):
    nets = [nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, eps=0.125, momentum=0.25)) for _ in range(2)]
    replace_norm(nets[0], configured(name))
    replace_norm(nets[1], name)
    assert repr(nets[0]) == repr(nets[1])
    assert getattr(nets[0][1], "momentum", None) == getattr(nets[1][1], "momentum", None)
