"""The terminal of a sweep: what its worker prints goes by as ever, and below it stands what the jobs are doing."""

from __future__ import annotations

import codecs
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bnlight.run.survive.command import WATCHED, journal
from bnlight.run.watch import Reader, view

SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_FOR_THE_REST = 2.0  # a process that the worker has left behind may hold its output open


def is_wanted(arguments: Sequence[str]) -> bool:
    """Whether the sweep gets a live view: on a terminal, unless `progress=...` asks for something else."""
    terminal = (
        sys.stdout.isatty() and sys.stderr.isatty() and os.environ.get("TERM") not in (None, "", "dumb")
    )
    return terminal and not any(argument.lstrip("+").startswith("progress=") for argument in arguments)


class Screen:
    """Takes a worker's output line by line and prints it above the live view, which it draws from the files."""

    def __init__(self, journal_file: Path) -> None:
        from rich.console import Console

        self.journal = journal_file
        self.console = Console()
        self._reader: Reader | None = None
        self._live: Any = None
        self._lock = threading.Lock()
        self._over = threading.Event()
        self.read_end, self.write_end = os.pipe()
        self._threads = [threading.Thread(target=target, daemon=True) for target in (self._copy, self._look)]

    @property
    def environment(self) -> dict[str, str]:
        """What the worker is told: who draws, and how wide."""
        return {WATCHED: "1", "COLUMNS": str(self.console.width)}

    @property
    def redirection(self) -> list[tuple[int, ...]]:
        """The worker's output, for posix_spawn."""
        ends = ((os.POSIX_SPAWN_DUP2, self.write_end, 1), (os.POSIX_SPAWN_DUP2, self.write_end, 2))
        return [*ends, (os.POSIX_SPAWN_CLOSE, self.read_end)]

    def begin(self) -> None:
        """The worker has been started."""
        os.close(self.write_end)
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        """The worker has ended: print what is left of its output, take the view away."""
        self._threads[0].join(SECONDS_FOR_THE_REST)
        self._over.set()
        self._threads[1].join()
        with self._lock:
            self._stop()

    def say(self, text: str) -> None:
        """Print a line of the supervisor's own."""
        self._print(f"\n{text}\n")

    def _copy(self) -> None:
        decode, text = codecs.getincrementaldecoder("utf-8")("replace").decode, ""
        while data := os.read(self.read_end, 65536):
            lines = (text + decode(data)).splitlines(keepends=True)
            text = "" if not lines or lines[-1].endswith("\n") else lines.pop()
            self._print("".join(lines))
        self._print(text)
        os.close(self.read_end)

    def _print(self, text: str) -> None:
        if not text:
            return
        with self._lock:
            live, self._live = self._live, None
            if live is not None:
                live.stop()  # takes the view away
            sys.stdout.write(text)  # as it is: no markup, no wrapping, colours stay
            sys.stdout.flush()
            if live is not None:
                self._draw()

    def _look(self) -> None:
        while not self._over.wait(SECONDS_BETWEEN_LOOKS):
            if self._reader is None:
                found = [entry["job"] for entry in journal(self.journal) if entry["event"] == "sweep"]
                self._reader = Reader(Path(found[-1])) if found else None
            with self._lock:
                self._draw()

    def _draw(self) -> None:
        from rich.live import Live

        try:
            overview = self._reader.read() if self._reader else None
        except (OSError, ValueError):  # the directory is not there yet, or a disk fails: no view
            return
        if overview is None or not overview.of("running"):
            self._stop()
        elif self._live is None:
            self._live = Live(
                view(overview), console=self.console, auto_refresh=False, transient=True,
                redirect_stdout=False, redirect_stderr=False,
            )  # fmt: skip
            self._live.start(refresh=True)
        else:
            self._live.update(view(overview), refresh=True)

    def _stop(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            live.stop()
