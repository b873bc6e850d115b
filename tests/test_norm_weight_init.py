"""Weight normalization is initialized from data: every output has mean 0 and variance 1 in the next forward."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from weights import case, network, originals, parametrized

from bnlight.models import CNN, MLP, ResNet
from bnlight.norm import NORMS, initialize_weight_norm, weight_norm, weight_standardization

assert case  # a fixture


@pytest.mark.parametrize("build", [MLP, CNN, lambda *a, **o: ResNet(*a, depth=8, **o)])
def test_every_layers_output_has_mean_0_and_variance_1_in_the_next_forward(build):
    model = weight_norm(build((1, 8, 8), 10, NORMS["none"]).double())
    x = torch.randn(32, 1, 8, 8, dtype=torch.float64) * 3 + 1
    assert initialize_weight_norm(model, (x, "labels")) is model
    seen: list[Tensor] = []
    for module in model.modules():
        if parametrize.is_parametrized(module):
            module.register_forward_hook(lambda module, args, output: seen.append(output))
    model(x)
    assert len(seen) == len(parametrized(model)) >= 4
    for t in seen:
        variance, mean = torch.var_mean(t.transpose(0, 1).flatten(1), 1, correction=0)
        torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-12, rtol=0)
        torch.testing.assert_close(variance, torch.ones_like(mean), atol=1e-11, rtol=0)


def test_length_and_bias_are_those_of_the_paper(case):
    layer, x = case
    v = layer.weight.detach().clone()
    weight_norm(layer)
    unit = copy.deepcopy(layer)
    with torch.no_grad():
        originals(unit)[0].fill_(1)
        if unit.bias is not None:
            unit.bias.zero_()
        t = unit(x)
        originals(layer)[0].fill_(0)  # what it was before does not matter
    axis = t.dim() - 1 if isinstance(layer, nn.Linear) else 1
    variance, mean = torch.var_mean(t.movedim(axis, 0).flatten(1), 1, correction=0)
    initialize_weight_norm(layer, x)
    g, direction = originals(layer)
    torch.testing.assert_close(g.flatten(), variance.rsqrt())
    assert torch.equal(direction, v)
    if layer.bias is not None:
        torch.testing.assert_close(layer.bias, -mean * variance.rsqrt())


def test_unbatched_input_and_a_forward_of_ones_own():
    conv = weight_norm(nn.Conv1d(2, 3, 2).double())
    x = torch.randn(2, 50, dtype=torch.float64)
    initialize_weight_norm(conv, {"x": x}, forward=lambda batch: conv(batch["x"]))
    torch.testing.assert_close(conv(x).mean(dim=1), torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(conv(x).square().mean(dim=1), torch.ones(3, dtype=torch.float64))


def test_a_layer_called_twice_is_initialized_at_its_first_call():
    layer = weight_norm(nn.Linear(3, 3).double())
    x = torch.randn(20, 3, dtype=torch.float64)
    initialize_weight_norm(nn.Sequential(layer, nn.ReLU(), layer), x)
    torch.testing.assert_close(torch.var(layer(x), 0, correction=0), torch.ones(3, dtype=torch.float64))


def test_running_statistics_move_by_one_forward_in_training_and_not_in_evaluation():
    for training in (True, False):
        model = weight_norm(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))).train(
            training
        )
        initialize_weight_norm(model, torch.randn(9, 3))
        assert model.training == training
        assert int(model[1].num_batches_tracked) == training
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_dead_outputs_and_layers_not_called_keep_what_they_have_and_are_named():
    model = nn.ModuleDict({"used": nn.Linear(3, 2), "idle": nn.Linear(3, 2)})
    weight_norm(model)
    with torch.no_grad():
        originals(model["used"])[1][0] = torch.tensor([1.0, 0.0, 0.0])
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(10, 3)
    x[:, 0] = 7.0  # so the first output is the same throughout
    with (
        pytest.warns(UserWarning, match=r"1 of 2 outputs of used \(.*same throughout"),
        pytest.warns(UserWarning, match=r"did not call idle \("),
    ):
        initialize_weight_norm(model, x, forward=model["used"])
    after = model.state_dict()
    for name, value in after.items():
        assert torch.equal(value[0], before[name][0]), name
        if "idle" in name:
            assert torch.equal(value, before[name])
    assert after["used.bias"][1] != before["used.bias"][1]


@pytest.mark.parametrize(
    ("x", "said"),
    [
        (torch.randn(1, 3), r"0 \(.*shape \(1, 4\), less than two values"),
        (torch.full((5, 3), math.nan), "not finite"),
        (torch.randn(5, 4), "mat1 and mat2"),
    ],
)
def test_an_error_leaves_the_model_as_it_was(x, said):
    model = weight_norm(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises((ValueError, RuntimeError), match=said):
        initialize_weight_norm(model, x)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_an_error_in_a_later_layer_undoes_the_earlier_ones():
    def fail(batch):
        model[0](batch)
        raise RuntimeError("as asked")

    model = weight_norm(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="as asked"):
        initialize_weight_norm(model, torch.randn(8, 3), forward=fail)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_without_weight_norm_is_refused():
    with pytest.raises(ValueError, match=r"call weight_norm\(model\) first"):
        initialize_weight_norm(weight_standardization(network()), torch.randn(2, 1, 8, 8))
