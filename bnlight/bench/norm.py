"""`bnlight bench norm`: forward and backward of each layer against `torch.nn.BatchNorm` of the same input."""

import argparse
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from rich.table import Table

from bnlight.bench.cases import DTYPES, LAYOUTS, PASSES, Case, Result, cases, measure
from bnlight.bench.command import Options, Report, table
from bnlight.bench.contenders import BASELINE, layers, norm_names
from bnlight.bench.measure import hardware, keep_freed_memory
from bnlight.bench.sync import RANKS, measure_ranks, synchronizable

SHAPES = "64x64x56x56,32x256x14x14,8x512x7x7,4x64x112x112,256x128"


def case_table(case: Case, results: dict[str, Result]) -> Table:
    """Every layer in one case."""
    rounds = len(results[BASELINE].seconds)
    shown = table(["layer"], ["ratio", "p10..p90", "µs", "memory", "share"], f"{case}, {rounds} rounds")
    for name, r in results.items():
        shown.add_row(
            name,
            f"{r.median:.2f}",
            f"{r.p10:.2f}..{r.p90:.2f}",
            f"{r.microseconds:.0f}",
            f"{r.memory:.2f}",
            f"{r.bandwidth:.0%}",
        )
    return shown


def summary(measured: dict[Case, dict[str, Result]]) -> dict[str, dict[str, Any]]:
    """Per layer over its cases: geometric mean of the ratio, worst case, most memory, median bandwidth."""
    names = dict.fromkeys(name for results in measured.values() for name in results)
    rows: dict[str, dict[str, Any]] = {}
    for name in names:
        own = {str(case): results[name] for case, results in measured.items() if name in results}
        worst = max(own, key=lambda case: own[case].median)
        rows[name] = {
            "geometric_mean": statistics.geometric_mean([r.median for r in own.values()]),
            "worst": own[worst].median,
            "worst_case": worst,
            "memory": max(r.memory for r in own.values()),
            "bandwidth": statistics.median(r.bandwidth for r in own.values()),
        }
    return rows


def summary_table(rows: dict[str, dict[str, Any]], cases: int) -> Table:
    """`summary` for the terminal."""
    title = f"All {cases} cases: ratio to {BASELINE}"
    shown = table(["layer"], ["mean", "worst", "memory", "share"], title)
    shown.add_column("worst case")
    for name, row in rows.items():
        numbers = f"{row['geometric_mean']:.2f}", f"{row['worst']:.2f}", f"{row['memory']:.2f}"
        shown.add_row(name, *numbers, f"{row['bandwidth']:.0%}", row["worst_case"])
    return shown


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options, each list split and checked; argparse prints what is wrong and exits with 2."""
    parser = Options(
        "norm",
        f"{__doc__} Other forms stand beside bnlight's: torch's GroupNorm, LayerNorm, InstanceNorm and RMSNorm; "
        "renorm and frn as their formulas read; one BatchNorm for each of four chunks (virtual batches).",
        rounds=15,
        what="at most, within the time",
    )

    def names(known: Sequence[str]) -> Any:
        def split(text: str) -> list[str]:
            if unknown := [name for name in text.split(",") if name not in known]:
                raise argparse.ArgumentTypeError(f"there is no {unknown[0]!r}; choose from {','.join(known)}")
            return text.split(",")

        return split

    def shapes(text: str) -> list[tuple[int, ...]]:
        try:
            found = [tuple(int(size) for size in shape.split("x")) for shape in text.split(",")]
        except ValueError:
            found = []
        if not found or any(len(s) not in (2, 4) or min(s) < 1 or (s[0] < 8 and len(s) == 2) for s in found):
            raise argparse.ArgumentTypeError(
                f"expected shapes NxC (N at least 8) or NxCxHxW such as {SHAPES}, got {text!r}"
            )
        return found

    def listed(option: str, known: Sequence[str]) -> None:
        parser.add_argument(option, type=names(known), help=f"some of {','.join(known)} (default: all)")

    parser.add_argument("--shapes", type=shapes, help=f"default: {SHAPES}")
    listed("--dtypes", list(DTYPES))
    listed("--layouts", list(LAYOUTS))
    listed("--norms", norm_names())
    parser.add_argument(
        "--sync",
        action="store_true",
        help=f"compare layers synchronized over {RANKS} processes with local ones (default: batch,renorm)",
    )
    parser.add_argument("--quick", action="store_true", help="two small shapes in float32, in seconds")
    options = parser.checked(arguments)
    if options.sync and options.device != "cpu":
        parser.error("--sync runs on the CPU")
    options.dtypes = ["float32"] if options.quick else options.dtypes or list(DTYPES)
    options.layouts = options.layouts or list(LAYOUTS)
    if options.sync:
        options.norms = options.norms or ["batch", "renorm"]
        if local := set(options.norms) - set(synchronizable(options.norms)):
            parser.error(f"--sync: {', '.join(sorted(local))}: no statistics over ranks")
    options.norms = options.norms or norm_names()
    options.shapes = options.shapes or shapes("8x512x7x7,256x128" if options.quick else SHAPES)
    return options


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark, print a table per case and one over all; returns the exit code."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    chosen = cases(options.shapes, options.dtypes, options.layouts)
    about = {
        "what": "forward and backward in training mode, ratio to torch.nn.BatchNorm within each round",
        "hardware": hardware(device),
        "device": options.device,
        "torch": torch.__version__,
        "processes": RANKS if options.sync else 1,
        "threads": options.threads,
        "rounds": options.rounds,
        "freed memory kept": device.type != "cpu" or keep_freed_memory(),
    }
    report = Report(
        about,
        "memory: peak beyond the step's start, in sizes of x;",
        f"share: of the measured copy bandwidth, if a step were {PASSES} passes over x",
    )
    budget = (12.0 if options.quick else 150.0) / len(chosen)
    results: Iterable[tuple[Case, dict[str, Result]]]
    if options.sync:
        results = measure_ranks(chosen, options.norms, options.threads, options.rounds, budget)
    else:
        contenders = partial(layers, options.norms)
        results = ((c, measure(c, contenders, device, options.rounds, budget)) for c in chosen)
    measured: dict[Case, dict[str, Result]] = {}
    for case, measured[case] in results:
        report.table(case_table(case, measured[case]))
    rows = summary(measured)
    report.table(summary_table(rows, len(chosen)))
    raw = [
        {**asdict(case), "layers": {name: asdict(result) for name, result in found.items()}}
        for case, found in measured.items()
    ]
    report.end(f"{len(chosen)} cases", options.json, cases=raw, summary=rows)
    return 0
