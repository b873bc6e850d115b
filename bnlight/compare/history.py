"""Read the `metrics.csv` of many jobs into one table: files with the same columns are parsed together."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

KEYS = ("directory", "job", "norm", "step")
NUMBER = "__job__"  # which of the jobs a line is of


def read_histories(jobs: Sequence[tuple[Path, Mapping[str, Any]]], notes: list[str]) -> pd.DataFrame:
    """One row per job and step: of each metric, the value of the last attempt that has one.

    `jobs` are directories with their rows, of which `job` and `norm` are taken. What cannot be read is noted.
    """
    by_header: dict[str, list[tuple[int, str]]] = {}
    for index, (folder, _) in enumerate(jobs):
        try:
            text = (folder / "metrics.csv").read_text(encoding="utf-8")
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            notes.append(f"{folder.name}: metrics.csv cannot be read ({_first_line(error)})")
            continue
        # A line without its newline was cut by a kill: its last number may have lost digits.
        header, _, body = text[: text.rfind("\n") + 1].partition("\n")
        if header.strip():
            by_header.setdefault(header, []).append((index, body))
    tables = []
    for header, bodies in by_header.items():
        names = [jobs[index][0].name for index, _ in bodies]
        table = _parsed(header, bodies, names, notes)
        if table is not None and len(table):
            tables.append(table)
    if not tables:
        return pd.DataFrame(columns=[*KEYS, "epoch", "time"])
    history = pd.concat(tables, ignore_index=True)
    number = history.pop(NUMBER).astype(int)
    labels = {
        "directory": [folder.name for folder, _ in jobs],
        "job": [row["job"] for _, row in jobs],
        "norm": [row["norm"] for _, row in jobs],
    }
    for name, values in labels.items():
        history[name] = pd.Series(values, dtype=object).reindex(number).to_numpy()
    if "attempt" in history:
        history = history.sort_values("attempt", kind="stable", na_position="first").drop(columns="attempt")
    # `last` takes the last value that is not missing, column by column.
    return history.groupby([*KEYS], sort=True, dropna=False).last().reset_index()


def _parsed(
    header: str, bodies: Sequence[tuple[int, str]], names: Sequence[str], notes: list[str]
) -> pd.DataFrame | None:
    lines = [f"{NUMBER},{header}"]
    for index, body in bodies:
        lines += [f"{index},{line}" for line in body.splitlines() if line]
    try:
        frame = pd.read_csv(io.StringIO("\n".join(lines) + "\n"), on_bad_lines="skip", low_memory=False)
    except (ValueError, pd.errors.ParserError) as error:
        if len(bodies) > 1:  # one of them: find it
            tables = [
                _parsed(header, [body], [name], notes) for body, name in zip(bodies, names, strict=True)
            ]
            kept = [table for table in tables if table is not None]
            return pd.concat(kept, ignore_index=True) if kept else None
        notes.append(f"{names[0]}: metrics.csv cannot be read ({_first_line(error)})")
        return None
    if "step" not in frame:
        notes.extend(f"{name}: metrics.csv has no column step, left out" for name in names)
        return None
    for name in frame.columns:
        if not pd.api.types.is_numeric_dtype(frame[name]):
            frame[name] = pd.to_numeric(frame[name], errors="coerce")
    return frame.dropna(axis="columns", how="all").dropna(subset=["step"])


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
