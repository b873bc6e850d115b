"""Full normalization: its gradient is the full batch's, whatever the mini-batches; mean-only batch norm."""

import copy

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from bnlight.norm import FullNorm, LayerNorm, MeanOnlyBatchNorm, Norm


def labelled(samples: int, classes: int) -> tuple[Tensor, Tensor]:
    """Values far from zero whose mean depends on their label, sorted by it."""
    y = torch.arange(samples) % classes
    x = (
        torch.randn(samples, 5, dtype=torch.float64)
        + 3 * torch.randn(classes, 5, dtype=torch.float64)[y]
        + 20
    )
    order = y.argsort()
    return x[order], y[order]


def network(norm: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 6, bias=False), norm, nn.Tanh(), nn.Linear(6, 4)).double()


class DataSetNorm(nn.Module):
    """Normalization by the statistics of all that it is given, differentiated by autograd."""

    def forward(self, h: Tensor) -> Tensor:
        return (h - h.mean(0)) / (h.var(0, correction=0) + 1e-5).sqrt()


def converge(net: nn.Sequential, x: Tensor, y: Tensor, size: int) -> None:
    """Plain averages over the data: of the two moments first, then of the two gradients."""
    norm, hidden = net[1], net[0](x).detach()
    norm.momentum = 0.0
    norm.running_mean.copy_(hidden.mean(0))
    norm.running_var.copy_(hidden.var(0, correction=0))
    seen = []
    norm.mean_grad.zero_()
    for part, labels in zip(x.split(size), y.split(size), strict=True):
        probe = copy.deepcopy(net)
        probe[1].observer = lambda batch, used: None  # the moments stay
        probe[1].momentum = 1.0  # the gradients become this batch's
        F.cross_entropy(probe(part), labels).backward()
        seen.append((probe[1].mean_grad, probe[1].var_grad))
    norm.mean_grad.copy_(torch.stack([mean for mean, _ in seen]).mean(0))
    norm.var_grad.copy_(torch.stack([var for _, var in seen]).mean(0))


@pytest.mark.parametrize("size", [4, 12, 1])
def test_with_converged_averages_the_mean_gradient_of_sorted_batches_is_the_full_batchs(size):
    torch.manual_seed(0)
    x, y = labelled(48, 4)
    net = network(FullNorm(6, affine=False))
    reference = network(DataSetNorm())
    reference.load_state_dict(net.state_dict(), strict=False)
    F.cross_entropy(reference(x), y).backward()

    converge(net, x, y, size)
    net.zero_grad()
    for part, labels in zip(x.split(size), y.split(size), strict=True):
        F.cross_entropy(net(part), labels).backward()
    for mine, full in zip(net.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine.grad / (48 // size), full.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm1d(6, affine=False), nn.BatchNorm1d(6, affine=False, momentum=0.0)]
)
def test_batch_norm_and_frozen_statistics_fail_what_full_norm_passes(norm):
    torch.manual_seed(0)
    x, y = labelled(48, 4)
    net, reference = network(norm), network(DataSetNorm())
    if norm.momentum == 0:
        norm.eval()
        hidden = net[0](x).detach()
        norm.running_mean.copy_(hidden.mean(0))
        norm.running_var.copy_(hidden.var(0, correction=0))
    reference[0].load_state_dict(net[0].state_dict())
    reference[3].load_state_dict(net[3].state_dict())
    F.cross_entropy(reference(x), y).backward()
    for part, labels in zip(x.split(4), y.split(4), strict=True):
        (F.cross_entropy(net(part), labels) / 12).backward()
    error = (net[0].weight.grad - reference[0].weight.grad).norm() / reference[0].weight.grad.norm()
    assert error > 0.3


def test_one_batch_at_a_rate_of_one_is_batch_norm():
    torch.manual_seed(0)
    x = (torch.randn(7, 3, 4, dtype=torch.float64) * 2 + 5).requires_grad_()
    z = x.detach().clone().requires_grad_()
    mine, torchs = FullNorm(3, momentum=1.0).double(), nn.BatchNorm1d(3, momentum=1.0).double()
    weights = torch.randn_like(x)
    (mine(x) * weights).sum().backward()
    (torchs(z) * weights).sum().backward()
    torch.testing.assert_close(mine(x), torchs(z), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(x.grad, z.grad, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(mine.weight.grad, torchs.weight.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_each_average_is_updated_first_then_used(offset):
    torch.manual_seed(0)
    rate, layer = 0.25, FullNorm(2, momentum=0.25).double()
    first, second = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    for _ in range(5):
        x = torch.randn(6, 2, dtype=torch.float64) + offset
        first = (1 - rate) * first + rate * x.mean(0)
        second = (1 - rate) * second + rate * x.square().mean(0)
        y = layer(x)
        var = second - first.square()
        torch.testing.assert_close(y, (x - first) / (var + 1e-5).sqrt(), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(layer.eval()(x), y)


def test_a_batch_of_one_value_trains_and_an_empty_one_changes_nothing():
    layer = FullNorm(2)
    layer(torch.full((1, 2), 3.0)).sum().backward()
    assert torch.allclose(layer.running_mean, torch.full((2,), 0.3))
    state = copy.deepcopy(layer.state_dict())
    layer(torch.empty(0, 2))
    layer(torch.randn(3, 2), torch.zeros(3, dtype=torch.bool)).sum().backward()
    for name in ("running_mean", "running_var"):
        assert torch.equal(layer.state_dict()[name], state[name])


def accuracy_after_training_on_batches_of_one_class(norm: Norm) -> float:
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    train, test = torch.arange(len(y)) % 5 != 0, torch.arange(len(y)) % 5 == 0
    net = nn.Sequential(nn.Linear(64, 64, bias=False), norm, nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02)
    by_class = [(x[train & (y == c)], c) for c in range(10)]
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        batches = [
            (images[index], c)
            for images, c in by_class
            for index in torch.randperm(len(images), generator=generator).split(16)
        ]
        for index in torch.randperm(len(batches), generator=generator).tolist():
            images, c = batches[index]
            optimizer.zero_grad()
            F.cross_entropy(net(images), torch.full((len(images),), c)).backward()
            optimizer.step()
    net.eval()
    return float((net(x[test]).argmax(1) == y[test]).float().mean())


def test_with_one_class_per_mini_batch_full_norm_reaches_what_layer_norm_reaches():
    full, layer, batch = (
        accuracy_after_training_on_batches_of_one_class(norm)
        for norm in (FullNorm(64), LayerNorm(64), nn.BatchNorm1d(64))
    )
    assert layer > 0.9
    assert full > layer - 0.02
    assert batch < 0.6


@pytest.mark.parametrize("options", [{}, {"virtual_batch_size": 3}], ids=str)
def test_mean_only_batch_norm_takes_the_mean_away_forward_and_backward(options):
    torch.manual_seed(0)
    layer = MeanOnlyBatchNorm(3, momentum=0.5, **options).double()
    x = (torch.randn(6, 3, 2, dtype=torch.float64) * 4).requires_grad_()
    z = x.detach().clone().requires_grad_()
    groups = z.view(3, 2, 3, 2) if options else z.view(6, 1, 3, 2)
    expected = (groups - groups.mean((0, 3), keepdim=True)).view(6, 3, 2)
    weights = torch.randn_like(x)
    y = layer(x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    (y * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(x.grad, z.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.bias.grad, weights.sum((0, 2)), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.running_mean, z.detach().mean((0, 2)) / 2)
    torch.testing.assert_close(layer.eval()(x), x - layer.running_mean.view(3, 1))
    assert [name for name, _ in layer.named_parameters()] == ["bias"]


def test_a_gradient_that_is_not_finite_leaves_the_averages_alone():
    layer = FullNorm(3)
    x = torch.randn(5, 3, requires_grad=True)
    layer(x).pow(3).sum().backward()
    before = layer.mean_grad.clone(), layer.var_grad.clone()
    (layer(x) * torch.tensor(float("inf"))).sum().backward()
    assert torch.equal(layer.mean_grad, before[0])
    assert torch.equal(layer.var_grad, before[1])


def test_a_loss_scale_that_overflows_finds_its_way_down():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), FullNorm(8), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126)
    for _ in range(60):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = net(torch.randn(8, 3)).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() > 1
    assert all(buffer.isfinite().all() for buffer in net.buffers())


def test_a_batch_without_valid_values_leaves_the_averages_of_the_gradients_too():
    layer = FullNorm(3)
    x = torch.randn(5, 3, 2, requires_grad=True)
    layer(x).pow(3).sum().backward()
    before = copy.deepcopy(layer.state_dict())
    layer(x, torch.zeros(5, 2, dtype=torch.bool)).sum().backward()
    for name in ("running_mean", "running_var", "mean_grad", "var_grad"):
        assert torch.equal(layer.state_dict()[name], before[name])
