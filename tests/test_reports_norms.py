"""What users have reported of norm layers elsewhere, tried here; docs/tested-against.md lists the reports."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from norm_table import ROWS
from ranks import start
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap

from bnlight import precise_statistics, sync_norm
from bnlight.norm import NORMS, GroupNorm
from bnlight.norm.batch import BatchStatistics

CENTRED = ["batch", "batch_instance", "switchable", "layer", "group", "instance"]
ALONE = [name for name, layer in NORMS.items() if not issubclass(layer, BatchStatistics)]


@pytest.mark.parametrize("name", CENTRED)
def test_a_constant_image_becomes_zero_but_for_the_rounding_of_its_mean(name: str) -> None:
    """pytorch/pytorch#5410: batch_norm of constant channels gives values as large as 1 instead of 0."""
    x = torch.full((8, 4, 10, 10), 255.0)
    rounding = 255 * torch.finfo(torch.float32).eps / NORMS[name](4).eps ** 0.5
    assert NORMS[name](4)(x).detach().abs().max() <= rounding < 0.01


@pytest.mark.parametrize("name", CENTRED)
def test_a_small_spread_around_a_large_mean_is_normalized(name: str) -> None:
    """pytorch/pytorch#5410: E[x^2] - E[x]^2 in float32 would leave nothing of a variance of 0.01 around 1000."""
    x = torch.randn(8, 4, 10, 10, generator=torch.Generator().manual_seed(0)) * 0.1 + 1000
    exact = NORMS[name](4).double()(x.double())
    assert (NORMS[name](4)(x) - exact).abs().max() < 2e-3 * exact.abs().max()


def jacobians(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Of each example, by vmap and in a loop."""

    def of_one(example: Tensor) -> Any:
        return jacrev(lambda z: module(z[None])[0])(example)

    return vmap(of_one)(x), torch.stack([of_one(example) for example in x])


@pytest.mark.parametrize("name", NORMS)
def test_each_examples_jacobian_in_evaluation_comes_from_vmap(name: str) -> None:
    """pytorch/functorch#867: vmap(jacrev) fails on a batch norm in evaluation, which mixes no examples."""
    x = torch.randn(3, 2, 2, 2, dtype=torch.float64)
    net = nn.Sequential(nn.Conv2d(2, 4, 1), NORMS[name](4)).double()
    net(x)
    torch.testing.assert_close(*jacobians(net.eval(), x))


@pytest.mark.parametrize("name", ALONE)
def test_each_examples_gradient_in_training_comes_from_vmap(name: str) -> None:
    """pytorch/functorch#622: vmap does not work on a GroupNorm in training."""
    x = torch.randn(3, 2, 2, 2, dtype=torch.float64)
    net = nn.Sequential(nn.Conv2d(2, 4, 1), NORMS[name](4)).double()
    parameters = dict(net.named_parameters())

    def loss(values: dict[str, Tensor], example: Tensor) -> Tensor:
        return (functional_call(net, values, (example[None],)) ** 3).sum()

    found = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for index, example in enumerate(x):
        expected = grad(loss)(parameters, example)
        for key in expected:
            torch.testing.assert_close(found[key][index], expected[key])


@pytest.mark.parametrize("name", NORMS)
def test_a_layer_built_without_memory_starts_as_any_other_and_keeps_what_is_loaded(name: str) -> None:
    """huggingface/transformers#43520: batch norms from the meta device had no statistics, or lost loaded ones."""
    fresh = NORMS[name](4)
    with torch.device("meta"):
        layer = NORMS[name](4)
    layer.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*layer.parameters(), *layer.buffers()):
            tensor.fill_(7)  # as memory happens to be
    layer.reset_parameters()
    torch.testing.assert_close(layer.state_dict(), fresh.state_dict(), rtol=0, atol=0)
    fresh(torch.randn(6, 4, 3, 3))
    layer.load_state_dict(fresh.state_dict())
    x = torch.randn(2, 4, 3, 3)
    assert torch.equal(layer.eval()(x), fresh.eval()(x))


def permuted(layer: nn.Module, whole: Tensor) -> dict[str, Tensor]:
    """Output and gradient of this rank's half of the examples, whose channels are on axis 2."""
    half = whole.chunk(dist.get_world_size())[dist.get_rank()].clone().requires_grad_()
    layer = sync_norm(copy.deepcopy(layer))  # what is sent is memory that all ranks share
    y = layer(half.permute(0, 2, 1, 3)).permute(0, 2, 1, 3)
    (y**3).sum().backward()
    assert half.grad is not None
    return {"y": y.detach(), "dx": half.grad} | {key: b.clone() for key, b in layer.named_buffers()}


def test_a_synchronized_norm_of_a_permuted_input_is_that_of_the_joined_batch(tmp_path: Path) -> None:
    """pytorch/pytorch#62967: SyncBatchNorm of a permuted input gives another output than BatchNorm on one GPU."""
    whole = torch.randn(8, 5, 4, 3, dtype=torch.float64) * 3 + 1
    layers = {name: row.make() for name, row in ROWS.items() if row.by_batch and not row.options}
    layers["torch"] = nn.BatchNorm2d(4).double()
    with start(2, tmp_path) as ranks:
        for name, layer in layers.items():
            found = ranks.run(permuted, copy.deepcopy(layer), whole)
            x = whole.clone().requires_grad_()
            y = layer(x.permute(0, 2, 1, 3)).permute(0, 2, 1, 3)
            (y**3).sum().backward()
            for key, value in {"y": y.detach(), "dx": x.grad}.items():
                joined = torch.cat([rank[key] for rank in found])
                torch.testing.assert_close(joined, value, msg=lambda text, at=(name, key): f"{at}: {text}")
            for key, buffer in layer.named_buffers():
                torch.testing.assert_close(found[1][key], buffer)


def test_a_group_norm_of_one_pixel_takes_a_gradient_in_another_layout() -> None:
    """pytorch/pytorch#115940: native_group_norm_backward raises on a permuted (N, C, 1, 1) and its gradient."""
    n, c = 64, 24
    x = torch.randn(1, n, c, 1).permute(1, 2, 0, 3).requires_grad_()
    upstream = torch.randn(n, c, 1, 1).to(memory_format=torch.channels_last)
    (found,) = torch.autograd.grad(GroupNorm(c, num_groups=3)(x), x, upstream)
    exact = x.detach().double().contiguous().requires_grad_()
    y = nn.functional.group_norm(exact.view(n, c), 3).view(n, c, 1, 1)
    (expected,) = torch.autograd.grad(y, exact, upstream.double().contiguous())
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NORMS)
def test_the_gradient_of_half_channels_last_images_is_that_of_the_same_numbers_in_double(name: str) -> None:
    """pytorch/pytorch#147303: the backward pass of BatchNorm2d on half channels-last images is NaN."""
    x = torch.rand(16, 3, 24, 24).half().contiguous(memory_format=torch.channels_last).requires_grad_()
    upstream = torch.rand(x.shape).half()
    (found,) = torch.autograd.grad(NORMS[name](3)(x), x, upstream)
    exact = x.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(NORMS[name](3).double()(exact), exact, upstream.double())
    assert (found - expected).abs().max() < 3e-3 * expected.abs().max()


@pytest.mark.parametrize("name", NORMS)
def test_statistics_that_were_estimated_under_inference_mode_can_be_trained_on(name: str) -> None:
    """mrdbourke/pytorch-deep-learning#397: "Inplace update to inference tensor outside InferenceMode"."""
    net, x = nn.Sequential(nn.Conv2d(3, 4, 1), NORMS[name](4)), torch.randn(5, 3, 2, 2)
    with torch.inference_mode():
        precise_statistics(net, [x, x])
        net(x)
    net(x).sum().backward()
