"""`bnlight bench sweep`: what a further job of a sweep costs, beside stock Hydra, Lightning and W&B."""

import argparse
import json
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from bnlight.bench.cases import percentiles
from bnlight.bench.command import Options, Report, positive, table
from bnlight.bench.measure import hardware
from bnlight.bench.sweep_jobs import STEPS, WAYS

Cost = tuple[float, float]  # of one job beyond its training steps: seconds, CPU seconds
LOOKS = 3  # at a directory, of which the quickest counts
EXPLAINED = (
    f"seconds: of a further job in the same process, less its {STEPS} training steps at their median: what a job costs "
    "whatever it trains",
    "CPU: seconds of the process and of W&B's service; those that other programs take do not count",
    "least: the quickest of all jobs. to stock: CPU over that of the same with Hydra and Lightning, by round",
)


def measure(jobs: int, rounds: int) -> dict[str, list[list[Cost]]]:
    """What each job costs, by way and round; each round runs every way in a process of its own."""
    costs: dict[str, list[list[Cost]]] = {way: [] for way in WAYS}
    for number in range(rounds):
        for way in WAYS if number % 2 == 0 else reversed(WAYS):
            with tempfile.TemporaryDirectory(prefix="bnlight-bench-") as folder:
                costs[way].append(run(way, jobs, Path(folder, "out")))
    return costs


def run(way: str, jobs: int, folder: Path) -> list[Cost]:
    """One process that runs `jobs` jobs: the costs of all but the first and the last of them.

    Raises RuntimeError with what it said if one failed.
    """
    command = [sys.executable, "-m", "bnlight.bench.sweep_jobs", way, str(jobs), str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, cwd=folder.parent, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{way}: {done.stderr[-2000:]}")
    return [(seconds, cpu) for seconds, cpu in json.loads(done.stdout.splitlines()[-1])]


def summary(costs: dict[str, list[list[Cost]]]) -> list[dict[str, float | str | None]]:
    """A row for each way: medians, the spread over all jobs, and the ratio of CPU seconds to the stock way."""
    cpu = {
        way: [statistics.median(one for _, one in jobs) for jobs in rounds] for way, rounds in costs.items()
    }
    rows: list[dict[str, float | str | None]] = []
    for way, rounds in costs.items():
        seconds = [one for jobs in rounds for one, _ in jobs]
        low, high = percentiles(seconds)
        stock = cpu.get(WAYS[way], [])
        ratio = statistics.median(a / b for a, b in zip(cpu[way], stock, strict=True)) if stock else None
        times = {"seconds": statistics.median(seconds), "least": min(seconds), "p10": low, "p90": high}
        rows.append({"way": way, **times, "cpu": statistics.median(cpu[way]), "ratio": ratio})
    return rows


def growth(number: int) -> dict[str, float]:
    """CPU seconds of a further job beside `number` others, and of `bnlight status` and `compare` of them all."""
    with tempfile.TemporaryDirectory(prefix="bnlight-bench-") as name:
        folder = Path(name, "out")
        run("bnlight", 3, folder)
        (one, *_) = sorted((folder / "train").glob("*/result.json"))
        for copy in range(number):
            _copy(one.parent, folder / "train" / f"copy-{copy}", copy)
        took = {"job": statistics.median(cpu for _, cpu in run("bnlight", 8, folder))}
        for what in ("status", "compare"):
            took[what] = min(_cpu_of(what, folder / "train") for _ in range(LOOKS))
    return took


def _cpu_of(command: str, directory: Path) -> float:
    arguments = [sys.executable, "-m", "bnlight", command, str(directory)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(arguments, stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


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
    parser = Options("sweep", __doc__, rounds=5, what="processes of each way", layers=False)
    parser.add_argument(
        "--jobs",
        type=positive,
        default=12,
        help="of each process; the first and last do not count (default: 12)",
    )
    parser.add_argument(
        "--sizes", type=positive, nargs="*", default=[10, 100, 1000], metavar="N", help="jobs in a directory"
    )
    options = parser.checked(arguments)
    if options.jobs < 3:
        parser.error("--jobs is at least 3: the first and the last do not count")
    return options


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark and print its tables; returns the exit code."""
    options = parse(arguments)
    about = {
        "hardware": hardware(torch.device("cpu")),
        "load": round(os.getloadavg()[0], 1),
        "jobs": options.jobs,
        "rounds": options.rounds,
    }
    report = Report(about, *EXPLAINED)
    costs = measure(options.jobs, options.rounds)
    rows = summary(costs)
    shown = table(["a further job"], ["CPU", "seconds", "least", "p10..p90", "to stock"])
    for row in rows:
        times = f"{row['cpu']:.3f}", f"{row['seconds']:.3f}", f"{row['least']:.3f}"
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        shown.add_row(str(row["way"]), *times, f"{row['p10']:.3f}..{row['p90']:.3f}", ratio)
    report.table(shown)
    sizes = {number: growth(number) for number in options.sizes}
    if sizes:
        shown = table(["CPU beside so many jobs"], ["a further job", "bnlight status", "bnlight compare"])
        for number, took in sizes.items():
            shown.add_row(
                str(number), f"{took['job']:.3f}", *(f"{took[what]:.2f}" for what in ("status", "compare"))
            )
        report.table(shown)
    load = os.getloadavg()[0]
    report.end(f"load {load:.1f} at the end; all", options.json, ways=rows, costs=costs, sizes=sizes)
    return 0
