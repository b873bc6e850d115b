"""Signals that ask a training to stop: noted when they come, obeyed between two batches."""

from __future__ import annotations

import re
import signal
import sys
import threading
import time
from typing import Any

ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
SECONDS_OF_ONE_PRESS = 0.5  # a terminal, a parent and a process group may each send the same signal


class Stopped(KeyboardInterrupt):
    """A signal has stopped the training at a point from which it can go on; the text says where that is.

    `signum` is the signal, `previous` what handled it before (another tool may want to hear of it too).
    """

    def __init__(self, signum: int, where: str, previous: Any = None) -> None:
        super().__init__(where)
        self.signum = signal.Signals(signum)
        self.where = where
        self.previous = previous

    @property
    def state(self) -> str:
        """The job's state after it: `interrupted` by a person, `preempted` by a scheduler."""
        return "interrupted" if self.signum == signal.SIGINT else "preempted"


def foreign(handler: Any) -> bool:
    """Whether another tool has set this handler: neither Python nor bnlight, nor a Trainer that is over."""
    if several := getattr(handler, "signal_handlers", None):  # Lightning's own among what was there before
        return any(map(foreign, several))
    lightning = str(getattr(handler, "__module__", "")).startswith(("pytorch_lightning.", "lightning."))
    ours = lightning or hasattr(handler, "of_bnlight")
    return callable(handler) and handler is not signal.default_int_handler and not ours


class StopRequest:
    """Notes the first of SIGINT, SIGTERM, SIGUSR1 and SIGUSR2; a second SIGINT is Python's KeyboardInterrupt.

    `notice` remembers whose the signals are before Lightning takes some, `listen` takes them over, `release` gives
    them back; outside of a main thread none does anything. A tool that handles SIGTERM itself keeps it: submitit
    passes it over, because SLURM sends it together with the signal that means something.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self.originals: dict[int, Any] = {}
        self._first = 0.0

    def notice(self) -> None:
        self.originals = {signum: signal.getsignal(signum) for signum in ASKING}

    def listen(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for signum in ASKING:
            left = signum == signal.SIGTERM and foreign(self.originals.get(signum))
            signal.signal(signum, self.originals[signum] if left else self._note)

    def release(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for signum, handler in self.originals.items():  # Lightning has given its own back, or is about to
            if signal.getsignal(signum) == self._note:
                signal.signal(signum, signal.SIG_DFL if handler is None else handler)

    def previous(self, signum: int) -> Any:
        """Another tool's handler of the signal, which wants to hear of it once the checkpoint is written."""
        handler = self.originals.get(signum)
        return handler if foreign(handler) else getattr(handler, "of_bnlight", None)

    def _note(self, signum: int, frame: Any) -> None:
        now = time.monotonic()
        if self.signum is None:
            self.signum, self._first = signum, now
            if signum == signal.SIGINT and sys.stderr.isatty():
                print("\nStopping after this step; Ctrl-C again stops at once.", file=sys.stderr)
        elif signum == signal.SIGINT and now - self._first > SECONDS_OF_ONE_PRESS:
            raise KeyboardInterrupt


def seconds(duration: float | str | None, key: str = "duration") -> float | None:
    """A duration in seconds from `90`, `90s`, `30min`, `2h`, `1d`, or None.

    Raises ValueError, naming `key` and the accepted forms, for anything else.
    """
    if duration is None:
        return None
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(s|min|h|d)?\s*", str(duration))
    value = float(found[1]) * {None: 1, "s": 1, "min": 60, "h": 3600, "d": 86400}[found[2]] if found else 0.0
    if value <= 0 or isinstance(duration, bool):
        raise ValueError(f"{key}={duration} is not a duration: write 90, 90s, 30min, 2h, 1d or null")
    return value
