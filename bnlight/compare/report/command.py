"""`bnlight wandb report`: write a report and a workspace of a comparison, and save them in W&B."""

from __future__ import annotations

import argparse
import os
import secrets
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from bnlight.compare.comparison import Comparison, compare
from bnlight.compare.read.run import why
from bnlight.run.status import write_atomic
from bnlight.run.tracking.logger import logged_in, server
from bnlight.run.tracking.offline import unreachable

DESCRIPTION = """\
Build a W&B report and a workspace with the panels of comparison.html, and a run that holds its table, page and
verdict. Both specifications are written beside the page and checked; --push saves all three in W&B.
"""


def command_line() -> argparse.ArgumentParser:
    """The parser of `bnlight wandb report`."""
    parser = argparse.ArgumentParser(
        prog="bnlight wandb report",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("sources", nargs="+", metavar="DIR", help="what `bnlight compare` takes, such as outputs/norms")
    add("--entity", help="user or team whose project it is (default: as the runs, else your own)")
    add("--project", help="default: as the runs, else bnlight")
    add("--title", default="", help="default: the sweep's name")
    add("--push", action="store_true", help="save them in W&B; without it nobody is asked over the network")
    add("--output", type=Path, metavar="FILE", help="the report's file (default: DIR/wandb_report.json)")
    return parser


def main(arguments: Sequence[str]) -> int:
    """`bnlight wandb report DIR...`; returns the exit code: 2 where it cannot be built or pushed."""
    options = command_line().parse_args(arguments)
    try:
        if options.push and (reason := _cannot_push()):
            raise ValueError(f"nothing was pushed: {reason}")
        comparison = compare(*options.sources)
        if comparison.unwritten:
            raise OSError(
                f"a report needs its page, which was not written ({comparison.unwritten}): copy the jobs to a folder "
                "that can be written"
            )
        project = (
            options.project or os.environ.get("WANDB_PROJECT") or _of_runs(comparison, "project", "bnlight")
        )
        entity = options.entity or os.environ.get("WANDB_ENTITY") or _of_runs(comparison, "entity", "")
        file = options.output or comparison.output / "wandb_report.json"
        return write(comparison, project, entity, options.title, file, options.push)
    except (OSError, ModuleNotFoundError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2


def write(comparison: Comparison, project: str, entity: str, title: str, file: Path, push: bool) -> int:
    """Write the report to `file` and the workspace beside it; with `push`, save both in W&B."""
    from bnlight.compare.report.build import build_report, build_workspace, report_json, workspace_json
    from bnlight.compare.report.run import log_summary

    if push and not entity:
        import wandb

        with _answering():
            entity = wandb.Api().default_entity or ""
    run_id = secrets.token_hex(4)
    report = build_report(comparison, project, entity, title, run_id)
    workspace = build_workspace(comparison, project, entity, title)
    beside = file.with_name(
        file.name.replace("report", "workspace") if "report" in file.name else f"{file.stem}_workspace.json"
    )
    for path, text in ((file, report_json(report)), (beside, workspace_json(workspace))):
        write_atomic(path, text + "\n")
        print(path)
    if push:
        with _answering():
            url = log_summary(comparison, run_id, project, entity, online=True)
            report.save()
            workspace.save()
        print(f"{url}\n{report.url}\n{workspace.url}")
        return 0
    log_summary(comparison, run_id, project, entity, online=False)
    print(f"{comparison.output / '.report'} (W&B run with the table, the page and the verdict, offline)")
    login = "" if logged_in() else "`wandb login`, then "
    again = "the same command with --push saves this in W&B, `bnlight wandb sync` uploads the jobs' runs"
    print(f"Nothing was sent: {login}{again}")
    return 0


@contextmanager
def _answering() -> Iterator[None]:
    """ConnectionError, in one line, for whatever W&B's client raises."""
    try:
        yield
    except Exception as error:  # those of the client have no class in common
        raise ConnectionError(
            f"not all was saved: {server()} has not answered as it should ({why(error)})"
        ) from error


def _cannot_push() -> str:
    mode = os.environ.get("WANDB_MODE", "online")
    if mode not in ("online", "shared"):
        return f"WANDB_MODE={mode}; unset it"
    if not logged_in():
        return "W&B has no key here: `wandb login`, or set WANDB_API_KEY"
    return unreachable()


def _of_runs(comparison: Comparison, key: str, otherwise: str) -> str:
    """What the runs' logger was told, where they agree."""
    name = f"logger.{key}"
    known = comparison.configs[name].dropna().unique().tolist() if name in comparison.configs else []
    return str(known[0]) if len(known) == 1 else otherwise
