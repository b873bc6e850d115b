"""The Hydra application: composes the config of each job and hands it over, with errors that show the choices."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import hydra
import yaml
from hydra import compose, initialize_config_dir, initialize_config_module
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bnlight.lightning.build import any_target
from bnlight.run import identity, searchpath, sweep
from bnlight.run.check import check_config
from bnlight.run.command_line import CommandLine, parsed, read_command_line
from bnlight.run.explain import explain
from bnlight.run.groups import without_null
from bnlight.run.job import CommandError, run_job
from bnlight.run.launch import launchers

# Hydra 1.3 warns without a version base, 1.4 with one.
VERSION_BASE: Any = {} if any_target() else {"version_base": "1.3"}
TRUST: Any = {"execution_whitelist": any_target()} if any_target() else {}


def run_hydra(
    arguments: list[str],
    config_name: str,
    folder: Path | None = None,
    task: Callable[[DictConfig], Any] = run_job,
) -> None:
    """Run Hydra's application on `arguments`, a single job or a sweep.

    The primary config is `config_name` in `folder`, or in the package; `--config-dir` and `--config-name` among
    the arguments win. Raises CommandError for keys and options that do not exist, and what the jobs raise.
    """
    identity.register()
    searchpath.register()
    launchers.register()
    line = read_command_line(arguments)
    primary = _primary(line, config_name, folder)
    try:
        _expect_a_job(primary)
        application = hydra.main(config_path=primary.path, config_name=primary.name, **VERSION_BASE, **TRUST)(
            task
        )
        with _hydra_raises(), _root_logger_kept(), _argv(["bnlight", *line.arguments]):
            application()
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise CommandError(explain(error, line.texts, primary)) from error
    if sweep.current is not None and sweep.current.empty:
        raise CommandError(f"the sweep has no jobs: {' and '.join(sweep.current.empty)} matches nothing")


def compose_job(arguments: list[str]) -> dict[str, Any]:
    """The resolved config that one job of this command line would have; nothing is run or written.

    Raises CommandError as `run_hydra` does, and for what is no override.
    """
    identity.register()
    searchpath.register()
    launchers.register()
    line = read_command_line(arguments)
    primary = _primary(line, "train", None)
    strange = [text for text in line.texts if not parsed([text])]
    if line.flags or strange:
        raise CommandError(
            f"{' '.join([*line.flags, *strange])}: expected overrides, such as norm=batch data.batch_size=8"
        )
    try:
        _expect_a_job(primary)
        composed = primary.compose(line.texts)
        check_config(composed, line.texts)
        config = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise CommandError(explain(error, line.texts, primary)) from error
    assert isinstance(config, dict)
    without_null(config)
    return {str(key): value for key, value in config.items()}


class Primary(NamedTuple):
    """The primary config: its name, and the user's folder that comes before the package (None: the package)."""

    name: str
    folder: Path | None

    @property
    def path(self) -> str:
        return str(self.folder.absolute()) if self.folder else "pkg://bnlight.conf"

    def compose(self, overrides: list[str], **options: bool) -> DictConfig:
        """The config as one job would have it."""
        if self.folder is None:
            start: Any = initialize_config_module("bnlight.conf", **VERSION_BASE)
        else:
            start = initialize_config_dir(self.path, **VERSION_BASE)
        with start:
            return compose(self.name, overrides, **options)


def available_sweeps() -> dict[str, str]:
    """The names of the sweeps in ./sweeps and in the package, and what each asks: its first line."""
    import bnlight.sweeps

    folders = [*map(Path, bnlight.sweeps.__path__), Path("sweeps")]
    files = {file.stem: file for folder in folders for file in folder.glob("*.yaml")}
    return {name: _first_comment(files[name]) for name in sorted(files)}


def _first_comment(file: Path) -> str:
    lines = file.read_text(encoding="utf-8").strip().splitlines() or [""]
    return lines[0].removeprefix("#").strip() if lines[0].startswith("#") else ""


@contextlib.contextmanager
def _hydra_raises() -> Iterator[None]:
    """Have Hydra raise its exceptions instead of printing them and leaving."""
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("HYDRA_FULL_ERROR", None)
        else:
            os.environ["HYDRA_FULL_ERROR"] = before


@contextlib.contextmanager
def _root_logger_kept() -> Iterator[None]:
    """Hydra's --cfg and --info write to the standard output by a handler that they leave on the root logger."""
    root = logging.getLogger()
    handlers, level = [*root.handlers], root.level
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


@contextlib.contextmanager
def _argv(arguments: list[str]) -> Iterator[None]:
    before, sys.argv = sys.argv, arguments
    try:
        yield
    finally:
        sys.argv = before


def _primary(line: CommandLine, name: str, folder: Path | None) -> Primary:
    """The file that the command line names; `--config-dir` beside a sweep file of one's own is searched as well."""
    both = folder is not None and line.folder is not None and not (line.folder / f"{name}.yaml").is_file()
    searchpath.also[:] = [str(line.folder.absolute())] if both and line.folder else []
    return Primary(line.name or name, folder if both else line.folder or folder)


def _expect_a_job(primary: Primary) -> None:
    """A sweep file that does not begin with train has nothing to run."""
    if primary != ("train", None) and "norm" not in primary.compose([], return_hydra_config=True):
        raise CommandError(
            f"{primary.name}.yaml does not extend train, so there is no job: begin it with 'defaults: [train, _self_]'"
        )
