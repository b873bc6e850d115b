"""The `bnlight` command."""

from __future__ import annotations

import argparse
import errno
import importlib.metadata
import sys
from collections.abc import Sequence
from pathlib import Path

OPTIONS = {"--retry-failed": "rerun=failed", "--force": "rerun=all", "--fail-fast": "fail_fast=true"}

DESCRIPTION = """\
Which normalization should your network use, at your batch size, on your GPUs?

  bnlight train norm=renorm model=resnet data=digits    one job, in a directory of its own
  bnlight train -m norm=batch,group seed=0,1,2          a sweep over norms and seeds
  bnlight sweep norms                                   a sweep from a file, then its comparison
  bnlight status outputs/norms --watch                  what its jobs are doing
  bnlight doctor norm=batch data.batch_size=4           what is wrong with such a job
  bnlight compare outputs/norms                         the comparison again, from the files
  bnlight wandb sync outputs/norms                      upload what W&B has written offline
  bnlight test outputs/norms data.shift.noise=0.2       its jobs on shifted test images, or on other data
  bnlight adapt outputs/norms data.shift.noise=0.2      the same, with statistics adapted to those images
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 done, 1 a job failed, 2 the command was wrong, 130 Ctrl-C."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if arguments is None:  # a process of its own, not a call from Python
        from bnlight.run.survive.output import outlive_the_reader
        from bnlight.run.survive.supervisor import of_worker, supervise, supervises

        outlive_the_reader()
        if supervises(given):
            return supervise(given)
        of_worker()
    sys.path.insert(0, str(Path.cwd()))  # the user's own modules are importable, as with `python -m`
    # These read their arguments themselves.
    own = {"train": train, "sweep": run_sweep, "bench": bench, "test": test, "adapt": adapt, "doctor": doctor}
    own |= {"wandb": wandb, "prune": prune, "status": status, "compare": compare}
    try:
        if given and given[0] in own:
            return own[given[0]](given[1:])
        parser = command_line()
        options = parser.parse_args(given)
        if options.version:
            print(f"bnlight {importlib.metadata.version('bnlight')}")
            return 0
        parser.print_help()
        return 2
    except KeyboardInterrupt:
        from bnlight.run.survive.supervisor import STOPPED, how_to_continue

        print(file=sys.stderr)
        if given[:1] in (["sweep"], ["train"]):
            say_how_to_compare()
        print(how_to_continue(given), file=sys.stderr)
        return STOPPED


def command_line() -> argparse.ArgumentParser:
    """The parser of what comes before a command's own arguments."""
    parser = argparse.ArgumentParser(
        prog="bnlight", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="store_true", help="show the version")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands.add_parser("train", help="train one job, or several with -m (Hydra's command line)")
    commands.add_parser("sweep", help="run a sweep file, then compare its jobs")
    commands.add_parser(
        "bench", help="measure the layers against torch's (bench norm), folding (fold), a job's cost (sweep)"
    )
    commands.add_parser("test", help="test finished jobs on other or shifted data (test --help)")
    commands.add_parser("adapt", help="test them with statistics adapted to those data too (adapt --help)")
    commands.add_parser("doctor", help="say what is wrong with the norms of a job, without running it")
    commands.add_parser(
        "wandb", help="W&B runs: list (wandb ls DIR), upload (sync), look at (leet), report on (report)"
    )
    commands.add_parser("status", help="what the jobs of a sweep are doing (status DIR --watch)")
    commands.add_parser("prune", help="remove the checkpoints of finished jobs but the best (prune --help)")
    commands.add_parser(
        "compare", help="compare the runs of finished or running sweeps, in many forms (compare --help)"
    )
    return parser


def train(arguments: list[str], config_name: str = "train", folder: Path | None = None) -> int:
    """`bnlight train`: Hydra's command line over the primary config, and the comparison if it was a sweep."""
    from bnlight.run import sweep
    from bnlight.run.application import run_hydra
    from bnlight.run.job import CommandError, FailFast, JobFailed
    from bnlight.run.plan import show_plan
    from bnlight.run.ranks.processes import stops, this_rank
    from bnlight.run.survive.command import begin_pass, command, journal
    from bnlight.run.tracking.agent import of_agent, overrides

    sweep.current = None
    given = [OPTIONS.get(argument, argument) for argument in arguments]
    failed = 0
    try:
        if of_agent() and config_name == "train":
            given = overrides(given)
        if "--dry-run" in given:
            show_plan([argument for argument in given if argument != "--dry-run"], config_name, folder)
            return 0
        with command(), stops():
            try:
                while True:
                    begin_pass()
                    try:
                        run_hydra(given, config_name, folder)
                    except JobFailed:
                        failed = 1
                    except FailFast:
                        failed = 1
                        break
                    if sweep.current is None or sweep.wait_for_others():
                        break
            except Exception:
                if any(entry["event"] != "sweep" for entry in journal()):  # some of its jobs were dealt with
                    show_comparison()
                raise
            failed = failed or int(sweep.others_failed())
        show_comparison()
    except CommandError as error:
        if this_rank() == 0:  # all ranks have found the same
            print(error, file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENOTDIR):
            raise
        when = "there is room" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "it may write there"
        what = "job" if sweep.current is None else "sweep"
        print(f"The {what} ends here: {error}. The same command goes on when {when}.", file=sys.stderr)
        return 1
    return failed


def run_sweep(arguments: list[str]) -> int:
    """`bnlight sweep NAME [overrides]`: the sweep file NAME as primary config."""
    from bnlight.run.application import available_sweeps

    if not arguments or arguments[0].startswith("-") or "=" in arguments[0]:
        lines = [f"  {name:<10} {asks}" for name, asks in available_sweeps().items()]
        print(
            "usage: bnlight sweep NAME [overrides] [--dry-run] [--retry-failed] [--force] [--fail-fast]\n\n"
            "sweeps:\n" + "\n".join(lines),
            file=sys.stderr,
        )
        return 0 if arguments[:1] in (["-h"], ["--help"]) else 2
    name, *rest = arguments
    file = Path(name) if name.endswith((".yaml", ".yml")) else Path("sweeps") / f"{name}.yaml"
    if file.is_file():
        if file.stem == "train":
            print(f"{file}: a sweep cannot be called train, which is what it extends", file=sys.stderr)
            return 2
        return train(rest, config_name=file.stem, folder=file.parent)
    if name not in available_sweeps():
        print(
            f"There is no sweep '{name}'. Choose one of {', '.join(available_sweeps())}, or give a path.",
            file=sys.stderr,
        )
        return 2
    return train(rest, config_name=name)


def doctor(arguments: list[str]) -> int:
    """`bnlight doctor [overrides]`: what is wrong with the norms of the job that `bnlight train` would run."""
    from bnlight.run.doctor import main as examine

    return examine(arguments)


def bench(arguments: list[str]) -> int:
    """`bnlight bench norm|fold|sweep [options]`: what layers, folded networks, or further jobs cost here."""
    if arguments[:1] not in (["norm"], ["fold"], ["sweep"]):
        print(
            "usage: bnlight bench norm [options]    the layers against torch's\n"
            "       bnlight bench fold [options]    inference with norms folded into layers\n"
            "       bnlight bench sweep [options]   what a further job costs, and 10 to 1000 jobs\n\n"
            "--help behind each lists its options",
            file=sys.stderr,
        )
        return 0 if arguments[:1] in (["-h"], ["--help"]) else 2
    if arguments[0] == "sweep":
        from bnlight.bench.sweep import main as bench_sweep

        return bench_sweep(arguments[1:])
    if arguments[0] == "fold":
        from bnlight.bench.fold import main as bench_fold

        return bench_fold(arguments[1:])
    from bnlight.bench.norm import main as bench_norm

    return bench_norm(arguments[1:])


def test(arguments: list[str]) -> int:
    """`bnlight test DIR|CKPT [overrides]`: finished jobs on other data, or on shifted test images."""
    from bnlight.run.evaluate import main as evaluate

    return evaluate(arguments, adapt=False)


def adapt(arguments: list[str]) -> int:
    """`bnlight adapt DIR|CKPT [overrides]`: the same with the statistics of training and with adapted ones."""
    from bnlight.run.evaluate import main as evaluate

    return evaluate(arguments, adapt=True)


def wandb(arguments: list[str]) -> int:
    """`bnlight wandb ls|sync|leet|report DIR`: W&B runs listed, uploaded, shown and reported on."""
    if arguments[:1] == ["report"]:
        from bnlight.compare.report.command import main as report

        return report(arguments[1:])
    from bnlight.run.tracking.command import main as runs

    return runs(arguments)


def status(arguments: list[str]) -> int:
    """`bnlight status DIR`: what the jobs of a sweep are doing, wherever they run."""
    from bnlight.run.watch import main as look

    return look(arguments)


def prune(arguments: list[str]) -> int:
    """`bnlight prune DIR`: remove the checkpoints of finished jobs that nothing will need."""
    from bnlight.run.prune import main as remove

    return remove(arguments)


def compare(arguments: list[str]) -> int:
    """`bnlight compare SOURCE...`: means with intervals, tests and a verdict, printed and written."""
    from bnlight.compare.command import main as print_comparison

    return print_comparison(arguments)


def show_comparison() -> None:
    """Write and print the comparison of the sweep's jobs that are there; nothing for a single job."""
    from bnlight.compare.command import finish
    from bnlight.run import sweep
    from bnlight.run.ranks.processes import this_rank

    if sweep.current is not None and this_rank() == 0:
        print()
        finish(sweep.current.shown)


def say_how_to_compare() -> None:
    """One line for a sweep that is stopped, if any job of it has begun."""
    from bnlight.run import sweep

    if sweep.current is not None and any(sweep.current.directory.glob("*/status.json")):
        from bnlight.compare.command import how_to

        print(how_to(sweep.current.shown), file=sys.stderr)
