"""Statistics keep full precision whatever the module, the input and autocast are; large means keep variance."""

import pytest
import torch
from torch import nn

from bnlight.norm import NORMS, BatchNorm, BatchRenorm

HALF = [torch.bfloat16, torch.float16]
BATCH = [BatchNorm, BatchRenorm]
CONVERSIONS = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "to dtype": lambda m: m.to(torch.bfloat16),
    "to device and dtype": lambda m: m.to("cpu", torch.float16),
    "inside a model": lambda m: nn.Sequential(m).bfloat16()[0],
    "double and back": lambda m: m.double().half(),
}


@pytest.mark.parametrize("convert", CONVERSIONS.values(), ids=CONVERSIONS)
@pytest.mark.parametrize("layer_type", BATCH)
def test_buffers_stay_float32_and_keep_their_values_in_a_half_precision_module(layer_type, convert):
    layer = layer_type(4)
    layer.running_mean.fill_(1.0001)
    layer.running_var.fill_(3.14159265)
    expected = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    convert(layer)
    assert layer.weight.dtype == layer.bias.dtype != torch.float32
    for name, buffer in layer.named_buffers():
        assert buffer.dtype == expected[name].dtype
        assert torch.equal(buffer, expected[name])


@pytest.mark.parametrize("layer_type", BATCH)
def test_buffers_follow_double_and_moves_and_are_float32_from_a_half_precision_constructor(layer_type):
    assert layer_type(4).double().running_mean.dtype == torch.float64
    assert layer_type(4, dtype=torch.float64).running_var.dtype == torch.float64
    assert layer_type(4, dtype=torch.bfloat16).running_var.dtype == torch.float32
    on_meta = layer_type(4, device="meta").bfloat16()
    assert on_meta.running_mean.is_meta
    assert on_meta.running_mean.dtype == torch.float32
    assert on_meta.to_empty(device="cpu").running_mean.dtype == torch.float32


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("options", [{}, {"virtual_batch_size": 4}], ids=str)
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("layer_type", BATCH)
def test_half_precision_input_moves_the_averages_as_float32_input_does(
    layer_type, dtype, options, channels_last
):
    """At momentum 0.01 an average in bfloat16 would stop at 7 of 10."""
    half, full = layer_type(4, momentum=0.01, **options).to(dtype), layer_type(4, momentum=0.01, **options)
    for _ in range(50):
        x = (torch.randn(9, 4, 5, 3) + 10).to(dtype)
        x = x.to(memory_format=torch.channels_last) if channels_last else x
        y = half(x)
        assert y.dtype == dtype
        full(x.float())
    for name, buffer in half.named_buffers():
        torch.testing.assert_close(buffer, dict(full.named_buffers())[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layer_type", BATCH)
def test_float64_input_has_float64_statistics_also_in_a_float32_layer(layer_type):
    x = torch.randn(6, 4, 5, dtype=torch.float64) + 1e8
    layer = layer_type(4, momentum=1.0)
    y = layer(x) if layer_type is BatchNorm else layer.eval()(x)
    assert y.dtype == torch.float64
    if layer_type is BatchNorm:
        torch.testing.assert_close(y.var((0, 2), correction=0), torch.ones(4).double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("mean", [0.0, 3.0, 30.0, 1000.0])
@pytest.mark.parametrize("name", sorted({*NORMS} - {"none"}))
def test_large_means_keep_their_variance(name, mean, channels_last, masked):
    """Beside a channel around zero, so that no shortcut may look at one channel only."""
    x = torch.randn(16, 64, 8, 8) + mean
    if name in ("batch", "renorm", "instance"):
        x[:, 0] -= mean
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    mask = torch.ones(16, 8, 8, dtype=torch.bool) if masked else None
    layer, exact = NORMS[name](64), NORMS[name](64).double()
    if name == "renorm":
        for module in (layer, exact):
            module.r_max.fill_(1)
            module.d_max.fill_(0)
    y, expected = layer(x, mask), exact(x.double(), None if mask is None else mask)
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=1e-5 + 3e-6 * mean)
    for found, wanted in zip(layer.buffers(), exact.buffers(), strict=True):
        torch.testing.assert_close(found.double(), wanted.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layer_type", BATCH)
@pytest.mark.parametrize(
    ("module_dtype", "input_dtype"), [(torch.float32, torch.float64), (torch.float64, torch.float32)]
)
def test_float32_and_float64_mix_in_training_as_in_evaluation(layer_type, module_dtype, input_dtype):
    layer, exact = layer_type(4, dtype=module_dtype), layer_type(4, dtype=torch.float64)
    for _ in range(3):
        x = torch.randn(8, 4, 3, 3, dtype=torch.float64) * 2 + 1
        y = layer(x.to(input_dtype))
        assert y.dtype == input_dtype
        torch.testing.assert_close(y.double(), exact(x), rtol=1e-4, atol=1e-5)
    for found, wanted in zip(layer.buffers(), exact.buffers(), strict=True):
        assert found.dtype == (module_dtype if found.is_floating_point() else torch.long)
        torch.testing.assert_close(found.double(), wanted.double(), rtol=1e-5, atol=1e-6)
