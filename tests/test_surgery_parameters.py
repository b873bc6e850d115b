"""norm_parameters finds what an optimizer should not decay: the norms' parameters and every bias, once."""

import doctest

import pytest
import torch
from torch import nn

from bnlight.norm import NORMS
from bnlight.surgery import norm_parameters, parameters, regularize


def names(model: nn.Module) -> set[str]:
    found = [*norm_parameters(model)]
    assert len(found) == len({id(p) for p in found})
    chosen = {id(p) for p in found}
    return {name for name, parameter in model.named_parameters() if id(parameter) in chosen}


@pytest.mark.parametrize("name", NORMS)
def test_every_parameter_of_our_layers_is_found(name):
    layer = NORMS[name](4, affine=True)
    assert names(layer) == {name for name, _ in layer.named_parameters()} >= {"weight", "bias"}


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm1d(4),
        nn.BatchNorm3d(4),
        nn.SyncBatchNorm(4),
        nn.LazyBatchNorm2d(),
        nn.InstanceNorm2d(4, affine=True),
        nn.GroupNorm(2, 4),
        nn.LayerNorm(4),
        nn.RMSNorm(4),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_every_parameter_of_torchs_layers_is_found(layer):
    assert names(layer) == {name for name, _ in layer.named_parameters()} != set()


def test_every_bias_is_found_and_no_other_weight():
    model = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 3), "linear": nn.Linear(4, 4), "lstm": nn.LSTM(4, 4)})
    assert names(model) == {"conv.bias", "linear.bias", "lstm.bias_ih_l0", "lstm.bias_hh_l0"}


def test_shared_modules_and_parameters_come_once():
    norm, linear, other = nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 4)
    other.bias = linear.bias
    assert names(nn.Sequential(norm, linear, norm, other)) == {"0.weight", "0.bias", "1.bias"}


def test_the_groups_of_an_optimizer_cover_the_model():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), NORMS["renorm"](8), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
    plain = set(norm_parameters(model))
    decayed = [p for p in model.parameters() if p not in plain]
    optimizer = torch.optim.SGD(
        [{"params": decayed, "weight_decay": 0.1}, {"params": [*plain], "weight_decay": 0.0}], lr=0.1
    )
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len([*model.parameters()])
    assert len(decayed) == 2


@pytest.mark.parametrize("file", [parameters, regularize])
def test_the_examples_run(file):
    result = doctest.testmod(file)
    assert result.attempted
    assert result.failed == 0
