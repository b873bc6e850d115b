"""The command lines that W&B's sweep agent makes, as Hydra's overrides.

The agent writes each parameter as `name=str(value)`, in Python's spelling: `None`, `True`, `{'lr': 0.1}`. When it
resumes a run it sends the run's whole config, each top-level block as one such dict.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException

from bnlight.lightning.build import literal

HYDRA_TAKES = ("--config-", "--cfg", "--info", "--package", "--experimental-rerun")
# W&B's, and where and how it ran before.
NOT_ASKED = ("_wandb", "wandb_version", "job", "paths", "rerun", "hydra")
ABSENT = object()


def of_agent() -> bool:
    """Whether a W&B sweep's agent has started this process."""
    return bool(os.environ.get("WANDB_SWEEP_ID"))


def run_id() -> str | None:
    """The id of the run that the agent has begun for this process."""
    return os.environ.get("WANDB_RUN_ID") if of_agent() else None


def overrides(arguments: Sequence[str]) -> list[str]:
    """What an agent sends, `key=value` or `--key=value`, as overrides; other arguments as they are.

    A dict becomes an override for each key in it. One that describes a config group, `norm={'_target_': ...}`,
    becomes the option that it came from and what differs from it; a whole config, with its `job`, becomes what was
    typed for it then and what differs. Raises CommandError where that config can no longer be composed.
    """
    rest: list[str] = []
    plain: dict[str, Any] = {}
    blocks: dict[str, dict[Any, Any]] = {}
    for argument in arguments:
        key, equals, text = argument.removeprefix("--").partition("=")
        value = _read(text)
        if not equals or argument.startswith(HYDRA_TAKES):
            rest.append(argument)
        elif isinstance(value, dict):
            blocks[key] = value
        elif key not in NOT_ASKED:
            plain[key] = value
    now = [f"{key}={_typed(value)}" for key, value in plain.items()]
    then = [
        line for line in blocks.get("job", {}).get("overrides", []) if _key(line) not in {*plain, *NOT_ASKED}
    ]
    blocks = {key: block for key, block in blocks.items() if key not in NOT_ASKED}
    return [*rest, *then, *now, *(_differences(blocks, [*then, *now]) if blocks else [])]


def hydras(value: Any) -> str:
    """`value` as Hydra's grammar spells it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{','.join(map(hydras, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{hydras(item)}" for key, item in value.items()) + "}"
    return str(QuotedString(text=literal(str(value)), quote=Quote.single).with_quotes())


def _read(text: str) -> Any:
    """The Python value that the agent has written; what is none stays the text that it is."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _typed(value: Any) -> str:
    """A text stays as it is where Hydra reads it as one value; `a,b` would be a sweep, `it's` an error."""
    if not isinstance(value, str):
        return hydras(value)
    try:
        (override,) = OverridesParser.create().parse_overrides([f"key={value}"])
        if value == value.strip() and not override.is_sweep_override():
            return value
    except HydraException:
        pass
    return hydras(value)


def _differences(blocks: Mapping[str, dict[Any, Any]], typed: list[str]) -> list[str]:
    """Overrides that, with `typed`, make the config hold `blocks`."""
    from bnlight.run.application import compose_job

    chosen = {_key(line) for line in typed}
    options = {key: _option(key, block) for key, block in blocks.items() if key not in chosen}
    found = [f"{key}={option}" for key, option in options.items() if option]
    found += [f"{key}._target_={blocks[key]['_target_']}" for key in options if options[key] == "custom"]
    composed = compose_job([*typed, *found])
    for key, block in blocks.items():
        for path, value in _leaves(key, block):
            present = _select(composed, path)
            if present is ABSENT and path == "norm.name":  # what bnlight adds for W&B
                continue
            if present is ABSENT or present != value:
                new = "+" if present is ABSENT and "_target_" in block else ""
                found.append(f"{new}{path}={hydras(value)}")
    return found


def _option(group: str, block: Mapping[Any, Any]) -> str | None:
    """The option of a config group that a resolved block came from: of the same class, with most values equal."""
    import bnlight.conf

    files = sorted(Path(bnlight.conf.__path__[0], group).glob("*.yaml"))
    if "_target_" not in block or not files:
        return None
    best, most = "custom", -1
    for file in files:
        option = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        if option.get("_target_", ABSENT) != block["_target_"]:
            continue
        equal = sum(_select({group: option}, path) == value for path, value in _leaves(group, block))
        if (equal, file.stem == block.get("name")) > (most, False):
            best, most = file.stem, equal
    return best


def _leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(f"{path}.{key}", item)
    else:
        yield path, value


def _select(config: Any, path: str) -> Any:
    for name in path.split("."):
        if not isinstance(config, Mapping) or name not in config:
            return ABSENT
        config = config[name]
    return config


def _key(line: str) -> str:
    return line.partition("=")[0].lstrip("+~")
