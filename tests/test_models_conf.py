"""The model group of the configuration, and the networks with bnlight's own norms."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf
from torch import nn

import bnlight.models
from bnlight.norm import NORMS

CONF = Path(__file__).parent.parent / "conf" / "model"
FILES = {path.stem: path for path in CONF.glob("*.yaml")}
GIVEN = {"input_shape", "num_classes", "norm"}  # the job puts them in


@pytest.mark.parametrize("name", sorted(FILES.keys() - {"custom"}))
def test_a_model_file_names_every_argument_and_gives_the_defaults(name: str) -> None:
    config: Any = OmegaConf.to_container(OmegaConf.load(FILES[name]))
    taken = inspect.signature(get_class(config.pop("_target_"))).parameters
    assert set(config) == set(taken) - GIVEN
    for argument, value in config.items():
        default = taken[argument].default
        assert value == (list(default) if isinstance(default, tuple) else default), argument


@pytest.mark.parametrize("name", sorted(FILES.keys() - {"custom"}))
def test_a_model_file_builds_a_network_for_digits(name: str) -> None:
    config = OmegaConf.load(FILES[name])
    model = instantiate(config, input_shape=[1, 8, 8], num_classes=10, norm=nn.Identity)
    assert model(torch.randn(3, 1, 8, 8)).shape == (3, 10)


def test_every_network_has_a_file_and_a_custom_one_only_asks_for_a_target() -> None:
    targets = {OmegaConf.load(path)._target_ for name, path in FILES.items() if name != "custom"}
    assert targets == {f"bnlight.models.{name}" for name in ("MLP", "CNN", "ResNet")}
    assert {name for name in bnlight.models.__all__ if name != "ACTIVATIONS"} == {"MLP", "CNN", "ResNet"}
    custom = OmegaConf.load(FILES["custom"])
    assert OmegaConf.is_missing(custom, "_target_")
    assert len(custom) == 1


@pytest.mark.parametrize("placement", ["before", "after"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("model", ["MLP", "CNN", "ResNet"])
def test_every_norm_of_bnlight_works_in_every_network(model: str, norm: str, placement: str) -> None:
    options: dict[str, Any] = {"depth": 8, "zero_init_residual": True} if model == "ResNet" else {}
    network = getattr(bnlight.models, model)((1, 8, 8), 10, NORMS[norm], placement=placement, **options)
    x = torch.randn(6, 1, 8, 8)
    if model == "MLP" and norm.endswith("instance"):  # one value per sample and channel cannot be normalized
        with pytest.raises(ValueError, match="InstanceNorm"):
            network(x)
        return
    if model == "MLP" and norm == "frn":
        with pytest.warns(UserWarning, match="learn_eps=True"):
            network(x)
    logits = network(x)
    logits.square().sum().backward()
    assert logits.isfinite().all()
    assert network.eval()(x).shape == (6, 10)
    biases = [m.bias is not None for m in network.features.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert set(biases) == {not (placement == "before" and getattr(NORMS[norm], "cancels_bias", False))}
