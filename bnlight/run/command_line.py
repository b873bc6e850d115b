"""Hydra's command line as bnlight takes it: overrides and flags in any order, and no flag without effect."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from bnlight.run.check import CommandError
from bnlight.run.groups import as_option

REFUSED = {
    "experimental_rerun": "--experimental-rerun is not for bnlight: the same command again goes on with its jobs",
    "shell_completion": "bnlight has no shell completion",
    "config_path": "--config-path is for scripts: --config-dir=FOLDER names the folder of your config files",
}
VALUES = {"cfg": "--cfg", "package": "--package", "info": "--info"}
SWITCHES = {
    "help": "--help",
    "hydra_help": "--hydra-help",
    "resolve": "--resolve",
    "run": "--run",
    "multirun": "-m",
}


@dataclass(frozen=True)
class CommandLine:
    """What was given: the primary config and its folder, where named, the flags, and the overrides."""

    name: str | None
    folder: Path | None
    flags: list[str]
    texts: list[str]

    @property
    def arguments(self) -> list[str]:
        """For Hydra, which finds the overrides only if they stand together."""
        return [*self.flags, *([] if "--hydra-help" in self.flags else self.texts)]


def read_command_line(arguments: Sequence[str]) -> CommandLine:
    """Raises CommandError for what is no flag of Hydra's, has no value, or would be without effect."""
    parser = get_args_parser()
    parser.error = _refuse  # type: ignore[method-assign]
    given = parser.parse_intermixed_args(list(arguments))
    for name, why in REFUSED.items():
        if getattr(given, name):
            raise CommandError(why)
    texts = [as_option(text) for text in given.overrides]
    folder = _folder(given)
    _refuse_without_effect(given, texts)
    flags = [flag for name, flag in SWITCHES.items() if getattr(given, name)]
    flags += [f"{flag}={getattr(given, name)}" for name, flag in VALUES.items() if getattr(given, name)]
    return CommandLine(given.config_name, folder, flags, texts)


def parsed(texts: Sequence[str]) -> list[Override]:
    """Those that Hydra's parser takes; what it refuses it will refuse again, with its own message."""
    found = []
    for text in texts:
        with contextlib.suppress(HydraException):
            found += OverridesParser.create().parse_overrides([text])
    return found


def _folder(given: argparse.Namespace) -> Path | None:
    if given.config_dir is None:
        return None
    folder = Path(given.config_dir)
    if not folder.is_dir():
        raise CommandError(f"--config-dir={folder}: there is no such folder")
    return folder


def _refuse_without_effect(given: argparse.Namespace, texts: list[str]) -> None:
    shows = [flag for name, flag in VALUES.items() if name != "package" and getattr(given, name)]
    shows += ["-m"] if given.multirun else []
    if len(shows) > 1:
        raise CommandError(
            f"{' and '.join(shows)}: choose one. --cfg and --info are of one job; --dry-run lists the jobs of a sweep, "
            "and each job's directory holds its config.yaml"
        )
    if given.package and not given.cfg:
        raise CommandError("--package is for --cfg: it names the part of the config that is shown")
    if given.resolve and not (given.cfg or given.help):
        raise CommandError("--resolve is for --cfg: it shows the config with its interpolations resolved")
    several = [str(one.input_line) for one in parsed(texts) if one.is_sweep_override()]
    if shows and not given.multirun and several:
        raise CommandError(f"{shows[0]} shows the config of one job, and {several[0]} are several")


def _refuse(message: str) -> NoReturn:
    raise CommandError(f"{message}. Overrides are key=value; the flags: bnlight train --help")
