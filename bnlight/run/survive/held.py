"""The files that this process holds a kernel's lock on, which a child that it forks must not keep alive."""

from __future__ import annotations

import os
from typing import IO

held: set[IO[str]] = set()
"""Whoever locks a file adds it, and takes it out before closing it."""


def _forget_in_child() -> None:
    for file in held:
        file.close()
    held.clear()


os.register_at_fork(after_in_child=_forget_in_child)
