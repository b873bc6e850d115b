"""`bnlight bench sweep`: what a further job of a sweep costs, beside stock Hydra, Lightning and W&B."""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from bnlight.bench.cases import percentiles
from bnlight.bench.measure import hardware
from bnlight.bench.norm import STYLE
from bnlight.bench.sweep_jobs import WAYS

BESIDE = {"bnlight": "hydra", "bnlight + wandb": "hydra + wandb"}


def measure(ways: Sequence[str], jobs: int, rounds: int) -> dict[str, list[list[float]]]:
    """Seconds of each job after the first, by way and round; each round runs every way in a process of its own."""
    seconds: dict[str, list[list[float]]] = {way: [] for way in ways}
    for number in range(rounds):
        for way in ways if number % 2 == 0 else reversed(ways):
            with tempfile.TemporaryDirectory(prefix="bnlight-bench-") as folder:
                seconds[way].append(run(way, jobs, Path(folder, "out")))
    return seconds


def run(way: str, jobs: int, folder: Path) -> list[float]:
    """One process that runs `jobs` jobs; raises RuntimeError with what it said if one failed."""
    command = [sys.executable, "-m", "bnlight.bench.sweep_jobs", way, str(jobs), str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, cwd=folder.parent, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{way}: {done.stderr[-2000:]}")
    times: list[float] = json.loads(done.stdout.splitlines()[-1])
    return times


def growth(number: int) -> dict[str, float]:
    """Seconds that `bnlight status` and `bnlight compare` take for `number` jobs, and a job beside so many others."""
    with tempfile.TemporaryDirectory(prefix="bnlight-bench-") as name:
        folder = Path(name, "out")
        run("bnlight", 2, folder)
        (one, *_) = sorted((folder / "train").glob("*/result.json"))
        for copy in range(number):
            _copy(one.parent, folder / "train" / f"copy-{copy}", copy)
        took = {"job": statistics.median(run("bnlight", 6, folder)[1:])}
        for what in ("status", "compare"):
            begun = time.perf_counter()
            subprocess.run(
                [sys.executable, "-m", "bnlight", what, str(folder / "train")],
                stdout=subprocess.DEVNULL,
                check=True,
            )
            took[what] = time.perf_counter() - begun
    return took


def _copy(job: Path, to: Path, number: int) -> None:
    """A job's directory again, as another job: with its own name, seed and identity."""
    to.mkdir()
    identity = f"{number:064x}"
    for name in ("status.json", "metrics.csv", "job.log"):
        shutil.copy(job / name, to / name)
    result = json.loads((job / "result.json").read_text(encoding="utf-8"))
    result["identity"] = identity
    result["config"] |= {"seed": number}
    result["config"]["job"] |= {"name": to.name, "identity": identity}
    (to / "result.json").write_text(json.dumps(result, indent=2), encoding="utf-8")
    config = (job / "config.yaml").read_text(encoding="utf-8").replace(job.name, to.name)
    config = re.sub(r"(?m)^seed: \d+", f"seed: {number}", config)
    (to / "config.yaml").write_text(
        re.sub(r"identity: \w+", f"identity: '{identity}'", config), encoding="utf-8"
    )


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options; argparse prints what is wrong and exits with 2."""
    parser = argparse.ArgumentParser(prog="bnlight bench sweep", description=__doc__)
    parser.add_argument(
        "--jobs", type=int, default=8, help="of each process; the first is not counted (default: 8)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="processes of each way (default: 5)")
    parser.add_argument("--sizes", type=int, nargs="*", default=[10, 100, 1000], help="jobs in a directory")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers to FILE")
    options = parser.parse_args(arguments)
    if options.jobs < 3 or options.rounds < 1:
        parser.error("--jobs is at least 3, --rounds at least 1")
    if options.json is not None and not options.json.absolute().parent.is_dir():
        parser.error(f"--json: there is no folder {options.json.absolute().parent}")
    return options


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark and print its tables; returns the exit code."""
    options = parse(arguments)
    console, begun = Console(), time.perf_counter()
    about = {
        "hardware": hardware(torch.device("cpu")),
        "load": round(os.getloadavg()[0], 1),
        "jobs": options.jobs,
        "rounds": options.rounds,
    }
    console.print(", ".join(f"{key} {value}" for key, value in about.items()), soft_wrap=True)
    console.print(
        "seconds from the end of a job to the end of the next; one batch of training each\n", soft_wrap=True
    )
    seconds = measure(WAYS, options.jobs, options.rounds)
    medians = {way: [statistics.median(times) for times in rounds] for way, rounds in seconds.items()}
    table = Table("", **STYLE)
    for column in ("seconds", "p10..p90", "over Lightning", "to stock"):
        table.add_column(column, justify="right")
    rows = []
    for way in WAYS:
        low, high = percentiles([one for times in seconds[way] for one in times])
        over = statistics.median(a - b for a, b in zip(medians[way], medians["lightning"], strict=True))
        stock = medians.get(BESIDE.get(way, ""), [])
        ratio = statistics.median(a / b for a, b in zip(medians[way], stock, strict=True)) if stock else None
        middle = statistics.median(medians[way])
        rows.append({"way": way, "seconds": middle, "p10": low, "p90": high, "over": over, "ratio": ratio})
        shown = f"{ratio:.2f}" if ratio is not None else ""
        table.add_row(way, f"{middle:.3f}", f"{low:.3f}..{high:.3f}", f"{over:+.3f}", shown)
    console.print(table)
    sizes = {number: growth(number) for number in options.sizes}
    if sizes:
        table = Table("jobs in the directory", **STYLE)
        for column in ("a further job", "bnlight status", "bnlight compare"):
            table.add_column(column, justify="right")
        for number, took in sizes.items():
            table.add_row(str(number), *(f"{took[what]:.2f} s" for what in ("job", "status", "compare")))
        console.print()
        console.print(table)
    console.print(f"\n{time.perf_counter() - begun:.0f} s")
    if options.json is not None:
        content = {**about, "ways": rows, "seconds": seconds, "sizes": sizes}
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0
