"""norm_parameters finds what an optimizer should not decay: the norms' parameters and every bias, once."""

import doctest

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from zoo import timm_is_there

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


def test_of_a_parametrized_norm_or_bias_its_originals_are_found():
    class Doubled(nn.Module):
        def forward(self, value):
            return 2 * value

    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4))
    parametrize.register_parametrization(model[0], "weight", Doubled())
    parametrize.register_parametrization(model[1], "bias", Doubled())
    parametrize.register_parametrization(model[1], "weight", Doubled())
    stems = {f"{path}.parametrizations.{name}.original" for path, name in ((0, "weight"), (1, "bias"))}
    assert names(model) == {"0.bias", *stems}


class LlamaRMSNorm(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))


class NormalizedLinear(LlamaRMSNorm):
    """No norm, for all its name."""


class BlockWithNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.ones(2, 2))


def test_what_is_called_a_norm_counts_as_one():
    model = nn.Sequential(LlamaRMSNorm(4), NormalizedLinear(4), BlockWithNorm())
    assert names(model) == {"0.weight"}


@pytest.mark.skipif(not timm_is_there(), reason="timm, or a torchvision that fits torch, is not installed")
def test_every_parameter_of_timms_norms_is_found():
    from timm import layers

    for name in (
        *(
            "BatchNormAct2d",
            "GroupNormAct",
            "LayerNorm2d",
            "GroupNorm1",
            "RmsNorm",
            "RmsNorm2d",
            "LayerNormAct",
        ),
        *("FilterResponseNormTlu2d", "EvoNorm2dB0", "EvoNorm2dS0", "LayerNormExp2d", "SimpleNorm"),
    ):
        kind = getattr(layers, name, None)
        if kind is None:
            continue
        layer = kind(32)
        assert names(layer) == {name for name, _ in layer.named_parameters()} != set(), name


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
