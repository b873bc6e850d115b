"""What is printed when nobody reads any more (`bnlight sweep norms | head`) goes nowhere, and no job fails for it."""

from __future__ import annotations

import io
import os
import sys
from typing import Any


def outlive_the_reader() -> None:
    """Have this process's standard output and error survive the end of the pipe that they lead into."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        buffer = getattr(stream, "buffer", None)
        raw = getattr(buffer, "raw", buffer)  # the same where Python is not to buffer
        if type(raw) is not io.FileIO:  # pytest's, or somebody else's, who knows what to do
            continue
        stream.flush()
        pipe = _Pipe(raw.fileno(), "w", closefd=False)
        how = {key: getattr(stream, key) for key in ("encoding", "errors", "line_buffering", "write_through")}
        setattr(sys, name, io.TextIOWrapper(pipe if raw is buffer else io.BufferedWriter(pipe), **how))


class _Pipe(io.FileIO):
    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except BrokenPipeError:
            to_nowhere(self.fileno())
            return len(memoryview(data).cast("B"))


def to_nowhere(*descriptors: int) -> None:
    """Have these file descriptors lead to /dev/null."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in descriptors:
        os.dup2(nowhere, descriptor)
    os.close(nowhere)
