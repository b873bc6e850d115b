"""Weight normalization and weight standardization: exact, on any model."""

from __future__ import annotations

import copy
import doctest
import math
import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from weights import case, network, originals, outputs, parametrized

import bnlight.norm.weight
import bnlight.norm.weight_init
from bnlight.models import CNN
from bnlight.norm import NORMS, weight_norm, weight_standardization
from bnlight.surgery import norm_parameters

assert case  # a fixture


# --- weight normalization


def test_weight_norm_changes_no_output_and_each_length_is_one_output_channels(case):
    layer, x = case
    before, y = layer.weight.detach().clone(), layer(x)
    assert weight_norm(layer) is layer
    torch.testing.assert_close(layer(x), y, rtol=1e-13, atol=1e-13)
    g, v = originals(layer)
    assert torch.equal(v, before)
    norms = torch.stack([row.norm() for row in outputs(layer, before)])
    torch.testing.assert_close(g.flatten(), norms, rtol=1e-14, atol=0)
    with torch.no_grad():  # one length doubled doubles one channel of the weight
        g.view(-1)[2] *= 2
    scaled = [after.norm() / norm for after, norm in zip(outputs(layer, layer.weight), norms, strict=True)]
    torch.testing.assert_close(torch.stack(scaled), torch.ones_like(norms).index_fill(0, torch.tensor(2), 2))


def test_the_gradients_are_those_of_the_paper(case):
    layer, x = case
    plain = copy.deepcopy(layer)
    g, v = originals(weight_norm(layer))
    with torch.no_grad():
        g.mul_(torch.rand_like(g) + 0.5)
        plain.weight.copy_(layer.weight)
    dg, dv = torch.autograd.grad(layer(x).pow(3).sum(), [g, v])
    (dw,) = torch.autograd.grad(plain(x).pow(3).sum(), [plain.weight])
    rows = [outputs(layer, tensor) for tensor in (dw, v.detach(), dv)]
    for dw_i, v_i, dv_i, g_i, dg_i in zip(*rows, g.flatten(), dg.flatten(), strict=True):
        torch.testing.assert_close(dg_i, dw_i @ v_i / v_i.norm(), rtol=1e-10, atol=1e-10)
        expected = g_i / v_i.norm() * dw_i - g_i * dg_i / v_i.norm() ** 2 * v_i
        torch.testing.assert_close(dv_i, expected, rtol=1e-10, atol=1e-10)


def test_it_is_torchs_parametrization_and_loads_from_it_and_from_the_older_one():
    ours, torchs = nn.Linear(3, 2), nn.Linear(3, 2)
    weight_norm(ours)
    parametrizations.weight_norm(torchs)
    ours.load_state_dict(torchs.state_dict(), strict=True)
    assert torch.equal(ours.weight, torchs.weight)
    old = {"bias": torchs.bias, "weight_g": originals(torchs)[0] * 2, "weight_v": originals(torchs)[1]}
    ours.load_state_dict(old, strict=True)
    torch.testing.assert_close(ours.weight, torchs.weight * 2)


def test_removal_makes_the_present_weight_a_parameter_again():
    for change in (weight_norm, weight_standardization):
        layer = change(nn.Conv2d(2, 3, 3))
        present = layer.weight.detach().clone()
        parametrize.remove_parametrizations(layer, "weight")
        assert type(layer) is nn.Conv2d
        assert torch.equal(layer.weight, present)
        assert [name for name, _ in layer.named_parameters()] in (["weight", "bias"], ["bias", "weight"])


# --- weight standardization


def test_a_standardized_weight_is_the_formula_of_each_output_channel(case):
    layer, x = case
    before = layer.weight.detach().clone()
    weight_standardization(layer, eps=1e-3, linear=True)
    for raw, made in zip(outputs(layer, before), outputs(layer, layer.weight.detach()), strict=True):
        centred = raw - raw.mean()
        torch.testing.assert_close(
            made, centred / (centred.square().mean() + 1e-3).sqrt(), rtol=1e-12, atol=1e-12
        )
    assert layer(x).isfinite().all()


def test_it_is_timms_form_with_timms_eps_and_the_authors_up_to_the_unbiased_factor():
    layer = nn.Conv2d(8, 6, 3).double()
    raw = layer.weight.detach().clone()
    made = weight_standardization(layer).weight
    flat = raw.reshape(1, 6, -1)
    timm = F.batch_norm(flat, None, None, training=True, momentum=0.0, eps=1e-6).reshape_as(raw)
    torch.testing.assert_close(made, timm, rtol=1e-12, atol=1e-12)
    centred = raw - raw.mean(dim=(1, 2, 3), keepdim=True)
    authors = centred / (centred.flatten(1).std(dim=1).view(-1, 1, 1, 1) + 1e-5)
    torch.testing.assert_close(made * math.sqrt(71 / 72), authors, rtol=1e-3, atol=0)


def test_large_means_and_equal_weights_are_standardized_without_damage():
    layer = nn.Conv2d(16, 4, 3, bias=False)
    with torch.no_grad():
        layer.weight.add_(100.0)
        layer.weight[0] = 3.0
    exact = weight_standardization(copy.deepcopy(layer).double()).weight
    weight = weight_standardization(layer).weight
    torch.testing.assert_close(weight, exact.float(), rtol=1e-3, atol=1e-3)
    assert torch.equal(weight[0], torch.zeros_like(weight[0]))
    weight.sum().backward()
    assert layer.parametrizations["weight"].original.grad.isfinite().all()


def test_the_parameter_stays_the_same_so_an_optimizer_stays_valid():
    layer = nn.Conv1d(2, 3, 3)
    weight = layer.weight
    assert weight_standardization(layer).parametrizations["weight"].original is weight


def test_linear_layers_are_standardized_only_on_request():
    def network():
        return CNN((1, 8, 8), 10, NORMS["group"])

    plain = weight_standardization(network())
    assert not parametrize.is_parametrized(plain.classifier)
    assert parametrize.is_parametrized(weight_standardization(network(), linear=True).classifier)
    hidden = weight_standardization(network(), linear=True, exclude="classifier")
    assert not parametrize.is_parametrized(hidden.classifier)


# --- both, on whole models

BOTH = pytest.mark.parametrize("change", [weight_norm, weight_standardization])


@BOTH
def test_a_state_dict_goes_back_into_a_model_built_alike(change):
    one, other = change(network()), change(network())
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.add_(torch.randn_like(parameter))
    names = {name.rsplit(".", 1)[1] for name in one.state_dict() if "parametrizations" in name}
    assert names == ({"original0", "original1"} if change is weight_norm else {"original"})
    other.load_state_dict(one.state_dict(), strict=True)
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(one(x), other(x))


@BOTH
def test_a_copy_is_independent_and_pickling_is_refused_by_torch(change):
    model = change(network())
    twin = copy.deepcopy(model)
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(model(x), twin(x))
    for parameter in twin.parameters():
        nn.init.ones_(parameter)
    assert not torch.equal(model(x), twin(x))
    with pytest.raises(RuntimeError, match="state_dict"):
        torch.save(model, os.devnull)


@BOTH
@pytest.mark.parametrize("layer", [lambda: nn.Conv2d(4, 6, 3), lambda: nn.ConvTranspose2d(4, 6, 3, groups=2)])
def test_it_compiles_whole_and_exports_in_evaluation(change, layer):
    model = nn.Sequential(change(layer()), nn.ReLU())
    x = torch.randn(2, 4, 8, 8)
    y = model(x)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    compiled(x).square().sum().backward()
    y.square().sum().backward()
    torch.testing.assert_close(compiled(x), y)
    grads = [[p.grad for p in m.parameters()] for m in (model, compiled)]
    torch.testing.assert_close(*grads)
    exported = torch.export.export(model.eval(), (x,))
    torch.testing.assert_close(exported.module()(x), y)


@BOTH
def test_precision_training_flags_and_frozen_weights_are_kept(change):
    layer = nn.Conv2d(4, 6, 3, dtype=torch.bfloat16).eval()
    layer.weight.requires_grad_(False)
    change(layer)
    assert not layer.training
    assert layer.weight.dtype == torch.bfloat16
    assert [p.requires_grad for p in layer.parametrizations.parameters()] == [False] * (
        2 if change is weight_norm else 1
    )
    assert change(nn.Conv2d(4, 6, 3, device="meta")).weight.is_meta


def test_include_and_exclude_choose_layers_by_path():
    every = ["features.0", "features.4", "classifier"]
    assert parametrized(weight_norm(network())) == every
    assert parametrized(weight_norm(network(), include="features.*")) == every[:2]
    assert parametrized(weight_norm(network(), exclude=["classifier", "*.4"])) == every[:1]
    assert parametrized(weight_norm(network(), include=("*",), exclude="f*")) == every[2:]
    with pytest.raises(ValueError, match=r"'classifer' matches none of the layers features.0, .*classifier"):
        weight_norm(network(), exclude="classifer")
    with pytest.raises(ValueError, match="leave no layer"):
        weight_norm(network(), exclude="*")


def lazy() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.LazyConv2d(2, 3))


def zeroed() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 3, 3))
    nn.init.zeros_(model[1].weight[2])
    return model


def hooked() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.utils.spectral_norm(nn.Conv2d(1, 2, 3)))


@pytest.mark.parametrize(
    ("change", "model", "said"),
    [
        (weight_norm, lambda: nn.ReLU(), "ReLU has neither Linear layer nor convolution"),
        (weight_standardization, lambda: nn.Linear(2, 2), "has no convolution; linear=True"),
        (weight_norm, lazy, r"1 \(LazyConv2d.*run one batch"),
        (
            weight_norm,
            lambda: nn.Sequential(nn.Linear(2, 2), weight_norm(nn.Linear(2, 2))),
            "1 .*computed from",
        ),
        (
            weight_norm,
            lambda: weight_standardization(nn.Conv1d(2, 2, 2)),
            "the layer .*remove_parametrizations",
        ),
        (weight_norm, hooked, "1 .*computed from others already"),
        (weight_norm, zeroed, r"1 \(Conv2d.*the first is 2\)"),
        (weight_standardization, lambda: nn.Conv2d(4, 4, 1, groups=4), "one weight per output"),
        (lambda model: weight_standardization(model, eps=-1.0), lambda: nn.Conv1d(2, 2, 2), "eps"),
    ],
)
def test_what_cannot_be_reparametrized_is_refused_in_words_and_left_alone(change, model, said):
    model = model()
    before = list(model.state_dict())
    with pytest.raises(ValueError, match=said):
        change(model)
    assert list(model.state_dict()) == before


@BOTH
def test_modules_and_weights_that_are_shared_stay_shared(change):
    conv, other = nn.Conv1d(2, 2, 3, padding=1), nn.Conv1d(2, 2, 3, padding=1)
    other.weight = conv.weight
    model = change(nn.Sequential(conv, nn.ReLU(), other, conv))
    assert torch.equal(conv.weight, other.weight)
    torch.optim.SGD(model.parameters(), lr=0.1).zero_grad()
    model(torch.randn(4, 2, 5)).square().sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert torch.equal(conv.weight, other.weight)
    assert len([*model.parameters()]) == 2 + (2 if change is weight_norm else 1)


def test_a_weight_shared_with_a_module_that_keeps_it_is_refused():
    model = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5)})
    model["head"].weight = model["embed"].weight
    with pytest.raises(ValueError, match=r"head \(Linear.*embed.weight"):
        weight_norm(model)
    down, up = nn.Conv1d(3, 3, 2), nn.ConvTranspose1d(3, 3, 2)
    up.weight = down.weight  # the same numbers, but other outputs
    with pytest.raises(ValueError, match="same way"):
        weight_norm(nn.Sequential(down, up))


def test_lengths_are_not_decayed_and_directions_are():
    model = weight_norm(nn.Sequential(nn.Linear(3, 4), nn.ConvTranspose1d(4, 4, 2, groups=2)))
    chosen = {id(parameter) for parameter in norm_parameters(model)}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in chosen}
    assert names == {f"{i}.{kind}" for i in "01" for kind in ("bias", "parametrizations.weight.original0")}
    standardized = weight_standardization(nn.Conv1d(2, 2, 2))
    assert [*norm_parameters(standardized)] == [standardized.bias]


@pytest.mark.parametrize("module", [bnlight.norm.weight, bnlight.norm.weight_init])
def test_the_examples_run(module):
    found = doctest.testmod(module)
    assert found.attempted
    assert not found.failed
