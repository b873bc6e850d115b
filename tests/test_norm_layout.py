"""Axes of size 1 and odd strides: what a layer computes depends on no memory layout, its gradients' neither."""

import copy
import inspect
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from norm_table import CHANNELS, ROWS, TRAINING, Row
from ranks import start
from torch import Tensor, nn

from bnlight import sync_norm
from bnlight.norm import NORMS, DynamicTanh, FilterResponseNorm, GroupNorm, LayerNorm, RMSNorm
from bnlight.norm.layout import memory_layout

SHAPES = [
    (1, CHANNELS, 5),
    (1, CHANNELS, 2, 3),
    (3, CHANNELS, 1, 4),
    (3, CHANNELS, 4, 1),
    (3, CHANNELS, 1, 1),
    (1, CHANNELS, 2, 1, 3),
]


def stored(x: Tensor, order: list[int], stride_of_one: int | None) -> Tensor:
    """`x` with its axes in this order in memory, and this stride where the size is 1."""
    y = x.permute(order).contiguous().permute([order.index(axis) for axis in range(x.dim())])
    if stride_of_one is None:
        return y
    return y.as_strided(
        y.shape, [stride_of_one if n == 1 else step for n, step in zip(y.shape, y.stride(), strict=True)]
    )


def layouts(x: Tensor) -> Iterator[Tensor]:
    """The same values in many memory layouts."""
    axes = [*range(x.dim())]
    for order in (axes, [0, *axes[2:], 1]):
        for stride_of_one in (None, 1, 7):
            yield stored(x, order, stride_of_one)
    yield stored(x, axes[::-1], None)
    apart = torch.zeros([2 * size for size in x.shape], dtype=x.dtype)[tuple(slice(0, None, 2) for _ in axes)]
    yield apart.copy_(x)


def step(row: Row, formula: bool, training: bool, x: Tensor, dy: Tensor, options: dict) -> list[Tensor]:
    """Output and gradients of a new layer, or of its formula."""
    torch.manual_seed(0)
    layer, x = row.make(x.dtype, **options).train(training), x.detach().requires_grad_()
    if formula:
        last = layer.channel_dim == -1
        z = x.movedim(-1, 1) if last else x
        y = row.formula(layer, z.flatten(2).contiguous()).view(z.shape)
        y = y.movedim(1, -1) if last else y
    else:
        y = layer(x)
    y.backward(dy)
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters())]


@pytest.mark.parametrize("training", TRAINING)
@pytest.mark.parametrize("name", [name for name in ROWS if "no " not in name and "cumulative" not in name])
def test_results_and_gradients_are_the_formulas_whatever_the_strides_are(name, training):
    row = ROWS[name]
    wrong = []
    for shape in [s for s in SHAPES if not row.needs_positions or math.prod(s[2:]) > 1]:
        for last in (False, True):
            if row.by_position and last:
                continue  # all its positions are on one axis there
            shape = (shape[0], *shape[2:], CHANNELS) if last else shape
            generator = torch.Generator().manual_seed(0)
            x, dy = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
            options = {"channel_dim": -1 if last else 1}
            if "small_batch" in inspect.signature(row.layer).parameters and row.options.get(
                "track_running_stats", True
            ):
                options["small_batch"] = "running"
            constant = dy.sum() / dy.numel()
            pairs = [(each, dy) for each in layouts(x)] + [(x, each) for each in layouts(dy)]
            pairs += [(stored(x, [0, *range(2, x.dim()), 1], None), each) for each in layouts(dy)]
            pairs += [
                (each, constant.expand(shape)) for each in (x, stored(x, [0, *range(2, x.dim()), 1], 1))
            ]
            expected = (
                step(row, True, training, x, dy, options),
                step(row, True, training, x, constant.expand(shape), options),
            )
            for z, gradient in pairs:
                found = step(row, False, training, z, gradient, options)
                known = expected[gradient.stride() == (0,) * gradient.dim()]
                for what, a, b in zip(("y", "dx", "dp", "dp", "dp", "dp"), found, known, strict=False):
                    if not torch.allclose(a, b, rtol=1e-6, atol=1e-7):
                        wrong.append((what, shape, z.stride(), gradient.stride()))
    assert not wrong, f"{len(wrong)}, the first: {wrong[:5]}"


@pytest.mark.parametrize("name", ["batch", "rms"])
def test_compiled_layers_have_the_gradient_of_their_formula_whatever_the_strides_are(name):
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn((3, CHANNELS, 1, 4), generator=generator, dtype=torch.float64) for _ in range(2))
    y, *gradients = step(ROWS[name], True, True, x, dy, {})
    torch._dynamo.reset()
    layer = torch.compile(ROWS[name].make(x.dtype), backend="eager")
    for z, dz in [(each, dy) for each in layouts(x)] + [(x, each) for each in layouts(dy)]:
        layer.zero_grad()
        z = z.detach().requires_grad_()
        found = layer(z)
        found.backward(dz)
        torch.testing.assert_close(
            [found.detach(), z.grad, *(p.grad for p in layer.parameters())], [y, *gradients]
        )


def test_a_norm_before_attention_and_before_a_recurrent_net_has_the_gradient_of_its_formula():
    torch.manual_seed(0)
    attention, lstm = nn.MultiheadAttention(16, 2, batch_first=True), nn.LSTM(16, 4)

    def before_attention(y: Tensor) -> Tensor:
        tokens = y.flatten(2).transpose(1, 2)
        return attention(tokens, tokens, tokens)[0]

    def before_lstm(y: Tensor) -> Tensor:
        return lstm(y.transpose(0, 1))[0]

    def rms(x: Tensor, axis: int, eps: float) -> Tensor:
        return x / (x.square().mean(axis, keepdim=True) + eps).sqrt()

    image, series = (1, 16, 9, 9), (8, 50, 16)
    for shape, layer, formula, user in (
        (image, RMSNorm(16), lambda x: rms(x, 1, 1.2e-7), before_attention),
        (image, DynamicTanh(16), lambda x: torch.tanh(x / 2), before_attention),
        (
            series,
            FilterResponseNorm(16, channel_dim=-1),
            lambda x: rms(x, 1, 1e-6),
            lambda y: lstm(y.transpose(0, 1))[0],
        ),
    ):
        found = []
        for norm in (layer, formula):
            x = (
                torch.linspace(-1, 2, 6400)[: torch.Size(shape).numel()]
                .mul(99)
                .sin()
                .view(shape)
                .requires_grad_()
            )
            (user(norm(x)) ** 3).sum().backward()
            found.append(x.grad)
        torch.testing.assert_close(*found, rtol=1e-3, atol=1e-6)


@pytest.mark.filterwarnings(
    "ignore:.*Function.* should not be instantiated:DeprecationWarning"
)  # of torch.compile
@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize(
    ("dtype", "compiled"), [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)]
)
def test_every_layer_takes_views_of_one_image(name, dtype, compiled):
    hwc = torch.randn(9, 7, CHANNELS, dtype=dtype)
    view, plain = (
        hwc.permute(2, 0, 1)[None],
        hwc.permute(2, 0, 1)[None].clone(memory_format=torch.contiguous_format),
    )
    layer = ROWS[name].make(torch.float32)
    other = copy.deepcopy(layer)
    if compiled:
        torch.compiler.reset()
        layer.compile(backend="aot_eager")
    torch.manual_seed(1)
    y = layer(view)
    assert compiled or memory_layout(y) is torch.channels_last  # a compiler chooses its own
    torch.manual_seed(1)
    torch.testing.assert_close(y.contiguous(), other(plain), rtol=0.02, atol=0.02)
    if not compiled:
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(view).shape == view.shape


def test_group_and_layer_norm_of_a_view_are_torchs():
    view = torch.randn(9, 7, 6).permute(2, 0, 1)[None]
    torch.testing.assert_close(GroupNorm(6, num_groups=2)(view), F.group_norm(view.contiguous(), 2))
    torch.testing.assert_close(LayerNorm(6)(view), F.group_norm(view.contiguous(), 1))


def gradients(layer: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    sync_norm(layer)
    rank = dist.get_rank()
    found = []
    for gradient in layouts(dy[rank : rank + 1]):
        own = x[rank : rank + 1].clone().requires_grad_()
        layer(own).backward(gradient)
        found.append(own.grad)
    return found


def test_synchronized_ranks_with_one_image_each_have_the_gradient_of_the_joined_batch(tmp_path: Path):
    torch.manual_seed(0)
    x, dy = torch.randn(2, 2, CHANNELS, 5, 3, dtype=torch.float64)
    with start(2, tmp_path) as ranks:
        for layer in (nn.BatchNorm2d(CHANNELS).double(), ROWS["batch"].make(), ROWS["switchable"].make()):
            whole = x.clone().requires_grad_()
            copy.deepcopy(layer)(whole).backward(dy)
            for rank, found in enumerate(ranks.run(gradients, layer, x, dy)):
                for dx in found:
                    torch.testing.assert_close(dx, whole.grad[rank : rank + 1])
