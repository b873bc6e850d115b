"""The whole chaos test: `python tests/chaos.py [--jobs 30] [--launchers serial parallel local] [--seed 0]`.

For each launcher, a sweep is killed again and again at random moments, by SIGINT, SIGTERM or SIGKILL, at the
supervisor, its worker, or any process below; then the same command is run until it ends by itself. Afterwards every
job must be done, each step must be there once, and no W&B run may belong to two jobs. Not collected by pytest.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

JOB = [
    "model=mlp", "model.width=16", "model.depth=1", "trainer=cpu", "trainer.max_epochs=12", "logger=wandb",
    "checkpoint_every=10", "progress=off", "trainer.log_every_n_steps=6",
]  # fmt: skip
STEPS = 12 * 18
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)


def chaos(folder: Path, launcher: str, jobs: int, kills: int, chance: random.Random) -> dict[str, int]:
    """Kill the sweep `kills` times, let it end, and return how often what happened."""
    command = [sys.executable, "-m", "bnlight", "train", "-m", *JOB, f"seed=range({jobs})", "--retry-failed"]
    if launcher != "serial":
        command.append(f"hydra/launcher={launcher}")
    environment = os.environ | {"WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
    counts = {"commands": 0, "SIGINT": 0, "SIGTERM": 0, "SIGKILL": 0}
    with (folder / "output").open("w") as output:
        for _ in range(1000):
            counts["commands"] += 1
            sweep = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=output)
            while counts["SIGINT"] + counts["SIGTERM"] + counts["SIGKILL"] < kills and sweep.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    sweep.wait(chance.uniform(3, 8))
                if sweep.poll() is None:
                    counts[_strike(sweep.pid, chance)] += 1
            code = sweep.wait(1800)
            if code == 0:
                return counts
            if code == 2:
                break
    raise SystemExit(f"{launcher}: the sweep does not come to its end; see {folder / 'output'}")


def _strike(supervisor: int, chance: random.Random) -> str:
    """Send a random signal to the supervisor or, as a kill for memory would, to any process below."""
    below = psutil.Process(supervisor).children(recursive=True)
    signum = chance.choice(SIGNALS)
    victim = supervisor
    if signum == signal.SIGKILL and below and chance.random() < 0.7:
        victim = chance.choice(below).pid
    with contextlib.suppress(ProcessLookupError):
        os.kill(victim, signum)
    return signum.name


def check(folder: Path, jobs: int) -> None:
    """Every job done, once; no step lost, no W&B run merged, nothing half-written; none of our processes left."""
    found = sorted(path.parent for path in folder.glob("outputs/train/*/config.yaml"))
    assert len(found) == jobs, (len(found), jobs)
    owners: dict[str, str] = {}
    for job in found:
        status = json.loads((job / "status.json").read_text())
        assert status["state"] == "done", (job.name, status)
        assert json.loads((job / "result.json").read_text())["steps"] == STEPS
        rows = list(csv.DictReader((job / "metrics.csv").open()))
        logged = {int(row["step"]) for row in rows if row["train/loss"]}
        assert logged == set(range(6, STEPS + 1, 6)), (job.name, sorted(logged))
        validated = {int(row["step"]) for row in rows if row["val/loss"]}
        assert validated == set(range(18, STEPS + 1, 18)), (job.name, sorted(validated))
        runs = {path.name.split("-")[3] for path in job.glob("wandb/offline-run-*")}
        assert runs == {status["wandb_id"]}, (job.name, runs)
        assert owners.setdefault(status["wandb_id"], job.name) == job.name
        assert not [path for path in job.rglob(".*") if "ckpt" in path.name or "json." in path.name], job
    left = [p for p in psutil.process_iter(["cwd"]) if p.info["cwd"] == str(folder)]
    _, alive = psutil.wait_procs(left, timeout=10)  # the server that forks jobs ends after its last client
    assert not alive, [p.cmdline() for p in alive]


def main() -> None:
    """Run the test for each launcher and print what was survived."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=30)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--launchers", nargs="+", default=["serial", "parallel", "local"])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background, shells have it ignored
    for launcher in options.launchers:
        folder, begun = Path(tempfile.mkdtemp(prefix=f"chaos-{launcher}-")), time.monotonic()
        counts = chaos(folder, launcher, options.jobs, options.kills, random.Random(options.seed))
        check(folder, options.jobs)
        told = ", ".join(f"{count} {what}" for what, count in counts.items())
        print(f"{launcher}: {options.jobs} jobs done once each, no step lost, no run merged; {told}; "
              f"{time.monotonic() - begun:.0f} s", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
