"""The data group of the configuration."""

import inspect
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf

from bnlight.data import Shift, TensorData

CONF = Path(__file__).parent.parent / "conf" / "data"
FILES = {path.stem: path for path in CONF.glob("*.yaml")}


def arguments(source: type[TensorData]) -> dict[str, Any]:
    """Every argument of a data module with its default, those of its base classes included."""
    found: dict[str, Any] = {}
    for base in source.__mro__[: source.__mro__.index(TensorData) + 1]:
        for name, parameter in inspect.signature(base.__init__).parameters.items():
            if name != "self" and parameter.kind is not parameter.VAR_KEYWORD:
                found.setdefault(name, parameter.default)
    if not source.can_augment:
        del found["augment"]
    return found


@pytest.mark.parametrize("name", sorted(FILES.keys() - {"custom"}))
def test_a_data_file_names_every_argument_and_gives_the_defaults(name: str) -> None:
    config: Any = OmegaConf.to_container(OmegaConf.load(FILES[name]), resolve=False)
    expected = arguments(get_class(config.pop("_target_")))
    assert set(config) == set(expected)
    if "root" in config:
        assert config.pop("root") == "${paths.data}"
    assert Shift(**config.pop("shift")) == Shift()
    for argument, value in config.items():
        assert value == expected[argument], argument


@pytest.mark.parametrize("name", sorted(FILES.keys() - {"custom"}))
def test_a_data_file_builds_a_data_module(name: str, tmp_path: Path) -> None:
    config = OmegaConf.create({"paths": {"data": str(tmp_path)}, "data": OmegaConf.load(FILES[name])})
    data = instantiate(config.data)
    assert isinstance(data, TensorData)
    assert len(data.input_shape) == 3
    assert data.num_classes == 10


def test_a_custom_data_file_only_asks_for_a_target() -> None:
    custom = OmegaConf.load(FILES["custom"])
    assert OmegaConf.is_missing(custom, "_target_")
    assert len(custom) == 1
    assert set(FILES) == {"digits", "mnist", "fashion_mnist", "cifar10", "custom"}
