"""RMSNorm, FilterResponseNorm and DynamicTanh: their own options, extremes and derivatives."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bnlight.norm import DynamicTanh, FilterResponseNorm, InstanceNorm, LayerNorm, RMSNorm, arrange
from bnlight.norm.layout import memory_layout

LAYERS = {
    "rms": lambda **o: RMSNorm(4, **o),
    "rms of the sample": lambda **o: RMSNorm(4, over="sample", **o),
    "frn": lambda **o: FilterResponseNorm(4, **o),
    "frn with all options": lambda **o: FilterResponseNorm(4, learn_eps=True, tlu=True, **o),
    "tanh": lambda **o: DynamicTanh(4, **o),
}
COMPILES = pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated:DeprecationWarning")


@pytest.fixture(params=LAYERS)
def make(request):
    return LAYERS[request.param]


def gradients(function, x: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = function(x)
    weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape).sin()
    return [y, *torch.autograd.grad((y * weights).sum(), [x, *parameters])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(6, 16), (3, 5, 16), (2, 3, 4, 16)], ids=str)
def test_rms_norm_with_channels_last_is_torchs(shape, dtype):
    mine, torchs = RMSNorm(16, channel_dim=-1, bias=False, dtype=dtype), nn.RMSNorm(16, dtype=dtype)
    nn.init.normal_(mine.weight)
    torchs.load_state_dict(mine.state_dict(), strict=True)
    x = torch.randn(shape, dtype=dtype) * 1e-3  # so small that eps matters
    found, expected = (gradients(layer, x, [layer.weight]) for layer in (mine, torchs))
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * theirs.abs().max().item())


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(0, 4),
    channels=st.integers(1, 6),
    space=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    scale=st.floats(1e-3, 1e3),
)
def test_any_shape_gives_mean_squares_of_one(n, channels, space, scale):
    x = (torch.rand(n, channels, *space, dtype=torch.float64) + 0.1) * scale
    axes = {
        RMSNorm(channels, eps=0, over="channels"): [1],
        RMSNorm(channels, eps=0, over="sample"): [*range(1, x.dim())],
        FilterResponseNorm(channels, eps=0): [*range(2, x.dim())],
    }
    for layer, over in axes.items():
        layer._warned = True  # one value is as good here
        y = layer(x)
        assert y.shape == x.shape
        torch.testing.assert_close(y.square().mean(over), torch.ones_like(x).mean(over))


@pytest.mark.parametrize("large", [1, arrange.LARGE], ids=["one by one", "at once"])
@pytest.mark.parametrize("shape", [(3, 8), (3, 8, 5), (3, 8, 5, 2)], ids=str)
def test_the_options_of_filter_response_norm_are_the_papers_formula(shape, large, monkeypatch):
    monkeypatch.setattr(arrange, "LARGE", large)
    layer = FilterResponseNorm(8, learn_eps=True, tlu=True, eps=0.01, dtype=torch.float64)
    assert layer.learned_eps.tolist() == pytest.approx([1e-4] * 8)
    assert layer.tau.tolist() == [0] * 8
    for parameter in layer.parameters():
        nn.init.normal_(parameter)

    def formula(x: Tensor) -> Tensor:
        view = (-1, *[1] * (x.dim() - 2))
        weight, bias, eps, tau = (p.view(view) for p in layer.parameters())
        nu2 = x.square().mean([*range(2, x.dim())], keepdim=True) if x.dim() > 2 else x.square()
        return torch.maximum(weight * x / (nu2 + 0.01 + eps.abs()).sqrt() + bias, tau)

    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias", "learned_eps", "tau"]
    x = torch.randn(shape, dtype=torch.float64)
    formats = [torch.contiguous_format, *([torch.channels_last] if len(shape) == 4 else [])]
    for memory_format in formats:
        z = x.contiguous(memory_format=memory_format)
        found, expected = (gradients(f, z, [*layer.parameters()]) for f in (layer, formula))
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs)
        assert memory_layout(found[0]) == memory_format


@pytest.mark.parametrize("shape", [(3, 8), (3, 8, 5), (3, 8, 5, 2)], ids=str)
@pytest.mark.parametrize("affine", [True, False])
def test_dynamic_tanh_is_its_formula_in_every_layout(shape, affine):
    layer = DynamicTanh(8, alpha=0.7, affine=affine, dtype=torch.float64)
    assert layer.alpha.item() == 0.7
    if affine:
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)

    def formula(x: Tensor) -> Tensor:
        view = (-1, *[1] * (x.dim() - 2))
        y = torch.tanh(layer.alpha * x)
        return layer.weight.view(view) * y + layer.bias.view(view) if affine else y

    x = torch.randn(shape, dtype=torch.float64)
    found, expected = (gradients(f, x, [*layer.parameters()]) for f in (layer, formula))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_parameters_can_be_reset_and_the_repr_shows_the_options():
    layers = [FilterResponseNorm(4, learn_eps=True, tlu=True), DynamicTanh(4, alpha=0.25, weight_init=2.0)]
    for layer in layers:
        fresh = {name: p.clone() for name, p in layer.named_parameters()}
        for parameter in layer.parameters():
            nn.init.normal_(parameter)
        layer.reset_parameters()
        assert all(torch.equal(p, fresh[name]) for name, p in layer.named_parameters())
    assert repr(layers[0]) == "FilterResponseNorm(4, learn_eps=True, tlu=True)"
    assert repr(layers[1]) == "DynamicTanh(4, alpha=0.25, weight_init=2.0)"
    assert repr(RMSNorm(4, over="sample")) == "RMSNorm(4, over='sample')"
    with pytest.raises(ValueError, match="over must be 'sample' or 'channels', got 'batch'"):
        RMSNorm(4, over="batch")


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("channel_dim", [1, -1])
def test_first_and_second_derivatives_are_those_of_the_output(make, channel_dim, masked):
    torch.manual_seed(0)
    layer = make(channel_dim=channel_dim, dtype=torch.float64)
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    parameters = dict(layer.named_parameters())
    x = torch.randn((2, 4, 3) if channel_dim == 1 else (2, 3, 4), dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, True, False], [True, False, True]]) if masked else None

    def function(x: Tensor, *values: Tensor) -> Tensor:
        named = dict(zip(parameters, values, strict=True))
        return torch.func.functional_call(layer, named, (x, mask))

    inputs = (x, *parameters.values())
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("value", [0.0, 1e-30, 3.0, -6e4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_constant_values_of_any_size_have_finite_outputs_and_gradients(make, dtype, value, masked):
    layer = make()
    x = torch.full((2, 4, 5), value, dtype=dtype, requires_grad=True)
    mask = torch.arange(5) < torch.tensor([[3], [0]]) if masked else None
    y = layer(x, mask)
    y.sum().backward()
    assert y.isfinite().all()
    assert all(p.grad.isfinite().all() for p in layer.parameters())
    assert x.grad.isfinite().all()
    if abs(value) > 1:
        valid = y[0, :, :3] if masked else y
        expected = 0.0 if getattr(layer, "tlu", False) and value < 0 else math.copysign(1, value)
        expected = math.tanh(value / 2) if isinstance(layer, DynamicTanh) else expected
        torch.testing.assert_close(valid, torch.full_like(valid, expected), atol=0.01, rtol=0)


@pytest.mark.parametrize("shape", [(0, 4), (0, 4, 3), (2, 4, 0), (0, 4, 3, 2)], ids=str)
def test_empty_input_has_empty_output_and_zero_gradients(make, shape):
    layer = make()
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape
    assert all((p.grad == 0).all() for p in layer.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ("layer", "shape", "advice"),
    [
        (FilterResponseNorm(4), (3, 4), "learn_eps=True"),
        (FilterResponseNorm(4), (3, 4, 1, 1), "learn_eps=True"),
        (RMSNorm(1), (3, 1, 5), "NoNorm"),
        (RMSNorm(1, over="sample"), (3, 1, 1), "NoNorm"),
    ],
    ids=repr,
)
def test_one_value_to_normalize_warns_once_that_only_its_sign_is_left(layer, shape, advice, recwarn):
    x = torch.randn(shape)
    with pytest.warns(UserWarning, match=rf"the output is weight \* sign\(x\) \+ bias\. .*{advice}"):
        y = layer(x)
    torch.testing.assert_close(y, x.sign(), atol=0.01, rtol=0)
    layer(x)
    assert not recwarn


def test_a_learned_eps_needs_no_warning_at_one_position_and_gets_a_gradient(recwarn):
    layer = FilterResponseNorm(4, learn_eps=True)
    layer(torch.randn(3, 4)).square().sum().backward()
    assert (layer.learned_eps.grad < 0).all()
    assert not recwarn


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mean", [0, 1000])
def test_large_half_precision_samples_are_normalized_with_float32_statistics(make, dtype, mean):
    """Large enough that the samples go one by one in channels last."""
    x = (torch.randn(2, 4, 72, 64) * 3 + mean).to(dtype)
    assert arrange.one_by_one(x)
    layer, exact = make(), make(dtype=torch.float64)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        y = layer(x.contiguous(memory_format=memory_format))
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), exact(x.double()), rtol=0.01, atol=0.02)


@pytest.mark.parametrize("layer", [InstanceNorm(8), LayerNorm(8, over="channels")], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_samples_far_from_zero_keep_their_variance_in_every_layout(layer, dtype):
    x = (torch.randn(2, 8, 64, 64) + (1000 if dtype == torch.float32 else 10)).to(dtype)
    assert arrange.one_by_one(x)
    exact = type(layer)(8, **({"over": "channels"} if isinstance(layer, LayerNorm) else {})).double()
    expected = exact(x.double())
    for memory_format in (torch.contiguous_format, torch.channels_last):
        y = layer(x.contiguous(memory_format=memory_format))
        torch.testing.assert_close(y.double(), expected, rtol=0.01, atol=0.02)


@COMPILES
def test_a_compiled_step_of_a_large_sample_has_the_same_numbers(make):
    torch._dynamo.reset()
    layer = make()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 4, 72, 64).contiguous(memory_format=torch.channels_last)
    found, expected = (gradients(f, x, [*layer.parameters()]) for f in (compiled, layer))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)
    assert found[0].stride() == x.stride()
