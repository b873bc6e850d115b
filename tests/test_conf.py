"""Every file under conf/ and sweeps/ composes, and what it names can be built."""

from __future__ import annotations

from pathlib import Path

import bnlight.conf
import bnlight.sweeps
import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from bnlight.lightning.build import arguments, instantiate
from bnlight.norm import NORMS
from bnlight.run import identity, searchpath
from bnlight.run.application import VERSION_BASE

CONF = Path(bnlight.conf.__path__[0])
OPTIONS = sorted((path.parent.name, path.stem) for path in CONF.glob("*/*.yaml"))


@pytest.fixture(autouse=True)
def _resolvers() -> None:
    identity.register()
    searchpath.register()


def test_the_table_of_norms_is_the_norm_group() -> None:
    assert {*NORMS, "custom"} == {path.stem for path in (CONF / "norm").glob("*.yaml")}


@pytest.mark.parametrize("name", NORMS)
def test_a_norm_file_names_its_class_and_each_of_its_arguments_with_its_default(name: str) -> None:
    config = OmegaConf.to_container(OmegaConf.load(CONF / "norm" / f"{name}.yaml"))
    layer = instantiate(config)(8)
    assert type(layer) is NORMS[name]
    given = {key: value for key, value in config.items() if not key.startswith("_")}
    defaults = {key: parameter.default for key, parameter in arguments(config).items()}
    assert given == {key: defaults[key] for key in given}
    left_out = defaults.keys() - given.keys() - {"num_features", "channel_dim", "device", "dtype"}
    assert left_out <= {"eps", "bias", "affine"}  # NoNorm's, which change nothing without affine


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_each_option_composes_and_its_keys_are_arguments_of_its_target(group: str, option: str) -> None:
    custom = [f"{group}._target_=torch.nn.Identity"] if option == "custom" else []
    with initialize_config_module("bnlight.conf", **VERSION_BASE):
        config = OmegaConf.to_container(compose("train", [f"{group}={option}", *custom])[group], resolve=True)
    parts = config.values() if group == "callbacks" else [config]
    for part in parts:
        if not part["_target_"] or option == "custom":
            continue
        known = arguments(part)
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
            assert {key for key in part if not key.startswith("_")} <= known.keys()


@pytest.mark.parametrize("name", [path.stem for path in Path(bnlight.sweeps.__path__[0]).glob("*.yaml")])
def test_each_sweep_composes_and_says_what_it_asks(name: str) -> None:
    with initialize_config_module("bnlight.conf", **VERSION_BASE):
        config = compose(name, return_hydra_config=True)
    assert config.hydra.mode.name == "MULTIRUN"
    assert config.hydra.sweeper.params
    text = (Path(bnlight.sweeps.__path__[0]) / f"{name}.yaml").read_text()
    assert "?" in text.splitlines()[0]
