"""BatchRenorm is the paper's algorithm, exactly, in one pass forward and one native call backward."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bnlight.norm import BatchNorm, BatchRenorm

SHAPES = [(7, 3), (5, 3, 4), (4, 3, 5, 2), (3, 3, 2, 2, 2)]
CLIPS = {"unclipped": (1e6, 1e6), "clipped": (1.05, 0.05), "paper": (3.0, 5.0), "batch norm": (1.0, 0.0)}


class Reference:
    """Ioffe 2017, algorithm 1, written out for autograd."""

    def __init__(self, layer: BatchRenorm) -> None:
        self.layer = layer
        self.mean = layer.running_mean.clone()
        self.std = (layer.running_var + layer.eps).sqrt()
        self.weight = layer.weight.detach().clone().requires_grad_()
        self.bias = layer.bias.detach().clone().requires_grad_()

    def __call__(self, x: Tensor) -> Tensor:
        axes = [axis for axis in range(x.dim()) if axis != 1]
        view = (-1, *[1] * (x.dim() - 2))
        r_max, d_max = self.layer.r_max.item(), self.layer.d_max.item()
        mean = x.mean(axes)
        std = (self.layer.eps + (x - mean.view(view)).square().mean(axes)).sqrt()
        r = (std / self.std).clamp(1 / r_max, r_max).detach()
        d = ((mean - self.mean) / self.std).clamp(-d_max, d_max).detach()
        xhat = (x - mean.view(view)) / std.view(view) * r.view(view) + d.view(view)
        rate = self.layer.momentum
        self.mean = self.mean + rate * (mean.detach() - self.mean)
        self.std = self.std + rate * (std.detach() - self.std)
        return xhat * self.weight.view(view) + self.bias.view(view)


def weights_like(y: Tensor) -> Tensor:
    return torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y).sin()


def assert_equals_reference(layer: BatchRenorm, batches: list[Tensor]) -> None:
    reference = Reference(layer)
    for x in batches:
        mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        layer.zero_grad()
        reference.weight.grad = reference.bias.grad = None
        y, expected = layer(mine), reference(theirs)
        (y * weights_like(y)).sum().backward()
        (expected * weights_like(y)).sum().backward()
        for found, wanted in [
            (y, expected),
            (mine.grad, theirs.grad),
            (layer.weight.grad, reference.weight.grad),
            (layer.bias.grad, reference.bias.grad),
            (layer.running_mean, reference.mean),
            (layer.running_var, reference.std.square() - layer.eps),
        ]:
            torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def randomized(layer: nn.Module) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("clips", CLIPS.values(), ids=CLIPS)
def test_values_gradients_and_averages_follow_the_paper_over_several_steps(clips, shape, channels_last):
    layer = randomized(BatchRenorm(3, r_max=clips[0], d_max=clips[1], momentum=0.2, dtype=torch.float64))
    batches = [torch.randn(shape, dtype=torch.float64) * scale + scale for scale in (1, 4, 0.01, -2)]
    if channels_last and len(shape) == 4:
        batches = [x.to(memory_format=torch.channels_last) for x in batches]
    assert_equals_reference(layer, batches)


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(2, 6),
    space=st.lists(st.integers(1, 4), max_size=3),
    mean=st.floats(-50, 50),
    std=st.floats(0.1, 10),
    seed=st.integers(0, 99),
)
def test_any_shape_mean_and_scale_follow_the_paper(n, space, mean, std, seed):
    torch.manual_seed(seed)
    x = torch.randn(n, 3, *space, dtype=torch.float64) * std + mean
    assert_equals_reference(randomized(BatchRenorm(3, dtype=torch.float64)), [x, x + 1])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_without_room_for_a_correction_it_is_batch_norm(shape):
    renorm, batch = BatchRenorm(3, r_max=1, d_max=0).double(), BatchNorm(3).double()
    renorm.load_state_dict(batch.state_dict())
    x = torch.randn(shape, dtype=torch.float64) * 3 + 1
    results = []
    for layer in (renorm, batch):
        z = x.clone().requires_grad_()
        y = layer(z)
        (y * weights_like(y)).sum().backward()
        results.append([y, z.grad, layer.weight.grad, layer.bias.grad])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_unclipped_training_gives_what_evaluation_gives():
    layer = randomized(BatchRenorm(3, r_max=1e9, d_max=1e9, momentum=0.0, dtype=torch.float64))
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.5, 2)
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64) * 4 + 7
    torch.testing.assert_close(layer(x), layer.eval()(x), rtol=1e-12, atol=1e-12)


def test_the_gradient_is_orthogonal_to_a_shift_and_a_scaling_of_the_input():
    """Batch statistics absorb both; the second holds exactly without eps."""
    layer = randomized(BatchRenorm(3, eps=0.0, dtype=torch.float64))
    x = (torch.randn(6, 3, 4, 4, dtype=torch.float64) * 2 + 1).requires_grad_()
    y = layer(x)
    (y * weights_like(y)).sum().backward()
    torch.testing.assert_close(x.grad.sum((0, 2, 3)), torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close((x.grad * x).sum((0, 2, 3)), torch.zeros(3, dtype=torch.float64))


def test_gradcheck_passes_where_the_corrections_are_constant():
    layer = randomized(BatchRenorm(2, r_max=1, d_max=0, momentum=0.0, dtype=torch.float64))
    x = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))


def test_a_second_derivative_is_refused():
    layer = BatchRenorm(2)
    x = torch.randn(4, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        gradient.sum().backward()


def test_the_average_is_of_the_standard_deviation_not_of_the_variance():
    layer = BatchRenorm(1, momentum=0.5, eps=0.0, dtype=torch.float64)
    layer(torch.tensor([[-3.0], [3.0]], dtype=torch.float64))
    assert layer.running_var.item() == pytest.approx(((1 + 3) / 2) ** 2)


def test_momentum_none_averages_all_batches():
    layer = BatchRenorm(2, momentum=None, dtype=torch.float64)
    batches = torch.randn(5, 8, 2, dtype=torch.float64)
    for x in batches:
        layer(x)
    torch.testing.assert_close(layer.running_mean, batches.mean((0, 1)))
    stds = (batches.var(1, correction=0) + layer.eps).sqrt()
    torch.testing.assert_close(layer.running_var, stds.mean(0).square() - layer.eps)


def test_a_constant_channel_keeps_the_running_variance_non_negative():
    layer = BatchRenorm(2, momentum=1.0)
    layer(torch.full((8, 2), 3.0))
    assert (layer.running_var >= 0).all()
    assert layer.eval()(torch.full((8, 2), 3.0)).isfinite().all()


class FullSizeOps(TorchDispatchMode):
    """Names of the operations that write a tensor of at least `size` values."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.names = size, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        outputs = result if isinstance(result, tuple | list) else [result]
        if not func.is_view and any(isinstance(o, Tensor) and o.numel() >= self.size for o in outputs):
            self.names.append(func.overloadpacket.__name__)
        return result


@pytest.mark.parametrize("shape", [(64, 32), (8, 4, 16), (8, 4, 6, 6)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_step_writes_two_full_tensors_the_output_and_the_gradient(shape, dtype, channels_last):
    layer = BatchRenorm(shape[1])
    x = torch.randn(shape, dtype=dtype)
    if channels_last and len(shape) == 4:
        x = x.to(memory_format=torch.channels_last)
    x.requires_grad_()
    gradient = torch.randn_like(x)
    with FullSizeOps(x.numel()) as ops:
        layer(x).backward(gradient)
    assert ops.names == ["native_batch_norm", "native_batch_norm_backward"]


def test_virtual_batches_of_a_contiguous_tensor_write_no_more():
    layer = BatchRenorm(4, virtual_batch_size=2)
    x = torch.randn(8, 4, 6, 6, requires_grad=True)
    gradient = torch.randn_like(x)
    with FullSizeOps(x.numel()) as ops:
        layer(x).backward(gradient)
    assert ops.names == ["native_batch_norm", "native_batch_norm_backward"]
