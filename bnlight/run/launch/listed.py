"""A sweep whose jobs are listed one by one: what no grid can say."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any, cast

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.plugins.sweeper import Sweeper

from bnlight.run.groups import as_option


class List(Sweeper):
    """Hydra's sweeper over `jobs`, each the overrides of one job as on the command line, quoted as in a shell.

    `params` and the command line hold for every job and win over what the job says; where one of them, or a job,
    has several values (`seed=0,1,2`), each job runs with each.
    """

    def __init__(self, jobs: Sequence[str], max_batch_size: int | None = None, params: Any = None) -> None:
        # Hydra loads the module anew as it starts.
        from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

        self.jobs = list(jobs)
        self.stock = cast("Any", BasicSweeper(max_batch_size, params))
        self.stock.split_arguments = self._batches

    def setup(self, **parts: Any) -> None:
        self.stock.setup(**parts)

    def sweep(self, arguments: list[str]) -> Any:
        return self.stock.sweep(arguments)

    def _batches(self, overrides: list[Override], size: int | None) -> list[list[list[str]]]:
        """In place of the product of all overrides."""
        every = each_job(self.jobs, overrides)
        return [every] if size is None else list(self.stock.split_overrides_to_chunks(every, size))


def each_job(jobs: Sequence[str], common: list[Override]) -> list[list[str]]:
    """The overrides of every job. Raises CommandError if there is none, Hydra's own error for what is no override."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    from bnlight.run.job import CommandError

    if not jobs:
        raise CommandError('the list has no jobs: hydra.sweeper.jobs=["norm=batch optimizer.lr=0.1", ...]')
    loader = GlobalHydra.instance().config_loader() if GlobalHydra.instance().is_initialized() else None
    parser = OverridesParser.create(config_loader=loader)
    found = []
    for job in jobs:
        own = parser.parse_overrides([as_option(text) for text in shlex.split(job)])
        (batch,) = BasicSweeper.split_arguments([*own, *common], None)
        found += batch
    return found
