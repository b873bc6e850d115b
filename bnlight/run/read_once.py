"""The config files of a sweep are read once: a third of what composing a job's config costs is their YAML."""

from __future__ import annotations

import copy
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra.core.global_hydra import GlobalHydra
from hydra.plugins.config_source import ConfigResult


class ReadOnce(ConfigRepository):
    """Hydra's repository, with every file as it was when first read: editing one changes no job of a running sweep."""

    def __init__(self, stock: ConfigRepository) -> None:
        vars(self).update(vars(stock))
        self.files: dict[tuple[str, ...], ConfigResult | None] = {}

    def load_config(self, config_path: str) -> ConfigResult | None:
        """A copy, as composing changes what it is given."""
        key = (config_path, *(f"{source.scheme()}://{source.path}" for source in self.sources))
        if key not in self.files:
            self.files[key] = super().load_config(config_path)
        return copy.deepcopy(self.files[key])

    def __deepcopy__(self, memo: dict[int, Any]) -> ReadOnce:
        """Hydra takes one for each job, as a job may change the search path: the files stay common."""
        return copy.copy(self)


def read_once() -> None:
    """From now on, have the Hydra application of this process read each config file once."""
    loader = GlobalHydra.instance().config_loader()
    if isinstance(loader, ConfigLoaderImpl) and type(loader.repository) is ConfigRepository:
        loader.repository = ReadOnce(loader.repository)
