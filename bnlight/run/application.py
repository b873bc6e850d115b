"""The Hydra application: composes the config of each job and hands it over, with errors that show the choices."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import hydra
import yaml
from hydra import compose, initialize_config_dir, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import ConfigCompositionException, HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bnlight.lightning.build import any_target
from bnlight.run import identity, searchpath
from bnlight.run.job import CommandError, run_job
from bnlight.run.launch import launchers
from bnlight.run.launch.search import installed

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
    named, arguments = _take(arguments, "--config-name", "-cn")
    where, arguments = _take(arguments, "--config-dir", "-cd")
    primary = Primary(named or config_name, Path(where) if where else folder)
    overrides = _overrides(arguments)
    try:
        _refuse_new_top_level_keys(overrides, primary)
        application = hydra.main(config_path=primary.path, config_name=primary.name, **VERSION_BASE, **TRUST)(
            task
        )
        with _hydra_raises(), _argv(["bnlight", *arguments]):
            application()
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise CommandError(_explain(error, overrides, primary)) from error


def compose_job(arguments: list[str]) -> dict[str, Any]:
    """The resolved config that one job of this command line would have; nothing is run or written.

    Raises CommandError as `run_hydra` does, and for what is no override.
    """
    identity.register()
    searchpath.register()
    launchers.register()
    named, arguments = _take(arguments, "--config-name", "-cn")
    where, arguments = _take(arguments, "--config-dir", "-cd")
    primary = Primary(named or "train", Path(where) if where else None)
    overrides = _overrides(arguments)
    strange = [text for text in arguments if text not in {override.input_line for override in overrides}]
    if strange:
        raise CommandError(f"{' '.join(strange)}: expected overrides, such as norm=batch data.batch_size=8")
    try:
        _refuse_new_top_level_keys(overrides, primary)
        config = OmegaConf.to_container(primary.compose(arguments), resolve=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise CommandError(_explain(error, overrides, primary)) from error
    assert isinstance(config, dict)
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
def _argv(arguments: list[str]) -> Iterator[None]:
    before, sys.argv = sys.argv, arguments
    try:
        yield
    finally:
        sys.argv = before


def _take(arguments: list[str], *names: str) -> tuple[str | None, list[str]]:
    """The value of an option, `--name value` or `--name=value`, and the arguments without it."""
    for index, argument in enumerate(arguments):
        key, equals, value = argument.partition("=")
        if key in names:
            rest = index + (1 if equals else 2)
            return value or " ".join(arguments[index + 1 : rest]), arguments[:index] + arguments[rest:]
    return None, arguments


def _overrides(arguments: list[str]) -> list[Override]:
    """The `key=value` arguments, parsed; what Hydra's parser refuses it will refuse again, with its own message."""
    texts = [
        text for text in arguments if re.match(r"[+~]{0,2}[\w@/.$-]+(=|$)", text) and not text.startswith("-")
    ]
    parsed = []
    for text in texts:
        with contextlib.suppress(HydraException):
            parsed += OverridesParser.create().parse_overrides([text])
    return parsed


def _refuse_new_top_level_keys(overrides: list[Override], primary: Primary) -> None:
    """`+nrom=group`, or `nrom:` in a sweep file, would silently become a plain value that nothing reads."""
    added = [override for override in overrides if override.is_add() or override.is_force_add()]
    if not added and primary == ("train", None):
        return
    known = {str(key) for key in Primary("train", None).compose([])}
    config = primary.compose([], return_hydra_config=True)
    if "norm" not in config:
        raise CommandError(
            f"{primary.name}.yaml does not extend train, so there is no job: begin it with 'defaults: [train, _self_]'"
        )
    for key in {str(key) for key in config} - known - {"hydra"}:
        raise CommandError(
            f"{primary.name}.yaml has a key '{key}' that nothing reads.\n{list_choices(key, known)}"
        )
    params = config.hydra.sweeper.get("params") or {}
    swept = _overrides([f"{key}={value}" for key, value in params.items()])
    for override in [
        *added,
        *(override for override in swept if override.is_add() or override.is_force_add()),
    ]:
        top = override.key_or_group.split(".", 1)[0].split("/", 1)[0]
        if top not in known and top != "hydra":
            raise CommandError(
                f"'{override.input_line}' adds a key that nothing reads.\n{list_choices(top, known)}"
            )


def _explain(error: Exception, overrides: list[Override], primary: Primary) -> str:
    """Hydra's error, or for a key that does not exist the keys that do."""
    if "hydra/sweeper/optuna" in str(error) and not installed():
        return "a search needs Hydra's Optuna sweeper: pip install 'bnlight[optuna]'"
    text = "\n".join(str(part) for part in (error, error.__cause__) if part is not None and str(part))
    missing = re.search(r"Missing mandatory value.*?full_key: (\S+)", text, re.DOTALL)
    if missing:
        return f"{missing.group(1)} has no value: give one on the command line, {missing.group(1)}=..."
    key = re.search(r"Key '([^']*)' is not in struct.*?full_key: (\S+)", text, re.DOTALL)
    if not isinstance(error, ConfigCompositionException) or key is None:
        return text
    path = key.group(2).split(".")
    kept = [
        o.input_line
        for o in overrides
        if o.input_line and "." not in o.key_or_group and o.key_or_group != key.group(2)
    ]
    try:
        config = primary.compose([line for line in kept if "," not in line])
    except (HydraException, OmegaConfBaseException):
        return text
    parent = OmegaConf.select(config, ".".join(path[:-1])) if len(path) > 1 else config
    if not isinstance(parent, DictConfig):
        return text
    where = f" in '{'.'.join(path[:-1])}'" if len(path) > 1 else ""
    return f"There is no key '{path[-1]}'{where}.\n{list_choices(path[-1], {str(k) for k in parent})}"


def list_choices(wanted: str, known: set[str]) -> str:
    """The keys that there are, the one that was meant first."""
    close = difflib.get_close_matches(wanted, known, n=1)
    hint = f"Did you mean '{close[0]}'? " if close else ""
    return f"{hint}Keys: {', '.join(sorted(known))}."
