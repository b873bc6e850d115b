"""The supervisor of a sweep: a small process, without torch, over the worker that runs the jobs.

The worker pays the imports once and runs job after job. Should it die (out of memory, a crash in native code,
`os._exit`), the supervisor records the job that it was running as failed and starts a new worker for the rest.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import stat
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from bnlight.lightning.stop import ASKING
from bnlight.run.ranks.processes import PARENT, die_with_parent, ended_how, parenthood
from bnlight.run.screen import Screen, is_wanted
from bnlight.run.status import read_json, update_status
from bnlight.run.survive.command import WORKER, command, journal, note, unfinished
from bnlight.run.survive.lock import owner
from bnlight.run.survive.output import to_nowhere
from bnlight.run.survive.suspended import SECONDS_BETWEEN_LOOKS, Suspended

FORWARDED = (*ASKING, signal.SIGHUP)
FROM_TERMINAL = 0x80  # si_code SI_KERNEL: the terminal sent it, to the worker as well
SECONDS_OF_ONE_PRESS = 0.5
STOPPED = 130


def supervises(arguments: list[str]) -> bool:
    """Whether `bnlight ARGUMENTS` is a sweep that this process supervises."""
    if WORKER in os.environ or not hasattr(signal, "sigwaitinfo") or "TORCHELASTIC_RUN_ID" in os.environ:
        return False
    if {"-h", "--help", "--hydra-help", "--cfg", "-c", "--info", "-i", "--dry-run"} & {*arguments}:
        return False
    if arguments[:1] == ["sweep"]:
        return len(arguments) > 1
    several = {"-m", "--multirun", "hydra.mode=MULTIRUN"}
    return arguments[:1] == ["train"] and bool(several & {*arguments})


def supervise(arguments: list[str]) -> int:
    """Run `bnlight ARGUMENTS` in workers until every job has had its turn; returns the exit code."""
    watched = [signum for signum in FORWARDED if signal.getsignal(signum) != signal.SIG_IGN]
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [*watched, signal.SIGCHLD])
    try:
        with command() as journal:
            return Supervisor(arguments, journal, watched).run()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Supervisor:
    """Starts workers one after another, passes signals on, and writes down what they can no longer say."""

    def __init__(self, arguments: list[str], journal: Path, watched: list[signal.Signals]) -> None:
        self.arguments = arguments
        self.journal = journal
        self.watched = watched
        self.worker = 0
        self.asked_at: float | None = None  # when the first signal to stop came

    def run(self) -> int:
        while True:
            known = len(journal(self.journal))
            code = self._one_worker()
            lost = unfinished(self.journal)
            if self.asked_at is not None and code not in (0, 1, 2):
                if code != STOPPED:  # it could not say it itself
                    _say(f"\n{how_to_continue(self.arguments)}", sys.stderr)
                return STOPPED
            if code in (0, 1, 2, STOPPED) and not lost:
                return code
            for entry in lost:
                self._record(Path(entry["job"]), code)
            if not lost:
                _say(f"The sweep's worker {ended_how(code)}, outside of any job.", sys.stderr)
                if not any(entry["event"] == "ended" for entry in journal(self.journal)[known:]):
                    return 1  # nor would the next one get further
            _say("A new worker takes the rest.")

    def _one_worker(self) -> int:
        """Start a worker and wait for its end; its exit code, negative for a signal."""
        marks = {WORKER: "1", **parenthood()}
        screen = Screen(self.journal) if is_wanted(self.arguments) else None
        self.worker = os.posix_spawn(
            sys.executable,
            [sys.executable, "-m", "bnlight", *self.arguments],
            os.environ | marks | (screen.environment if screen else {}),
            setsigmask=(),
            file_actions=screen.redirection if screen else (),
        )
        if screen:
            screen.begin()
        suspended = Suspended(self.journal)
        try:
            while True:
                done, status = os.waitpid(self.worker, os.WNOHANG)
                if done:
                    return os.waitstatus_to_exitcode(status)
                info = signal.sigtimedwait([*self.watched, signal.SIGCHLD], SECONDS_BETWEEN_LOOKS)
                # Of a process that was stopped (Ctrl-Z) for longer, Python (3.11) returns uninitialized memory.
                if info is None or info.si_signo not in (*self.watched, signal.SIGCHLD):
                    suspended.look()
                elif info.si_signo != signal.SIGCHLD:
                    self._pass_on(info)
                    if screen and info.si_signo == signal.SIGINT:
                        screen.say("Stopping after this step; Ctrl-C again stops at once.")
        finally:
            if screen:
                screen.end()

    def _pass_on(self, info: signal.struct_siginfo) -> None:
        now = time.monotonic()
        if self.asked_at is None:
            self.asked_at = now
        elif info.si_signo == signal.SIGINT and now - self.asked_at > SECONDS_OF_ONE_PRESS:
            os.kill(self.worker, signal.SIGKILL)
            return
        # The terminal is closed: its kernel tells the session's leader alone.
        if info.si_signo == signal.SIGHUP:
            os.kill(self.worker, signal.SIGHUP)
            os.kill(self.worker, signal.SIGTERM)
        elif info.si_code != FROM_TERMINAL:
            os.kill(self.worker, info.si_signo)

    def _record(self, directory: Path, code: int) -> None:
        """Write into the job's status that its process died, unless the status says how the job ended."""
        status: dict[str, Any] = read_json(directory / "status.json")
        if status.get("state") in ("done", "diverged"):  # it died after that
            note("ended", directory)
            return
        if status.get("state") == "failed":
            what = status.get("error") or "ended by its watchdog"
        elif owner(directory):  # a launcher's process that still runs
            return
        else:
            what = f"the process {ended_how(code)}"
            update_status(directory, state="failed", error=what, traceback=what, ended=time.time())
            with (directory / "job.log").open("a", encoding="utf-8") as log:
                log.write(what + "\n")
        note("ended", directory)
        _say(f"{directory.name}: failed: {what}\n    see {directory / 'job.log'}")


def how_to_continue(arguments: list[str]) -> str:
    """The last words of a stopped command."""
    again = [argument for argument in arguments if argument not in ("--force", "rerun=all")]
    which = "The same command" if again == arguments else "Without --force, which starts all again, it"
    return f"Stopped. {which} goes on where it stopped:\n  {shlex.join(['bnlight', *again])}"


def _say(text: str, stream: TextIO | None = None) -> None:
    with contextlib.suppress(OSError):  # the terminal is closed
        print(text, file=stream, flush=True)


def of_worker() -> None:
    """In a worker, at its start: die with the supervisor, and hand its marks on to nobody."""
    if os.environ.pop(WORKER, None):
        die_with_parent()
        os.environ.pop(PARENT, None)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            signal.signal(signal.SIGHUP, _without_terminal)


def _without_terminal(*_: Any) -> None:
    """The terminal is closed, and SIGTERM comes next: what is printed until the end goes nowhere, and does not fail."""
    to_nowhere(*(stream for stream in (1, 2) if stat.S_ISCHR(os.fstat(stream).st_mode)))
