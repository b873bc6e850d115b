"""Makes bnlight's config groups and sweeps visible to a Hydra application."""

from __future__ import annotations

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin

also: list[str] = []  # folders of this command that come before the package


class BnlightSearchPath(SearchPathPlugin):
    """Appends `also`, `pkg://bnlight.conf` and `pkg://bnlight.sweeps`: an application's own groups come first."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        there = {element.path for element in search_path.get_path()}
        for path in (*(f"file://{folder}" for folder in also), "pkg://bnlight.conf", "pkg://bnlight.sweeps"):
            if path not in there:
                search_path.append("bnlight", path)


def register() -> None:
    """Register the plugin in this process, where Hydra has not found it already."""
    plugins = Plugins.instance()
    if BnlightSearchPath not in plugins.discover(SearchPathPlugin):
        plugins.register(BnlightSearchPath)
