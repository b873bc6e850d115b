"""Virtual batches: group n mod K, in every layout, for every N, with one update of the running averages."""

from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bnlight.norm import BatchNorm, BatchRenorm, MeanOnlyBatchNorm, interleaved
from bnlight.norm.layout import memory_layout

LAYOUTS = ["contiguous", "channels_last", "last_axis", "strided"]
LAYERS = {
    "batch": lambda **o: BatchNorm(3, momentum=0.3, **o),
    "renorm": lambda **o: BatchRenorm(3, momentum=0.3, r_max=1.2, d_max=0.2, **o),
    "mean only": lambda **o: MeanOnlyBatchNorm(3, momentum=0.3, **o),
    "no affine": lambda **o: BatchNorm(3, affine=False, **o),
    "no running statistics": lambda **o: BatchNorm(3, track_running_stats=False, **o),
}


@pytest.fixture(scope="module", params=["groups", "samples"], autouse=True)
def way(request):
    """In channels last a group is copied if its samples are small, as here; otherwise each is taken as it lies."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "samples":
            patch.setattr(interleaved, "LARGE", 0)
        yield


def by_loop(layer: nn.Module, x: Tensor, groups: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The layer on each x[k::K] from the same averages; their buffers averaged as the layer averages them."""
    y, ends = torch.empty_like(x), []
    for k in range(groups):
        copy = deepcopy(layer)
        copy.weight, copy.bias = layer.weight, layer.bias
        y[k::groups] = copy(x[k::groups])
        ends.append(dict(copy.named_buffers()))
    average = {}
    for name in ends[0]:
        values = torch.stack([end[name] for end in ends]).double()
        if name == "running_var" and isinstance(layer, BatchRenorm):
            average[name] = (values + layer.eps).sqrt().mean(0).square() - layer.eps
        else:
            average[name] = values.mean(0)
    return y, average


def assert_equals_loop(make, x: Tensor, size: int, layout: str) -> None:
    channel_dim = -1 if layout == "last_axis" else 1
    grouped = make(virtual_batch_size=size, channel_dim=channel_dim).double()
    plain = make().double()
    for parameter, other in zip(grouped.parameters(), plain.parameters(), strict=True):
        nn.init.normal_(parameter)
        other.data.copy_(parameter.data)
    reference = x.clone().requires_grad_()
    expected, averages = by_loop(plain, reference, max(1, len(x) // size))
    weights = torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view(x.shape).sin()
    (expected * weights).sum().backward()

    z = x.clone()
    if layout == "channels_last" and x.dim() == 4:
        z = z.contiguous(memory_format=torch.channels_last)
    elif layout == "last_axis":
        z = z.movedim(1, -1).contiguous()
    elif layout == "strided":
        z = z.repeat_interleave(2, dim=-1)[..., ::2]
    z.requires_grad_()
    y = grouped(z)
    if layout != "strided":
        assert memory_layout(y) == memory_layout(z)
    y, z_grad = (
        (y.movedim(-1, 1), lambda: z.grad.movedim(-1, 1)) if channel_dim == -1 else (y, lambda: z.grad)
    )
    (y * weights).sum().backward()
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(z_grad(), reference.grad)
    for mine, theirs in zip(grouped.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
    for name, buffer in grouped.named_buffers():
        torch.testing.assert_close(buffer.double(), averages[name])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("n", "size"), [(8, 2), (8, 8), (8, 99), (9, 2), (11, 4), (5, 2), (33, 32)])
@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_groups_are_the_layer_on_every_kth_sample(make, n, size, layout):
    assert_equals_loop(make, torch.randn(n, 3, 4, 2, dtype=torch.float64) * 2 + 1, size, layout)


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(2, 12),
    size=st.integers(2, 6),
    space=st.lists(st.integers(1, 3), max_size=3),
    layout=st.sampled_from(LAYOUTS),
    make=st.sampled_from([*LAYERS.values()]),
)
def test_any_shape_equals_the_loop(n, size, space, layout, make):
    assert_equals_loop(make, torch.randn(n, 3, *space, dtype=torch.float64), size, layout)


def test_groups_of_one_sample_are_instance_norm():
    x = torch.randn(6, 3, 4, 4)
    y = BatchNorm(3, virtual_batch_size=1)(x)
    torch.testing.assert_close(y, nn.functional.instance_norm(x), rtol=1e-4, atol=1e-5)


def test_evaluation_ignores_them():
    x = torch.randn(8, 3)
    layer = BatchNorm(3, virtual_batch_size=2).eval()
    assert torch.equal(layer(x), BatchNorm(3).eval()(x))


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 4), (4, 3, 0)], ids=str)
@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_an_empty_batch_changes_no_average(make, shape):
    layer = make(virtual_batch_size=2)
    before = [b.clone() for b in layer.buffers()]
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == x.shape
    for old, new in zip(before, layer.buffers(), strict=True):
        assert torch.equal(new, old + 1 if old.dtype == torch.long else old)
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in layer.parameters())


@pytest.mark.parametrize("layer_type", [BatchNorm, BatchRenorm])
def test_groups_of_one_value_use_the_running_statistics_if_told_to(layer_type):
    layer = layer_type(3, virtual_batch_size=1, small_batch="running")
    x = torch.randn(5, 3)
    assert torch.equal(layer(x), layer.eval()(x))
    assert layer.num_batches_tracked == 0


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_half_precision_in_channels_last_is_double_precision_rounded(make):
    x = (torch.randn(8, 3, 5, 4) * 2 + 1).bfloat16().contiguous(memory_format=torch.channels_last)
    dy = torch.randn(8, 3, 5, 4).bfloat16()
    layer, exact = make(virtual_batch_size=2), make(virtual_batch_size=2).double()
    results = []
    for each, dtype in ((layer, torch.bfloat16), (exact, torch.float64)):
        z = x.to(dtype).detach().requires_grad_()
        y = each(z)
        y.backward(dy.to(dtype))
        results.append([y, z.grad, *(p.grad for p in each.parameters())])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=2e-2, atol=3e-2)
    for mine, theirs in zip(layer.buffers(), exact.buffers(), strict=True):
        torch.testing.assert_close(mine.double(), theirs.double(), rtol=1e-5, atol=1e-5)
