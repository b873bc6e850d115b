"""Norms of other libraries: registered, or seen for what they compute; and in-place activations behind a norm."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from zoo import conv_net

from bnlight import (
    fold_norm,
    freeze_norm,
    norm_parameters,
    norm_penalty,
    register_norm,
    replace_norm,
    sync_norm,
)
from bnlight.norm import NORMS, BatchNorm, GroupNorm, LayerNorm, RMSNorm
from bnlight.surgery import known


class ScaledNorm(nn.Module):
    """As a language model's: the root mean square over the last axis, with names of its own."""

    def __init__(self, size):
        super().__init__()
        self.gain = nn.Parameter(torch.rand(size) + 0.5)

    def forward(self, x):
        return self.gain * x * (x.square().mean(-1, keepdim=True) + 1e-3).rsqrt()


class BatchNormELU(nn.BatchNorm2d):
    """A batch norm with an activation inside, as timm's."""

    def __init__(self, size):
        super().__init__(size)
        self.act = nn.ELU(inplace=True)

    def forward(self, x):
        return self.act(super().forward(x))


class ChannelsFirstNorm(nn.LayerNorm):
    """As ConvNeXt's: either layout, by an attribute."""

    def __init__(self, size, first):
        super().__init__(size, eps=1e-3)
        self.first = first

    def forward(self, x):
        if not self.first:
            return super().forward(x)
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class VarianceNorm(nn.Module):
    """As T5's and Llama's."""

    def __init__(self, size):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.rand(size)), 1e-3

    def forward(self, x):
        variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance + self.variance_epsilon))


class PlusOneNorm(VarianceNorm):
    """As Gemma's: the scale is another function of the weight."""

    def forward(self, x):
        return x + super().forward(x)


class GroupNormActivation(nn.GroupNorm):
    """As BiT's."""

    def __init__(self, size):
        super().__init__(2, size)
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.activation(F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps))


@pytest.fixture
def rules():
    before = dict(known._RULES)
    yield
    known._RULES.clear()
    known._RULES.update(before)


@pytest.mark.usefixtures("rules")
def test_a_registered_class_is_a_norm_for_everything():
    net = nn.Sequential(nn.Linear(4, 8), ScaledNorm(8))
    gain = net[1].gain
    assert not replace_norm(net, "rms").replaced
    assert gain not in {*norm_parameters(nn.Sequential(BatchNormELU(8), net[0]))}

    @register_norm(ScaledNorm)
    def _(layer):
        norm = nn.RMSNorm(len(layer.gain), eps=1e-3)
        norm.weight = layer.gain
        return norm

    x = torch.randn(5, 4)
    before = net(x)
    assert gain in {*norm_parameters(net)}
    assert norm_penalty(net, weight=1.0) == ((gain - 1) ** 2).sum()
    assert not freeze_norm(copy.deepcopy(net))[1].gain.requires_grad
    assert "normalizes each sample" in fold_norm(net).fold_report.kept["1"]
    row = replace_norm(net, "rms").rows[0]
    assert (row.old, row.new) == ("ScaledNorm", "RMSNorm")
    assert type(net[1]) is RMSNorm
    assert net[1].weight is gain
    torch.testing.assert_close(net(x), before)


@pytest.mark.usefixtures("rules")
def test_the_activation_in_a_registered_norm_stays_behind_the_new_one_and_where_it_is_folded():
    @register_norm(f"{__name__}.BatchNormELU")
    def _(layer):
        norm = nn.BatchNorm2d(layer.num_features, eps=layer.eps, momentum=layer.momentum)
        norm._parameters, norm._buffers = layer._parameters, layer._buffers
        return nn.Sequential(norm.train(layer.training), layer.act)

    net, x = nn.Sequential(nn.Conv2d(3, 8, 3), BatchNormELU(8)), torch.randn(4, 3, 6, 6) + 1
    net(x)
    keys, act = [*net.state_dict()], net[1].act
    twin = copy.deepcopy(net)
    row = replace_norm(net, "batch").rows[0]
    assert "act" in row.carried
    assert isinstance(net[1], BatchNorm)
    assert net[1].act is act
    assert [*net.state_dict()] == keys
    torch.testing.assert_close(net(x), twin(x))
    for model in (twin, net, sync_norm(copy.deepcopy(net))):
        model.eval()
        folded = fold_norm(model)
        assert folded.fold_report.folded == {"1": "0"}
        torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-4)
    replace_norm(net, "group")
    assert net[1].act is act
    assert float(net(x).detach().min()) > -1  # of an ELU


@pytest.mark.usefixtures("rules")
def test_a_norm_is_known_by_what_it_computes():
    cases = [
        (VarianceNorm(8), (2, 5, 8), RMSNorm, "rms"),
        (ChannelsFirstNorm(8, True), (2, 8, 4, 4), LayerNorm, "layer"),
        (ChannelsFirstNorm(8, False), (2, 4, 4, 8), LayerNorm, "layer"),
        (GroupNormActivation(8), (2, 8, 4, 4), GroupNorm, "group"),
    ]
    for layer, shape, kind, name in cases:
        register_norm(type(layer), known.by_looking)
        net, x = nn.Sequential(nn.Identity(), layer), torch.randn(shape)
        before, parameters = net(x), [*net.parameters()]
        replace_norm(net, name)
        assert isinstance(net[1], kind)
        assert all(a is b for a, b in zip(net.parameters(), parameters, strict=True))
        torch.testing.assert_close(net(x), before)
        assert not replace_norm(net, name).replaced


@pytest.mark.usefixtures("rules")
def test_a_norm_that_computes_something_else_is_left():
    register_norm(PlusOneNorm, known.by_looking)
    net = nn.Sequential(nn.Linear(4, 8), PlusOneNorm(8))
    assert "only the name is known" in replace_norm(net, "rms").left[0].reason
    assert type(net[1]) is PlusOneNorm


@pytest.mark.usefixtures("rules")
def test_a_subclass_with_a_forward_of_its_own_is_not_taken_for_its_registered_base():
    register_norm(VarianceNorm, known.by_looking)

    class Quiet(VarianceNorm):
        def __init__(self):
            super().__init__(8)

    net = nn.Sequential(nn.Linear(4, 8), Quiet(), PlusOneNorm(8))
    assert [row.path for row in replace_norm(net, "rms").replaced] == ["1"]


@pytest.mark.usefixtures("rules")
def test_what_cannot_be_registered_says_so():
    with pytest.raises(TypeError, match="is known already; register a subclass"):
        register_norm(nn.BatchNorm2d, lambda layer: layer)
    with pytest.raises(TypeError, match="expected a class of modules, or its full name, got 3"):
        register_norm(3, lambda layer: layer)
    register_norm(ScaledNorm, lambda layer: nn.Linear(1, 1))
    with pytest.raises(TypeError, match="the rule for ScaledNorm must return a norm"):
        replace_norm(nn.Sequential(ScaledNorm(8)), "rms")


@pytest.mark.parametrize("norm", ["group", "batch", "layer", functools.partial(nn.GroupNorm, 4)])
def test_twice_is_once_whatever_the_layers_wear_and_carry(norm):
    net = freeze_norm(conv_net(lambda size: nn.BatchNorm2d(size, eps=1e-3, momentum=0.3)))
    assert len(replace_norm(net, norm).replaced) == 2
    again = replace_norm(net, norm)
    assert {row.reason for row in again} == {"it is so already"}
    assert "eps=0.001" in repr(net.norm1)


class PreActivation(nn.Module):
    """x + conv(relu(norm(x))), as in ResNet-v2; the activation may overwrite what it gets."""

    def __init__(self, inplace):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.act = nn.ReLU(inplace)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        x = self.stem(x)
        return x + self.conv(self.act(self.norm(x)))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("norm", NORMS)
def test_an_activation_in_place_leaves_the_residual_as_it_is(norm, affine):
    results, x = [], torch.randn(3, 3, 6, 6)
    for inplace in (False, True):
        torch.manual_seed(0)
        net = PreActivation(inplace)
        net.norm = nn.BatchNorm2d(4, affine=affine)
        replace_norm(net, norm)
        net(x).square().sum().backward()
        gradients = [parameter.grad for parameter in net.parameters()]
        with torch.no_grad():
            results.append([net(x), net.eval()(x), fold_norm(net)(x), *gradients])
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(results[1][2], results[1][1], rtol=1e-4, atol=1e-4)


class Between(nn.Module):
    """The norm's input is changed between it and the convolution behind it."""

    def __init__(self):
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        x = x * 2
        y = self.norm(x)
        return self.change(x) + self.conv(y)


@pytest.mark.parametrize(
    "change",
    [nn.ReLU(inplace=True), torch.relu_, lambda x: x.mul_(3), lambda x: F.relu(x, inplace=True)],
    ids=["module", "function", "method", "argument"],
)
def test_a_norm_is_not_folded_over_a_change_of_its_input(change):
    net = Between()
    net.change = change
    x = torch.randn(4, 4, 5, 5) + 0.3
    net(x)
    net.eval()
    folded = fold_norm(net)
    assert "changed in place between" in folded.fold_report.kept["norm"]
    assert torch.equal(folded(x), net(x))
    net.change = nn.ReLU()
    assert fold_norm(net).fold_report.folded == {"norm": "conv"}
