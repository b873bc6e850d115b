"""Every layer of the family against the same demands: one row of the table each, one test a demand."""

import copy
import gc
import io
import math
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from norm_table import CHANNELS, ROWS, TRAINING, Row, assert_close, batch, pure, step
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bnlight.norm
from bnlight.norm import NORMS, BatchNorm, Norm
from bnlight.norm.layout import memory_layout

FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
HALF = [torch.bfloat16, torch.float16]


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=FORMATS.get(x.dim(), torch.contiguous_format))


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": channels_last,
    "strided": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    "last_axis": lambda x: x.movedim(1, -1).contiguous(),
}


@pytest.fixture(params=ROWS)
def row(request: pytest.FixtureRequest) -> Row:
    return ROWS[request.param]


def shapes(row: Row) -> list[tuple[int, ...]]:
    every = [(5, CHANNELS), (5, CHANNELS, 3), (4, CHANNELS, 3, 2), (3, CHANNELS, 2, 2, 2)]
    return every[1:] if row.needs_positions else every


def trained(row: Row, dtype: torch.dtype = torch.float64, **options: object) -> Norm:
    layer = row.make(dtype, **options)
    layer(batch(5, CHANNELS, 4, 3, seed=1, dtype=dtype).movedim(1, layer.channel_dim))
    return layer


def test_every_layer_has_a_row():
    public = {t for t in vars(bnlight.norm).values() if isinstance(t, type) and issubclass(t, Norm)} - {Norm}
    assert {row.layer for row in ROWS.values()} == public
    for name, layer in NORMS.items():
        assert ROWS[name].layer is layer


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ROWS)
@settings(max_examples=5, deadline=None)
@given(
    n=st.integers(2, 6),
    space=st.lists(st.integers(2, 4), min_size=1, max_size=3) | st.just([]),
    seed=st.integers(0, 999),
)
def test_it_is_its_formula_in_training_and_evaluation(name, layout, n, space, seed):
    row = ROWS[name]
    if row.by_position and layout == "last_axis":
        space = []  # all its positions are on one axis there
    if row.needs_positions and not space:
        space = [3]
    layer = row.make(channel_dim=-1 if layout == "last_axis" else 1)
    twin = row.make()

    def arranged(x: Tensor) -> Tensor:
        z = LAYOUTS[layout](x)
        y = layer(z)
        assert memory_layout(z) in (None, memory_layout(y))
        return y.movedim(-1, 1) if layout == "last_axis" else y

    for k in range(seed, seed + 3):
        x = batch(n, CHANNELS, *space, seed=k)
        assert_close(step(arranged, layer, x, seed=k), step(lambda z: row.formula(twin, z), twin, x, seed=k))
    layer.eval()
    twin.eval()
    x = batch(3, CHANNELS, *space, seed=seed)
    assert_close(step(arranged, layer, x), step(lambda z: row.formula(twin, z), twin, x))


@pytest.mark.parametrize("training", TRAINING)
def test_gradients_are_the_derivatives_of_the_output(row, training):
    function, parameters = pure(row, training)
    assert torch.autograd.gradcheck(function, (batch(4, CHANNELS, 2).requires_grad_(), *parameters))


def right_or_refused(check: Callable[[], object]) -> None:
    try:
        check()
    except RuntimeError as error:
        if "first derivatives only" not in str(error):
            raise


@pytest.mark.parametrize("training", TRAINING)
def test_second_derivatives_are_right_or_refused(row, training):
    function, parameters = pure(row, training)
    inputs = (batch(4, CHANNELS, 2).requires_grad_(), *parameters)
    right_or_refused(lambda: torch.autograd.gradgradcheck(function, inputs, fast_mode=True))


@pytest.mark.parametrize("masked", [False, True])
def test_the_memory_layout_is_kept_forward_and_backward(row, masked):
    for shape in shapes(row):
        for arrange in (LAYOUTS["contiguous"], channels_last):
            x = arrange(batch(*shape)).requires_grad_()
            y = row.make()(x, torch.ones(shape[:1] + shape[2:], dtype=torch.bool) if masked else None)
            y.square().sum().backward()
            assert y.stride() == x.grad.stride() == x.stride()
        x = batch(*shape).movedim(1, -1).contiguous().requires_grad_()
        y = row.make(channel_dim=-1)(x)
        y.square().sum().backward()
        assert y.is_contiguous()
        assert x.grad.is_contiguous()


@pytest.mark.parametrize("training", TRAINING)
@pytest.mark.parametrize("channel_dim", [1, -1])
def test_what_lies_in_the_padding_never_matters(row, channel_dim, training):
    mask = torch.arange(5) < torch.tensor([[5], [3], [2], [0]])
    x = batch(4, CHANNELS, 5).movedim(1, channel_dim).contiguous()
    padding = ~mask.unsqueeze(channel_dim).expand_as(x)
    results = []
    for value in (0.0, math.nan, math.inf, 1e300):
        layer = row.make(channel_dim=channel_dim).train(training)
        results.append(step(layer, layer, x.masked_fill(padding, value), mask))
        assert (results[-1]["y"][padding] == 0).all()
        assert (results[-1]["dx"][padding] == 0).all()
        assert all(torch.equal(found, results[0][name]) for name, found in results[-1].items())


@pytest.mark.parametrize("space", [(), (6,)], ids=str)
def test_padding_is_as_if_it_were_not_there(row, space):
    """At other positions of each sample, and in one sample everywhere."""
    if not space and row.needs_positions:
        return
    masked, packed = row.make(), row.make()
    for k in range(2):
        x = batch(5, CHANNELS, *space, seed=k)
        if space:
            order = torch.arange(6) if row.by_position else torch.rand(5, 6).argsort(1)
            mask = order.expand(5, 6) < 4
            mask[4] = row.by_position
        else:
            mask = torch.tensor([True, True, True, True, False])
        length = 6 if row.by_position else 4
        if row.by_position and space:  # here only whole samples can go
            mask[:] = True
            mask[4] = False
        where = mask[:4].unsqueeze(1).expand(4, CHANNELS, *space)
        short = x[:4][where].view(4, CHANNELS, length) if space else x[:4]
        weights = torch.randn_like(short)
        found, expected = x.clone().requires_grad_(), short.clone().requires_grad_()
        torch.manual_seed(k)
        y = masked(found, mask)[:4][where].view_as(short)
        torch.manual_seed(k)
        z = packed(expected)
        for output in (y, z):
            (output * weights).sum().backward()
        assert_close(
            {"y": y, "dx": found.grad[:4][where].view_as(short), **state(masked)},
            {"y": z, "dx": expected.grad, **state(packed)},
        )


def state(layer: nn.Module) -> dict[str, Tensor]:
    """Copies of the buffers and of the parameters' gradients."""
    gradients = {f"d{name}": p.grad.clone() for name, p in layer.named_parameters()}
    return gradients | {name: b.clone() for name, b in layer.named_buffers()}


@pytest.mark.parametrize("shape", [(0, CHANNELS, 3), (0, CHANNELS, 3, 2), (2, CHANNELS, 3)], ids=str)
def test_no_values_give_zero_gradients_and_leave_the_averages(row, shape):
    if row.by_position and len(shape) == 4:
        return
    layer = trained(row) if not row.by_position else row.make()
    if row.by_position:
        layer(batch(5, CHANNELS, 3))
    before = {name: b.clone() for name, b in layer.named_buffers()}
    x = batch(*shape).requires_grad_()
    y = layer(x, torch.zeros(2, 3, dtype=torch.bool) if shape[0] else None)
    y.sum().backward()
    assert y.shape == shape
    assert (y == 0).all()
    assert (x.grad == 0).all()
    for parameter in layer.parameters():
        assert (parameter.grad == 0).all()
    for name, buffer in layer.named_buffers():
        counts = name == "num_batches_tracked"
        assert torch.equal(buffer, before[name] + 1 if counts else before[name]), name


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("input_dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("module_dtype", [torch.float32, *HALF])
def test_any_mix_of_precisions_has_full_statistics(row, module_dtype, input_dtype, masked):
    for shape in shapes(row)[:2]:
        layer, exact = row.make(torch.float32).to(module_dtype), row.make()
        if row.options.get("tlu"):
            layer.tau.data.fill_(-9)  # a threshold that no rounding crosses
            exact.tau.data.fill_(-9)
        mask = torch.arange(shape[0]) < shape[0] - 1
        mask = (mask.view(-1, *[1] * (len(shape) - 2)).expand(shape[:1] + shape[2:]),) if masked else ()
        x = batch(*shape).to(input_dtype)
        found, expected = step(layer, layer, x, *mask), step(exact, exact, x.double(), *mask)
        assert found["y"].dtype == found["dx"].dtype == input_dtype
        for name, parameter in layer.named_parameters():
            assert found[f"d{name}"].dtype == parameter.dtype == module_dtype
        for name, buffer in layer.named_buffers():
            assert buffer.dtype == (torch.long if name == "num_batches_tracked" else torch.float32)
        if not (row.layer is BatchNorm and row.options.get("jitter")):  # drawn in the statistics' precision
            exactly = input_dtype == module_dtype == torch.float32
            found = {name: value.to(expected[name].dtype) for name, value in found.items()}
            assert_close(found, expected, 1e-4 if exactly else 4e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_no_number(row, dtype):
    layer, plain = row.make(torch.float32), row.make(torch.float32)
    x = batch(4, CHANNELS, 3, 3, dtype=dtype)

    def cast(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x)

    assert_close(step(cast, layer, x), step(plain, plain, x), 0)


@pytest.mark.parametrize("training", TRAINING)
def test_far_from_zero_the_variance_is_kept(row, training):
    x = batch(8, CHANNELS, 6, 5, dtype=torch.float32) + 1000
    layer, exact = row.make(torch.float32), row.make()
    for module, values in ((layer, x), (exact, x.double())):
        torch.manual_seed(0)
        module(values)
    layer.train(training)
    exact.train(training)
    torch.manual_seed(0)
    y = layer(x)
    torch.manual_seed(0)
    jitter = row.options.get("jitter") and training
    tolerance = 1.0 if jitter else 5e-3
    torch.testing.assert_close(y.double(), exact(x.double()), rtol=1e-4, atol=tolerance)
    for found, expected in zip(layer.buffers(), exact.buffers(), strict=True):
        torch.testing.assert_close(found.double(), expected.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", HALF)
def test_the_largest_values_stay_finite(row, dtype):
    largest = torch.finfo(dtype).max if dtype == torch.float16 else 1e18
    layer = row.make(torch.float32).to(dtype)
    x = (torch.rand(4, CHANNELS, 3, 2) - 0.5) * largest
    found = step(layer, layer, x.to(dtype))
    for name in ("y", "dx"):
        assert found[name].isfinite().all(), name


def test_a_layer_used_twice_in_a_step_moves_twice_and_adds_its_gradients(row):
    layer, twin = row.make(), row.make()
    x = batch(4, CHANNELS, 3, 2)
    for seed in range(2):
        assert_close(
            step(lambda z: layer(layer(z) + z), layer, x, seed=seed),
            step(lambda z: row.formula(twin, row.formula(twin, z) + z), twin, x, seed=seed),
        )


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputed_layer_moves_once(row, reentrant):
    layer, plain = row.make(), row.make()
    x = batch(4, CHANNELS, 3, 2)
    for seed in range(2):
        assert_close(
            step(
                lambda z: checkpoint(lambda t: layer(layer(t)), z, use_reentrant=reentrant),
                layer,
                x,
                seed=seed,
            ),
            step(lambda z: plain(plain(z)), plain, x, seed=seed),
        )


def test_copies_and_a_saved_state_are_the_same_layer(row):
    layer = trained(row)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    loaded = row.layer(CHANNELS, dtype=torch.float64, **row.options)
    loaded.load_state_dict(torch.load(file, weights_only=True), strict=True)
    for twin in (loaded, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.extra_repr() == layer.extra_repr()
        original = copy.deepcopy(layer)
        for training in TRAINING:
            x = batch(3, CHANNELS, 4, 3, seed=2)
            found, expected = (step(part.train(training), part, x) for part in (twin, original))
            assert_close(found, expected, 0)


def test_a_torch_batch_norm_state_loads_strictly(row):
    mine = row.make()
    if not row.by_batch or (mine.weight is None) != (mine.bias is None):
        return  # torch has no such layer
    own = {"affine": mine.affine, "track_running_stats": mine.track_running_stats}
    torchs = nn.BatchNorm2d(CHANNELS, dtype=torch.float64, **own)
    torchs(batch(6, CHANNELS, 2, 2))
    extra = {name: value.clone() for name, value in mine.state_dict().items() if name in mine.not_in_torch}
    mine.load_state_dict(torchs.state_dict(), strict=True)
    assert_close(dict(mine.state_dict()), dict(torchs.state_dict()) | extra, 0)


def test_nothing_of_a_step_is_left_after_it(row):
    layer = row.make()
    gc.disable()
    try:
        left = []
        for _ in range(3):
            x = batch(4, CHANNELS, 3, 2).requires_grad_()
            y = layer(x, torch.ones(4, 3, 2, dtype=torch.bool))
            z = layer(x)
            (y.sum() + z.sum()).backward()
            left += map(weakref.ref, (x, y, z))
            del x, y, z
        assert not [reference for reference in left if reference() is not None]
    finally:
        gc.enable()


def test_memory_does_not_grow_with_the_number_of_steps():
    layers = [row.make() for row in ROWS.values()]

    def tensors_after(steps: int) -> int:
        for _ in range(steps):
            for layer in layers:
                layer(batch(4, CHANNELS, 3, 2).requires_grad_()).sum().backward()
        gc.collect()
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    before = tensors_after(10)
    assert tensors_after(10) == before
