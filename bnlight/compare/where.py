"""Find settings by short names, and keep the runs that a filter such as `data.batch_size<=16` asks for."""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from bnlight.compare.axes import NULL, shown

_FILTER = re.compile(r"\s*([^\s<>=!]+)\s*(<=|>=|!=|==|=|<|>)\s*(.*?)\s*")
_SIGNS: dict[str, Callable[[Any, Any], Any]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
# What a run is, beside its settings; never what came out of it.
_COLUMNS = (
    *("state", "seed", "norm", "model", "data", "sweep", "source", "job", "directory", "world_size"),
    *("hardware", "versions", "git"),
)


def resolve(name: str, keys: Sequence[str], varying: Sequence[str] = ()) -> str:
    """The config key that `name` means: itself, or the only one that ends in it (`lr` is `optimizer.lr`).

    A key that varies goes before one that does not. Raises ValueError, with the choices, where none or several fit.
    """
    asked = name.strip().replace(" ", "_")
    if asked in keys:
        return asked
    for pool in (varying, keys):
        found = [key for key in pool if key.endswith(f".{asked}")]
        if len(found) == 1:
            return found[0]
        if found:
            raise ValueError(
                f"{name!r} could be any of {', '.join(sorted(found))}: write one of them in full"
            )
    tails = {key.rpartition(".")[2]: key for key in keys} | {key: key for key in keys}
    hint = did_you_mean(asked, tails)
    choices = ", ".join(varying) or "none"
    raise ValueError(f"the runs have no setting {name!r}.{hint} What varies between them: {choices}")


def did_you_mean(asked: str, names: Iterable[str] | Mapping[str, str]) -> str:
    """A sentence with the names that are nearly the one asked for; of a mapping, with what they stand for."""
    known = names if isinstance(names, Mapping) else {name: name for name in names}
    plain = {re.sub(r"[\W_]+", "_", name.casefold()): full for name, full in known.items()}
    close = difflib.get_close_matches(re.sub(r"[\W_]+", "_", asked.casefold()), plain, n=3)
    return f" Did you mean {' or '.join(dict.fromkeys(plain[name] for name in close))}?" if close else ""


@dataclass(frozen=True)
class Filter:
    """One condition on a run's settings: a key, a sign, and the value or values it is held against."""

    key: str
    sign: str
    values: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.key}{self.sign}{','.join(self.values)}"

    def keeps(self, column: pd.Series) -> pd.Series:
        """Which runs satisfy it. A run without the setting satisfies `!=` and `=null` alone."""
        if self.sign in _SIGNS:
            numbers = pd.to_numeric(column, errors="coerce")
            return pd.Series(_SIGNS[self.sign](numbers, float(self.values[0])), column.index)
        wanted = {_comparable(value) for value in self.values}
        wanted |= {"-"} if NULL in wanted else set()
        equal = column.map(lambda value: _comparable(shown(value)) in wanted)
        return ~equal if self.sign == "!=" else equal


def parse(text: str) -> Filter:
    """`norm=batch,renorm`, `seed!=3`, `data.batch_size<=16`; raises ValueError where it is none of these."""
    found = _FILTER.fullmatch(text)
    if not found or not found[3]:
        raise ValueError(
            f"{text!r} is no filter: expected KEY=VALUE[,VALUE...], KEY!=VALUE[,VALUE...] or KEY<=NUMBER (<, >, >=), "
            "such as norm=batch,renorm or 'data.batch_size<=16' (in quotes: the shell reads < and >)"
        )
    key, sign, rest = found.groups()
    values = tuple(value.strip() for value in rest.split(","))
    if sign in _SIGNS and (len(values) > 1 or not _is_number(values[0])):
        raise ValueError(f"{text!r}: {sign} takes one number, not {rest!r}")
    return Filter(key, "=" if sign == "==" else sign, values)


def select(
    runs: pd.DataFrame, configs: pd.DataFrame, where: str | Sequence[str], varying: Sequence[str] = ()
) -> pd.Series:
    """Which runs satisfy all filters of `where`, as a boolean column.

    Raises ValueError for what is no filter, an unknown setting, a result (runs are chosen by what they are, not
    by what came out), and filters that leave nothing.
    """
    kept = pd.Series(True, index=runs.index)
    for text in [where] if isinstance(where, str) else where:
        one = parse(text)
        column = _column(one.key, runs, configs, varying)
        satisfied = one.keeps(column).astype(bool)
        if not (kept & satisfied).any():
            values = sorted({shown(value) for value in column[kept]})
            listed = ", ".join(values[:12]) + (", ..." if len(values) > 12 else "")
            hint = did_you_mean(one.values[0], values) if one.sign == "=" else ""
            raise ValueError(f"no run is left with {one}; {one.key} is one of: {listed}{hint and '.'}{hint}")
        kept &= satisfied
    return kept


def _column(key: str, runs: pd.DataFrame, configs: pd.DataFrame, varying: Sequence[str]) -> pd.Series:
    if key in _COLUMNS and key in runs:
        return runs[key]
    names = [str(name) for name in configs]
    if key in runs and key not in names and not any(name.endswith(f".{key}") for name in names):
        raise ValueError(
            f"{key!r} is a result: runs are chosen by their settings or {', '.join(_COLUMNS)}, since a choice "
            "by results would decide the comparison"
        )
    return configs[resolve(key, names, varying)].reindex(runs.index)


def _comparable(text: str) -> str | float:
    if _is_number(text):
        return float(text)
    return text.casefold()


def _is_number(text: str) -> bool:
    try:
        return float(text) == float(text)
    except ValueError:
        return False
