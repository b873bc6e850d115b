"""BatchNorm is torch's BatchNorm, bit for bit, wherever torch has one."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bnlight.norm import NORMS, BatchNorm, BatchRenorm

TORCH = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
SHAPES = [(6, 4), (3, 4, 5), (3, 4, 5, 2), (2, 4, 3, 2, 2)]
OPTIONS = [
    {},
    {"eps": 0.1},
    {"momentum": 0.3},
    {"momentum": None},
    {"affine": False},
    {"bias": False},
    {"track_running_stats": False},
]
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.to(
        memory_format={4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim(), torch.preserve_format)
    ),
}


def pair(shape: tuple[int, ...], dtype: torch.dtype, **options) -> tuple[BatchNorm, nn.Module]:
    mine, torchs = (
        BatchNorm(shape[1], dtype=dtype, **options),
        TORCH[len(shape)](shape[1], dtype=dtype, **options),
    )
    for parameter, other in zip(mine.parameters(), torchs.parameters(), strict=True):
        nn.init.normal_(parameter)
        other.data.copy_(parameter.data)
    return mine, torchs


def step(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, gradients and buffers of one forward and backward."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    layer.zero_grad()
    y = layer(x)
    (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return [y, x.grad, *(p.grad for p in layer.parameters()), *(b.clone() for b in layer.buffers())]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == theirs.dtype
        assert mine.stride() == theirs.stride()
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_gradients_and_buffers_are_torchs_bit_for_bit(shape, options):
    for dtype, layout in itertools.product((torch.float32, torch.float64), LAYOUTS.values()):
        mine, torchs = pair(shape, dtype, **options)
        for _ in range(3):
            x = layout(torch.randn(shape, dtype=dtype) * 3 + 1)
            assert_same(step(mine, x), step(torchs, x))
        mine.eval()
        torchs.eval()
        assert_same(step(mine, x), step(torchs, x))


def test_an_empty_batch_is_torchs_bit_for_bit():
    for shape in [(0, 4), (0, 4, 5, 2), (3, 4, 0)]:
        mine, torchs = pair(shape, torch.float32)
        assert_same(step(mine, torch.randn(shape)), step(torchs, torch.randn(shape)))


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(2, 7),
    c=st.integers(1, 5),
    space=st.lists(st.integers(1, 4), max_size=3),
    seed=st.integers(0, 99),
)
def test_any_shape_is_torchs_bit_for_bit(n, c, space, seed):
    torch.manual_seed(seed)
    shape = (n, c, *space)
    mine, torchs = pair(shape, torch.float32)
    x = torch.randn(shape)
    assert_same(step(mine, x), step(torchs, x))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"virtual_batch_size": 2}], ids=str)
def test_channels_on_the_last_axis_give_the_same_numbers(shape, options):
    first, last = BatchNorm(4, **options).double(), BatchNorm(4, channel_dim=-1, **options).double()
    x = torch.randn(shape, dtype=torch.float64)
    expected = step(first, x)
    z = x.movedim(1, -1).contiguous().requires_grad_()
    y = last(z)
    weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(shape).movedim(1, -1)
    (y * weights).sum().backward()
    assert y.is_contiguous()
    torch.testing.assert_close(y.movedim(-1, 1), expected[0])
    torch.testing.assert_close(z.grad.movedim(-1, 1), expected[1])
    for mine, theirs in zip(
        [*(p.grad for p in last.parameters()), *last.buffers()], expected[2:], strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def test_one_value_per_channel_can_use_the_running_statistics():
    layer = BatchNorm(3, small_batch="running")
    layer(torch.randn(16, 3) * 2 + 5)
    before = [b.clone() for b in layer.buffers()]
    x = torch.randn(1, 3)
    expected = layer.eval()(x)
    assert torch.equal(layer.train()(x), expected)
    assert all(torch.equal(a, b) for a, b in zip(before, layer.buffers(), strict=True))


def test_a_small_batch_may_be_followed_by_another_before_its_backward():
    layer = BatchNorm(3, small_batch="running")
    x = torch.randn(1, 3, requires_grad=True)
    (layer(x).sum() + layer(torch.randn(4, 3)).sum()).backward()
    assert torch.equal(x.grad, torch.full((1, 3), (1 + layer.eps) ** -0.5))


def test_it_is_not_a_torch_batch_norm():
    """torch's converter would silently turn a subclass into plain SyncBatchNorm."""
    layer = BatchNorm(3)
    assert not isinstance(layer, nn.modules.batchnorm._BatchNorm)
    assert nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(layer))[0] is layer


@pytest.mark.parametrize("layer_type", [BatchNorm, BatchRenorm])
def test_a_batch_normalized_by_running_statistics_keeps_its_gradient_when_the_next_batch_moves_them(
    layer_type,
):
    layer = layer_type(3, small_batch="running", momentum=0.5)
    x = torch.randn(1, 3, requires_grad=True)
    y = layer(x)
    expected = (layer.weight / (layer.running_var + layer.eps).sqrt()).detach().expand_as(x).clone()
    layer(torch.randn(8, 3) * 9)
    y.sum().backward()
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("name", ["batch", "renorm", "full", "batch_layer", "batch_instance", "switchable"])
def test_reset_parameters_makes_a_layer_from_nothing_as_new(name):
    with torch.device("meta"):
        layer = NORMS[name](3)
    layer.to_empty(device="cpu")
    for tensor in (*layer.parameters(), *layer.buffers()):
        tensor.detach().fill_(7)
    layer.reset_parameters()
    fresh = NORMS[name](3).state_dict()
    assert all(torch.equal(value, fresh[key]) for key, value in layer.state_dict().items())
