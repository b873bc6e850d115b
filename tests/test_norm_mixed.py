"""Batch-instance, batch layer and switchable normalization: formulas by autograd, masks, virtual batches, modes."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import bnlight
from bnlight.norm import (
    BatchInstanceNorm,
    BatchLayerNorm,
    BatchNorm,
    InstanceNorm,
    LayerNorm,
    Norm,
    SwitchableNorm,
)

MAKE = {
    "batch_instance": lambda **o: BatchInstanceNorm(4, momentum=0.3, **o),
    "batch_layer": lambda **o: BatchLayerNorm(4, momentum=0.3, **o),
    "unscaled": lambda **o: BatchLayerNorm(4, momentum=0.3, scaled=False, **o),
    "per position": lambda **o: BatchLayerNorm(4, momentum=0.3, spatial=False, **o),
    "switchable": lambda **o: SwitchableNorm(4, momentum=0.3, **o),
}


def standardized(x: Tensor, axes: list[int], eps: float) -> Tensor:
    return (x - x.mean(axes, keepdim=True)) / (x.var(axes, keepdim=True, correction=0) + eps).sqrt()


def formula(layer: Norm, x: Tensor) -> Tensor:
    """The layer in training on one batch, as its paper writes it, differentiated by autograd."""
    positions, eps = [*range(2, x.dim())], layer.eps
    shape = [1, -1, *[1] * (x.dim() - 2)]
    weight, bias = layer.weight.view(shape), layer.bias.view(shape)
    if isinstance(layer, BatchInstanceNorm):
        rho = layer.rho.view(shape)
        mixed = rho * standardized(x, [0, *positions], eps) + (1 - rho) * standardized(x, positions, eps)
        return mixed * weight + bias
    if isinstance(layer, BatchLayerNorm):
        b = len(x)
        batch = standardized(x, [0, *positions] if layer.spatial else [0], eps)
        mixed = batch * (1 - 1 / b - 1e-4) + standardized(x, [1], eps) * (1 / b - 1e-4)
        return mixed * (0.5 if layer.scaled else 1.0) * weight + bias
    axes = [positions, [1, *positions], [0, *positions]]
    zero = 0 * x
    p, q = layer.mean_weight.softmax(0), layer.var_weight.softmax(0)
    mean = sum(p[k] * (x.mean(a, keepdim=True) if a else x) + zero for k, a in enumerate(axes))
    var = sum(q[k] * (x.var(a, keepdim=True, correction=0) if a else zero) + zero for k, a in enumerate(axes))
    return (x - mean) / (var + eps).sqrt() * weight + bias


def randomized(layer: Norm) -> Norm:
    layer = layer.double()
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, 0.2, 0.9)
    return layer


def gradients(layer: Norm, x: Tensor, y: Tensor, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad((y * loss).sum(), [x, *layer.parameters()]))


def compare(layer: Norm, x: Tensor, y: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    loss = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape).sin()
    for mine, theirs in zip(gradients(layer, x, y, loss), gradients(layer, x, expected, loss), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "last_axis"])
@pytest.mark.parametrize("name", MAKE)
@settings(max_examples=12, deadline=None)
@given(n=st.integers(2, 5), h=st.integers(1, 4), w=st.integers(2, 4), seed=st.integers(0, 999))
def test_outputs_and_gradients_are_the_formulas(name, layout, n, h, w, seed):
    torch.manual_seed(seed)
    x = torch.randn(n, 4, h, w, dtype=torch.float64) * 3 + 5
    if layout == "last_axis":
        layer = randomized(MAKE[name](channel_dim=-1))
        x.requires_grad_()
        y = layer(x.movedim(1, -1)).movedim(-1, 1)
    else:
        layer = randomized(MAKE[name]())
        x = x.contiguous(
            memory_format=getattr(torch, f"{layout}_format", torch.channels_last)
        ).requires_grad_()
        y = layer(x)
        assert y.stride() == x.stride()
    compare(layer, x, y, formula(layer, x))


@pytest.mark.parametrize("name", ["batch_layer", "unscaled", "switchable"])
def test_inputs_without_positions_work_too(name):
    torch.manual_seed(0)
    layer = randomized(MAKE[name]())
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    compare(layer, x, layer(x), formula(layer, x))


@pytest.mark.parametrize("name", list(MAKE))
@pytest.mark.parametrize("samples", [6, 7])
def test_virtual_batches_are_the_layer_on_every_kth_sample(name, samples):
    torch.manual_seed(0)
    layer = randomized(MAKE[name](virtual_batch_size=2))
    x = torch.randn(samples, 4, 3, 2, dtype=torch.float64, requires_grad=True)
    expected = torch.empty_like(x)
    parts = [formula(layer, x[k::3]) for k in range(3)]
    expected = torch.stack([parts[n % 3][n // 3] for n in range(samples)])
    compare(layer, x, layer(x), expected)


@pytest.mark.parametrize("name", ["batch_instance", "batch_layer", "switchable"])
def test_running_statistics_are_batch_norms_and_evaluation_uses_them(name):
    torch.manual_seed(0)
    layer, batch = randomized(MAKE[name]()), nn.BatchNorm2d(4, momentum=0.3).double()
    for _ in range(3):
        x = torch.randn(5, 4, 3, 2, dtype=torch.float64) + 2
        layer(x)
        batch(x)
    torch.testing.assert_close(layer.running_mean, batch.running_mean)
    torch.testing.assert_close(layer.running_var, batch.running_var)
    layer.eval()
    x = torch.randn(3, 4, 3, 2, dtype=torch.float64)
    assert torch.equal(layer(x)[:1], layer(x[:1]))  # no dependence on batch mates
    mean, var = (v.view(4, 1, 1) for v in (layer.running_mean, layer.running_var))
    weight, bias = layer.weight.view(4, 1, 1), layer.bias.view(4, 1, 1)
    batch_part = (x - mean) / (var + layer.eps).sqrt()
    if name == "batch_instance":
        rho = layer.rho.view(4, 1, 1)
        expected = (rho * batch_part + (1 - rho) * standardized(x, [2, 3], layer.eps)) * weight + bias
    elif name == "batch_layer":
        assert layer.batch_size == 5
        mixed = batch_part * (1 - 1 / 5 - 1e-4) + standardized(x, [1], layer.eps) * (1 / 5 - 1e-4)
        expected = mixed / 2 * weight + bias
    else:
        p, q = layer.mean_weight.softmax(0), layer.var_weight.softmax(0)
        m = p[0] * x.mean((2, 3), True) + p[1] * x.mean((1, 2, 3), True) + p[2] * mean
        v = q[0] * x.var((2, 3), correction=0, keepdim=True) + q[2] * var
        v = v + q[1] * x.var((1, 2, 3), correction=0, keepdim=True)
        expected = (x - m) / (v + layer.eps).sqrt() * weight + bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-9, atol=1e-9)


def test_the_ends_of_the_mixtures_are_the_norms_they_mix():
    torch.manual_seed(0)
    x = torch.randn(5, 4, 3, 2, dtype=torch.float64)
    bin_layer = BatchInstanceNorm(4).double()
    torch.testing.assert_close(bin_layer(x), BatchNorm(4).double()(x))
    nn.init.zeros_(bin_layer.rho)
    torch.testing.assert_close(bin_layer(x), InstanceNorm(4).double()(x))
    switchable = SwitchableNorm(4).double()
    for k, other in enumerate((InstanceNorm(4), LayerNorm(4), BatchNorm(4))):
        for shares in (switchable.mean_weight, switchable.var_weight):
            nn.init.zeros_(shares)
            shares.data[k] = 100.0
        torch.testing.assert_close(switchable(x), other.double()(x))


def test_rho_is_used_clamped_comes_back_and_is_clipped_by_constrain_norm():
    layer = BatchInstanceNorm(2).double()
    nn.init.constant_(layer.rho, 1.7)
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    torch.testing.assert_close(layer(x), BatchNorm(2).double()(x))
    (layer(x) * torch.randn_like(x)).sum().backward()
    assert (layer.rho.grad != 0).all()
    bnlight.constrain_norm(layer)
    assert torch.equal(layer.rho, torch.ones_like(layer.rho))
    layer.reset_parameters()
    assert torch.equal(layer.rho, torch.ones_like(layer.rho))


def test_batch_instance_norm_refuses_inputs_without_positions():
    with pytest.raises(ValueError, match=r"expected input with positions.*\(3, 4\).*SwitchableNorm"):
        BatchInstanceNorm(4)(torch.randn(3, 4))


def test_batch_layer_norm_of_one_sample_is_layer_norm_and_of_a_loaded_batch_norm_is_batch_norm():
    layer = BatchLayerNorm(4, scaled=False)
    x = torch.randn(1, 4)
    expected = standardized(x, [1], 1e-3) * (1 - 1e-4)
    torch.testing.assert_close(layer(x), expected)
    loaded = BatchLayerNorm(4, scaled=False, eps=1e-5)
    torchs = nn.BatchNorm1d(4)
    torchs(torch.randn(8, 4) + 3)
    loaded.load_state_dict(torchs.state_dict(), strict=True)
    x = torch.randn(5, 4) + 3
    difference = loaded.eval()(x) - torchs.eval()(x)
    assert difference.abs().max() < 1e-3  # the weights sum to 0.9998


def test_per_position_statistics_have_the_shape_of_the_positions_and_survive_a_state_dict():
    layer = randomized(MAKE["per position"]())
    x = torch.randn(5, 4, 3, 2, dtype=torch.float64)
    layer(x)
    assert layer.running_mean.shape == layer.running_var.shape == (4, 3, 2)
    torch.testing.assert_close(layer.running_mean, 0.3 * x.mean(0))
    fresh = MAKE["per position"]().double()
    fresh.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(fresh.eval()(x), layer.eval()(x))
    pooled = MAKE["batch_layer"]()
    with pytest.raises(RuntimeError, match="size mismatch"):
        pooled.load_state_dict(layer.state_dict())
    with pytest.raises(ValueError, match=r"expected positions \(3, 2\).*got \(2, 2\).*spatial=True"):
        layer(torch.randn(5, 4, 2, 2, dtype=torch.float64))


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_far_from_zero_keep_their_variance(name, dtype):
    torch.manual_seed(0)
    layer = MAKE[name]()
    x = (torch.randn(8, 4, 8, 8) * 4 + 200).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    assert layer.running_var.dtype == torch.float32
    expected = copy.deepcopy(layer).double().train()
    torch.testing.assert_close(y.double(), formula(expected, x.double()), rtol=2e-2, atol=3e-2)


@pytest.mark.parametrize("name", ["batch_instance", "switchable"])
def test_a_batch_too_small_may_come_before_another_in_one_backward(name):
    layer = MAKE[name](small_batch="running", virtual_batch_size=None)
    x = torch.randn(8, 4, 1)
    if name == "batch_instance":
        x = torch.randn(8, 4, 2)
    first, second = (
        layer(x[:1, :, :1].expand(1, 4, x.size(2)) if name == "batch_instance" else x[:1]),
        layer(x),
    )
    (first.sum() + second.sum()).backward()
