"""`bnlight wandb ls` and `bnlight wandb sync`: the W&B runs on this disk, and how they reach the server."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from bnlight.run.status import read_status
from bnlight.run.tracking.pieces import Piece, read_piece

SECONDS_TO_CONNECT = 10.0
FOLDER = re.compile(r"(?:offline-)?run-\d{8}_\d{6}-(.+)")


@dataclass
class Run:
    """The pieces of one run in the order in which they were begun, and the state of the job that they are of."""

    run_id: str
    job: str
    state: str
    pieces: list[Piece]

    @property
    def waiting(self) -> list[Piece]:
        """The pieces that `wandb sync` is to be given, in this order."""
        return [piece for piece in self.pieces if not (piece.online or piece.synced or piece.broken)]

    def problems(self) -> list[str]:
        """Why something of this run cannot be uploaded; empty if all of it can."""
        found = [f"{piece.directory}: {piece.broken}" for piece in self.pieces if piece.broken]
        if self.state == "running" and self.waiting:
            found.append(f"{self.waiting[-1].directory}: the job still runs; sync it when it has ended")
        last, before = -1, ""
        for piece in self.pieces:
            if piece.first is None or piece.last is None:
                continue
            if piece.first <= last and piece in self.waiting:
                found.append(
                    f"{piece.directory}: its steps {piece.first} to {piece.last} overlap those of {before} "
                    f"(to {last}); the server takes rising steps only, so rows would be lost (metrics.csv has them)"
                )
            last, before = max(last, piece.last), piece.directory.name
        return found


def find_runs(directories: Iterable[Path]) -> list[Run]:
    """Every run below `directories`, at any depth, by job.

    Raises FileNotFoundError for a directory that does not exist.
    """
    folders: dict[Path, Path] = {}  # without links' doubles, each as it was reached
    for directory in directories:
        if not directory.is_dir():
            raise FileNotFoundError(f"{directory}: expected a directory, such as outputs/norms")
        for path in _run_folders(directory):
            folders.setdefault(path.resolve(), path)
    by_run: dict[tuple[Path, str], list[Piece]] = {}
    for path in folders.values():
        piece = read_piece(path)
        run_id = piece.run_id or FOLDER.fullmatch(path.resolve().name)[1]  # type: ignore[index]
        by_run.setdefault((path.parent, run_id), []).append(piece)
    runs = []
    for (wandb, run_id), found in by_run.items():
        found.sort(key=lambda piece: (piece.started, piece.directory.name))
        runs.append(Run(run_id, _job(wandb, found), _state(wandb, found), found))
    return sorted(runs, key=lambda run: (run.job, run.pieces[0].started))


def command(piece: Piece) -> list[str]:
    """The command that uploads a piece."""
    return ["wandb", "sync", str(piece.directory)]


def show(runs: Sequence[Run]) -> None:
    """Print each run, its pieces in time order, and the command that uploads each."""
    for run in runs:
        size = _bytes(sum(piece.size for piece in run.pieces))
        many = f"{len(run.pieces)} piece" + "s" * (len(run.pieces) > 1)
        print(f"{run.run_id}  {run.job}  {run.state}  {size}  {many}")
        for piece in run.pieces:
            steps = "no steps" if piece.first is None else f"steps {piece.first} to {piece.last}"
            print(f"    {_ended(piece, run)}, {steps}")
            print(f"    {shlex.join(command(piece))}" if piece in run.waiting else f"    {piece.directory}")
        for problem in run.problems():
            print(f"    ! {problem}")
    waiting = sum(len(run.waiting) for run in runs)
    print(f"{len(runs)} runs, {waiting} pieces to upload" + (": bnlight wandb sync DIR" if waiting else ""))
    if runs:
        print("to look at them here: bnlight wandb leet DIR")


def sync(runs: Sequence[Run], dry_run: bool) -> int:
    """Upload the pieces of each run one after the other, and stop at a run's first failure; the exit code.

    A run that still runs, or whose steps would be lost, is named and left. With `dry_run` the commands are
    only printed.
    """
    left: list[str] = []
    for run in runs:
        if not run.waiting:
            continue
        problems = run.problems()
        left += problems
        if len(problems) > sum(bool(piece.broken) for piece in run.pieces):
            continue
        for piece in run.waiting:
            print(shlex.join(command(piece)), flush=True)
            if dry_run:
                continue
            code = _upload(piece)
            if code or not piece.synced:
                left.append(
                    f"{piece.directory}: `wandb sync` left with exit code {code}; later pieces wait for it"
                )
                break
    for problem in left:
        print(f"not uploaded: {problem}", file=sys.stderr)
    return int(bool(left))


def _upload(piece: Piece) -> int:
    """Run `wandb sync`; its own log goes beside the piece instead of into the working directory."""
    environment = os.environ | {"WANDB_DIR": str(piece.directory.resolve().parent.parent)}
    return subprocess.run([sys.executable, "-m", *command(piece)], env=environment, check=False).returncode


def unreachable() -> str:
    """Why W&B's server cannot be asked, found in seconds; W&B itself would try again for hours."""
    from bnlight.run.tracking.logger import server

    url = urlsplit(server())
    if getproxies().get(url.scheme) and not proxy_bypass(url.hostname or ""):
        return ""  # the proxy decides
    port = url.port or (443 if url.scheme == "https" else 80)
    try:
        socket.create_connection((url.hostname or "", port), timeout=SECONDS_TO_CONNECT).close()
    except OSError as error:
        return f"{url.scheme}://{url.hostname}:{port} cannot be reached ({error})"
    return ""


def _run_folders(root: Path) -> list[Path]:
    if FOLDER.fullmatch(root.resolve().name):
        return [root]
    found = []
    for folder, names, _ in os.walk(root):
        found += [Path(folder, name) for name in names if FOLDER.fullmatch(name)]
        names[:] = [name for name in names if not FOLDER.fullmatch(name)]
    return found


def _job(wandb: Path, found: Sequence[Piece]) -> str:
    return wandb.resolve().parent.name if (wandb.parent / "status.json").exists() else found[-1].name or "?"


def _state(wandb: Path, found: Sequence[Piece]) -> str:
    """The job's state; without a job's files, how the last piece has ended."""
    try:
        state = read_status(wandb.parent).get("state")
    except ValueError:
        state = None
    if state:
        return str(state)
    code = found[-1].exit_code
    return "killed" if code is None else "failed" if code else "done"


def _ended(piece: Piece, run: Run) -> str:
    if piece.broken:
        return "broken"
    uploaded = "uploaded, " if piece.synced else "online, " if piece.online else ""
    if piece.exit_code is None:
        last = piece is run.pieces[-1] and run.state == "running"
        return uploaded + ("running" if last else "killed")
    return uploaded + (f"ended with exit code {piece.exit_code}" if piece.exit_code else "ended")


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
