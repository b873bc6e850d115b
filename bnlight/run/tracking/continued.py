"""Lightning's logger of a W&B run that is continued offline, where W&B itself would start again at step 0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pytorch_lightning.utilities import rank_zero_only

from bnlight.run.tracking.job import JobLogger
from bnlight.run.tracking.pieces import Piece

ALONG = ("epoch",)  # logged with every row: no news by itself


class ContinuedLogger(JobLogger):
    """Logs what the earlier pieces of the run have not: W&B's steps go on after theirs, metric by metric.

    The server takes a run's rows in increasing steps only, so a piece that began at step 0 again would be lost. And
    an attempt that was killed has logged steps after its last checkpoint, which the next one trains again.
    """

    def __init__(self, run: Any, *arguments: Any, earlier: Sequence[Piece]) -> None:
        super().__init__(run, *arguments)
        self._logged: dict[str, int] = {}
        for piece in earlier:
            self._logged |= piece.logged
        last = max((piece.last for piece in earlier if piece.last is not None), default=-1)
        if last >= run.starting_step:
            run.log({}, step=last + 1, commit=False)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if step is not None:
            metrics = {
                key: value for key, value in metrics.items() if key in ALONG or self._is_new(key, step)
            }
        if metrics.keys() - {*ALONG}:
            super().log_metrics(metrics, step)

    def _is_new(self, key: str, step: int) -> bool:
        return step > self._logged.get(key, -1)
