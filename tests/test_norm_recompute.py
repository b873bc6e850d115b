"""Activation checkpointing, and derivatives of derivatives."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from bnlight.norm import NORMS, BatchNorm, BatchRenorm, MeanOnlyBatchNorm
from bnlight.norm.batch import BatchStatistics

TYPES = {**NORMS, "mean only": MeanOnlyBatchNorm}
OF_BATCHES = [name for name, layer_type in TYPES.items() if issubclass(layer_type, BatchStatistics)]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", TYPES)
def test_checkpointing_changes_no_number_and_updates_once(name, reentrant):
    torch.manual_seed(0)
    mine = nn.Sequential(
        nn.Conv1d(3, 3, 1), TYPES[name](3, affine=True), nn.Dropout(0.3), nn.Conv1d(3, 3, 1)
    ).double()
    plain = copy.deepcopy(mine)
    for step in range(3):
        x = torch.randn(6, 3, 4, dtype=torch.float64, requires_grad=True)
        z = x.detach().clone().requires_grad_()
        torch.manual_seed(step)
        checkpoint(mine, x, use_reentrant=reentrant).square().sum().backward()
        torch.manual_seed(step)
        plain(z).square().sum().backward()
        torch.testing.assert_close(x.grad, z.grad, rtol=1e-12, atol=1e-12)
    for a, b in zip(mine.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-12)
    for a, b in zip(mine.buffers(), plain.buffers(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_shared_layer_is_recomputed_as_it_was_at_each_of_its_calls(reentrant):
    torch.manual_seed(0)
    shared = BatchRenorm(3, momentum=0.4, r_max=1.2, d_max=0.2).double()
    plain = copy.deepcopy(shared)
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    z = x.detach().clone().requires_grad_()
    y = x
    for scale in (1.0, 3.0, 0.3):
        y = checkpoint(lambda v, s=scale: shared(v * s).tanh(), y, use_reentrant=reentrant)
        z_out = plain((z if scale == 1.0 else z_out) * scale).tanh()  # noqa: F821
    y.pow(3).sum().backward()
    z_out.pow(3).sum().backward()
    torch.testing.assert_close(x.grad, z.grad, rtol=1e-12, atol=1e-12)
    for a, b in zip(shared.buffers(), plain.buffers(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("reentrant", [False, True])
def test_jitter_is_the_same_again_and_leaves_the_random_numbers_of_others(reentrant):
    torch.manual_seed(0)
    mine = nn.Sequential(
        nn.Linear(3, 3), BatchNorm(3, jitter=(0.1, 0.2)), nn.Dropout(0.5), nn.Linear(3, 3)
    ).double()
    plain = copy.deepcopy(mine)
    x = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    z = x.detach().clone().requires_grad_()
    torch.manual_seed(1)
    checkpoint(mine, x, use_reentrant=reentrant).pow(3).sum().backward()
    torch.manual_seed(1)
    plain(z).pow(3).sum().backward()
    torch.testing.assert_close(x.grad, z.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("around", [False, True])
@pytest.mark.parametrize("name", [name for name in OF_BATCHES if name != "batch"])
def test_second_derivatives_are_refused_also_where_another_path_leads_to_the_input(name, around):
    layer = TYPES[name](3, affine=True).double()
    x = torch.randn(6, 3, 4, dtype=torch.float64, requires_grad=True)
    y = layer(x) + x if around else layer(x)
    (gradient,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(gradient.square().sum(), x)
    (gradient,) = torch.autograd.grad(layer.eval()(x).pow(3).sum(), x, create_graph=True)
    torch.autograd.grad(gradient.square().sum(), x)  # evaluation has all derivatives


def test_batch_norm_has_torchs_second_derivatives():
    x = torch.randn(6, 3, 4, dtype=torch.float64, requires_grad=True)
    layer = BatchNorm(3).double()
    assert torch.autograd.gradgradcheck(lambda v: layer(v), x)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["batch", "tight", "full", "switchable"])
def test_many_calls_of_one_layer_and_equal_batches_are_told_apart(name, reentrant):
    torch.manual_seed(0)
    make = {"tight": lambda c: BatchRenorm(c, momentum=0.4, r_max=1.2, d_max=0.2)}.get(name, TYPES.get(name))
    mine = make(3).double()
    plain = copy.deepcopy(mine)
    x = torch.randn(6, 3, 2, dtype=torch.float64, requires_grad=True)
    z = x.detach().clone().requires_grad_()
    sums = []
    for layer, start, run in ((mine, x, True), (plain, z, False)):
        total = 0
        for k in range(20):  # each batch twice
            scaled = start * (1 + k // 2)
            y = checkpoint(layer, scaled, use_reentrant=reentrant) if run else layer(scaled)
            total = total + y.pow(3).sum() * (k + 1)
        total.backward()
        sums.append(total.detach())
    torch.testing.assert_close(*sums, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x.grad, z.grad, rtol=1e-9, atol=1e-9)
    for a, b in zip(mine.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("make", [BatchNorm, BatchRenorm])
def test_a_batch_that_is_not_finite_is_skipped_once_too(make, reentrant):
    layer = make(3)
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(6, 3, requires_grad=True)
    checkpoint(layer, x * float("inf"), use_reentrant=reentrant).sum().backward()
    assert layer.skipped_batches == 1
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_without_checkpointing_no_batch_is_remembered():
    layer = BatchRenorm(3)
    layer(torch.randn(6, 3, requires_grad=True)).sum().backward()
    assert not layer._calls._last
