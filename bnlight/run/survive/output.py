"""What is printed when nobody reads any more (`bnlight sweep norms | head`) goes nowhere, and no job fails for it.

Nor does one for a log file on a full disk, or a terminal that cannot show a character.
"""

from __future__ import annotations

import io
import os
import sys
from typing import Any


def outlive_the_reader() -> None:
    """Have this process's standard output and error survive the end of the pipe that they lead into.

    One that is closed from the start (`bnlight sweep norms >&-`) leads to nowhere: else the next file to be opened
    would be what children print into.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            to_nowhere(descriptor)
            setattr(sys, name, open(descriptor, "r" if descriptor == 0 else "w", closefd=False))  # noqa: SIM115
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        buffer = getattr(stream, "buffer", None)
        raw = getattr(buffer, "raw", buffer)  # the same where Python is not to buffer
        if type(raw) is not io.FileIO:  # pytest's, or somebody else's, who knows what to do
            continue
        stream.flush()
        pipe = _Pipe(raw.fileno(), "w", closefd=False)
        how = {key: getattr(stream, key) for key in ("encoding", "line_buffering", "write_through")}
        how["errors"] = "backslashreplace"
        setattr(sys, name, io.TextIOWrapper(pipe if raw is buffer else io.BufferedWriter(pipe), **how))


class _Pipe(io.FileIO):
    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError as error:
            if isinstance(error, BrokenPipeError):
                to_nowhere(self.fileno())
            return len(memoryview(data).cast("B"))


def to_nowhere(*descriptors: int) -> None:
    """Have these file descriptors lead to /dev/null."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in descriptors:
        os.dup2(nowhere, descriptor)
        os.set_inheritable(descriptor, True)  # where the two are the same
    if nowhere not in descriptors:
        os.close(nowhere)
