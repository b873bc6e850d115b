"""The layers of one sample are torch's or their formula, in every layout; NoNorm is nothing."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bnlight.norm import FilterResponseNorm, GroupNorm, InstanceNorm, LayerNorm, NoNorm, RMSNorm, arrange
from bnlight.norm.layout import memory_layout

SHAPES = [(6, 8), (3, 8, 5), (3, 8, 5, 2), (2, 8, 3, 2, 2)]
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def channels_norm(x: Tensor, w: Tensor | None, b: Tensor | None, eps: float) -> Tensor:
    return F.layer_norm(x.movedim(1, -1), (x.size(1),), w, b, eps).movedim(-1, 1)


def affine(x: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
    view = (-1, *[1] * (x.dim() - 2))
    return x * (1 if w is None else w.view(view)) + (0 if b is None else b.view(view))


def divided(axes):
    """The formula of the layers that divide by the root mean square over `axes(x)`."""
    return lambda x, w, b, eps: affine(x / (x.square().mean(axes(x), keepdim=True) + eps).sqrt(), w, b)


CASES = {
    "layer": (lambda **o: LayerNorm(8, **o), lambda x, w, b, eps: F.group_norm(x, 1, w, b, eps)),
    "channels": (lambda **o: LayerNorm(8, over="channels", **o), channels_norm),
    "group": (
        lambda **o: GroupNorm(8, num_groups=4, **o),
        lambda x, w, b, eps: F.group_norm(x, 4, w, b, eps),
    ),
    "wide group": (
        lambda **o: GroupNorm(8, num_groups=1, **o),
        lambda x, w, b, eps: F.group_norm(x, 1, w, b, eps),
    ),
    "instance": (
        lambda **o: InstanceNorm(8, **o),
        lambda x, w, b, eps: F.instance_norm(x, weight=w, bias=b, eps=eps),
    ),
    "rms": (lambda **o: RMSNorm(8, **o), divided(lambda x: [1])),
    "rms of the sample": (
        lambda **o: RMSNorm(8, over="sample", **o),
        divided(lambda x: [*range(1, x.dim())]),
    ),
    "frn": (lambda **o: FilterResponseNorm(8, **o), divided(lambda x: [*range(2, x.dim())])),
}


def step(function, x: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = function(x)
    weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape).sin()
    return [y, *torch.autograd.grad((y * weights).sum(), [x, *parameters])]


def assert_close(found: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    tolerance = {torch.float64: 1e-9, torch.float32: 2e-4}[dtype]
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, {"eps": 0.1}, {"affine": False}, {"bias": False}], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("large", [1, arrange.LARGE], ids=["one by one", "at once"])
@pytest.mark.parametrize(("make", "reference"), CASES.values(), ids=CASES)
def test_output_and_gradients_are_torchs_in_every_layout(
    make, reference, large, shape, options, dtype, monkeypatch
):
    monkeypatch.setattr(arrange, "LARGE", large)
    layer, last = make(dtype=dtype, **options), make(dtype=dtype, channel_dim=-1, **options)
    if len(shape) == 2 and isinstance(layer, InstanceNorm | FilterResponseNorm):
        return
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    last.load_state_dict(layer.state_dict())
    parameters = [*layer.parameters()]
    x = torch.randn(shape, dtype=dtype) * 3 + 1
    expected = step(lambda z: reference(z, layer.weight, layer.bias, layer.eps), x, parameters)

    for training in (True, False):
        assert_close(step(layer.train(training), x, parameters), expected, dtype)
    assert layer(x).is_contiguous()
    for z in (
        x.contiguous(memory_format=FORMATS.get(len(shape), torch.contiguous_format)),
        x.repeat_interleave(2, dim=-1)[..., ::2],
    ):
        assert_close(step(layer, z, parameters), expected, dtype)
        assert memory_layout(layer(z)) == (memory_layout(z) or torch.contiguous_format)

    z = x.movedim(1, -1).contiguous()
    assert last(z).is_contiguous()
    found = step(lambda t: last(t.movedim(1, -1)).movedim(-1, 1), z.movedim(-1, 1), [*last.parameters()])
    assert_close(found, expected, dtype)


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(0, 4),
    groups=st.integers(1, 4),
    width=st.integers(2, 4),
    space=st.lists(st.integers(1, 3), max_size=3),
)
def test_group_norm_of_any_shape_is_torchs(n, groups, width, space):
    x = torch.randn(n, groups * width, *space, dtype=torch.float64)
    y = GroupNorm(groups * width, num_groups=groups, dtype=torch.float64)(x)
    torch.testing.assert_close(y, torch.group_norm(x, groups))


@pytest.mark.parametrize(
    ("channels", "groups"),
    [(1, 1), (3, 1), (4, 1), (7, 1), (8, 2), (10, 2), (64, 16), (96, 24), (128, 32), (512, 32)],
)
def test_the_default_number_of_groups_is_the_largest_divisor_up_to_32_with_four_channels_each(
    channels, groups
):
    assert GroupNorm(channels).num_groups == groups


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (GroupNorm(4, num_groups=4), (3, 4)),
        (GroupNorm(4, num_groups=4), (1, 4, 1, 1)),
        (InstanceNorm(4), (3, 4, 1, 1)),
        (LayerNorm(1), (3, 1)),
        (LayerNorm(1), (3, 1, 1)),
        (LayerNorm(1, over="channels"), (3, 1, 5)),
    ],
    ids=repr,
)
def test_groups_of_one_value_warn_once_instead_of_silently_giving_zeros(layer, shape, recwarn):
    x = torch.randn(shape)
    with pytest.warns(UserWarning, match=r"each group has one value"):
        y = layer(x)
    torch.testing.assert_close(y, torch.zeros(shape), atol=1e-3, rtol=0)
    layer(x)
    assert not recwarn


def test_the_default_groups_of_a_contiguous_and_a_channels_last_tensor_agree_far_from_zero():
    """torch's channels-last kernel loses the variance there: E[x^2] - E[x]^2."""
    x = torch.randn(4, 64, 8, 8) + 1000
    for layer in (GroupNorm(64), GroupNorm(64, num_groups=4), LayerNorm(64), InstanceNorm(64)):
        y = layer(x.contiguous(memory_format=torch.channels_last))
        torch.testing.assert_close(y, layer(x), rtol=1e-3, atol=1e-3)
        assert y.std().item() == pytest.approx(1, abs=0.02)


def test_no_norm_is_the_identity_without_parameters_and_an_affine_map_with_them():
    x = torch.randn(3, 4, 5)
    assert torch.equal(NoNorm(4)(x), x)
    assert NoNorm(4)(x).data_ptr() != x.data_ptr()  # an activation in place leaves x as it is
    assert not [*NoNorm(4).parameters()]
    layer = NoNorm(4, affine=True)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    torch.testing.assert_close(layer(x), x * layer.weight.view(-1, 1) + layer.bias.view(-1, 1))
