"""The metrics of many runs in one table; `metrics.csv` files with the same columns are parsed together."""

from __future__ import annotations

import io
from collections.abc import Sequence

import pandas as pd

from bnlight.compare.read.run import Run, why

KEYS = ("directory", "job", "norm", "step")
NUMBER = "__run__"  # which of the runs a line is of


def read_histories(runs: Sequence[Run]) -> pd.DataFrame:
    """One row per run and step: of each metric, the value of the last attempt that has one.

    What cannot be read becomes a note of its run.
    """
    by_header: dict[str, list[tuple[int, str]]] = {}
    lines: list[dict[str, float]] = []
    numbers: list[int] = []
    for index, run in enumerate(runs):
        if run.folder is None:
            lines += run.lines
            numbers += [index] * len(run.lines)
            continue
        try:
            text = (run.folder / "metrics.csv").read_text(encoding="utf-8")
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            run.notes.append(f"metrics.csv cannot be read ({why(error)})")
            continue
        # A line without its newline was cut by a kill: its last number may have lost digits.
        header, _, body = text[: text.rfind("\n") + 1].partition("\n")
        if header.strip():
            by_header.setdefault(header, []).append((index, body))
    tables = [_parsed(header, bodies, runs) for header, bodies in by_header.items()]
    tables.append(pd.DataFrame(lines).sort_index(axis="columns").assign(**{NUMBER: numbers}))
    tables = [table for table in tables if table is not None and len(table)]
    if not tables:
        return pd.DataFrame(columns=[*KEYS, "epoch", "time"])
    history = pd.concat(tables, ignore_index=True)
    number = history.pop(NUMBER).astype(int)
    labels = {
        "directory": [run.key for run in runs],
        "job": [run.row["job"] for run in runs],
        "norm": [run.row["norm"] for run in runs],
    }
    for name, values in labels.items():
        history[name] = pd.Series(values, dtype=object).reindex(number).to_numpy()
    if "attempt" in history:
        history = history.sort_values("attempt", kind="stable", na_position="first").drop(columns="attempt")
    # `last` takes the last value that is not missing, column by column.
    steps = history.groupby([*KEYS], sort=True, dropna=False)
    table = steps.last()
    if "epoch" in table:  # a step belongs to one, and a test after the training may have written the next
        table["epoch"] = steps["epoch"].min()
    return table.reset_index()


def _parsed(header: str, bodies: Sequence[tuple[int, str]], runs: Sequence[Run]) -> pd.DataFrame | None:
    lines = [f"{NUMBER},{header}"]
    for index, body in bodies:
        lines += [f"{index},{line}" for line in body.splitlines() if line]
    try:
        frame = pd.read_csv(io.StringIO("\n".join(lines) + "\n"), on_bad_lines="skip", low_memory=False)
    except (ValueError, pd.errors.ParserError) as error:
        if len(bodies) > 1:  # one of them: find it
            tables = [_parsed(header, [body], runs) for body in bodies]
            kept = [table for table in tables if table is not None]
            return pd.concat(kept, ignore_index=True) if kept else None
        runs[bodies[0][0]].notes.append(f"metrics.csv cannot be read ({why(error)})")
        return None
    if "step" not in frame:
        for index, _ in bodies:
            runs[index].notes.append("metrics.csv has no column step, left out")
        return None
    for name in frame.columns:
        if not pd.api.types.is_numeric_dtype(frame[name]):
            frame[name] = pd.to_numeric(frame[name], errors="coerce")
    return frame.dropna(axis="columns", how="all").dropna(subset=["step"])
