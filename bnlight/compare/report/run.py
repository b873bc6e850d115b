"""The W&B run that holds a comparison: its table, its page and its verdict."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnlight.compare.read.run import COMPARISON
from bnlight.compare.table import sweep_name

if TYPE_CHECKING:
    from bnlight.compare.comparison import Comparison

PAGE, TABLE = "comparison_page", "comparison_table"
SECONDS_TO_CONNECT = 30.0


def log_summary(comparison: Comparison, run_id: str, project: str, entity: str, online: bool) -> str | None:
    """Log the run and return its address, None offline; it then waits in `.report` for `bnlight wandb sync`.

    What an earlier call has left there goes: it was of an older comparison.
    """
    import wandb

    folder = comparison.output / ".report"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with _files_in(folder / "wandb"):
        run = wandb.init(
            mode="online" if online else "offline",
            project=project,
            entity=entity or None,
            id=run_id,
            name=f"comparison of {sweep_name(comparison)}",
            group=sweep_name(comparison),
            job_type=COMPARISON,
            tags=[COMPARISON],
            config={
                "sources": comparison.sources,
                "command": comparison.command,
                "metric": comparison.metric,
            },
            dir=str(folder),
            reinit="finish_previous",
            settings=wandb.Settings(
                console="off", silent=True, init_timeout=SECONDS_TO_CONNECT, x_save_requirements=False
            ),
        )
        run.log({TABLE: _table(comparison)}, commit=False)
        run.log({PAGE: wandb.Html(comparison.page.read_text(encoding="utf-8"), inject=False)})
        run.summary.update(
            {
                "verdict": comparison.verdict,
                "findings": [finding.text for finding in comparison.findings],
                "caveats": comparison.caveats,
            }
        )
        url = None if run.offline else run.url
        run.finish()
    return url


def _table(comparison: Comparison) -> Any:
    """The table's numbers, with what is missing as None."""
    import wandb

    numbers = comparison.table
    numbers.insert(0, "contender", [cell.contender for cell in comparison.cells])
    rows: list[Any] = [[_plain(value) for value in row] for row in numbers.itertuples(index=False)]
    return wandb.Table(columns=list(map(str, numbers)), data=rows, allow_mixed_types=True)


def _plain(value: Any) -> Any:
    plain = value.item() if hasattr(value, "item") else value  # numpy's
    return None if isinstance(plain, float) and not math.isfinite(plain) else plain


@contextmanager
def _files_in(folder: Path) -> Iterator[None]:
    """W&B's cache and copies lie in `folder` meanwhile, unless the environment says where."""
    places = {"WANDB_CACHE_DIR": folder / ".cache", "WANDB_DATA_DIR": folder / ".data"}
    added = {name: str(place.absolute()) for name, place in places.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
