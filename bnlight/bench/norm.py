"""`bnlight bench norm`: forward and backward of each layer against `torch.nn.BatchNorm` of the same input."""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from bnlight.bench.contenders import BASELINE, layers, norm_names
from bnlight.bench.measure import Step, copy_seconds, hardware, interleaved, peak_memory

SHAPES = "64x64x56x56,32x256x14x14,8x512x7x7,4x64x112x112,256x128"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
STYLE: dict[str, Any] = {
    "title_justify": "left",
    "title_style": "bold",
    "box": None,
    "padding": (0, 1, 0, 0),
    "pad_edge": False,
}
PASSES = 5  # a step reads x and writes y, then reads x and dy and writes dx


@dataclass(frozen=True)
class Case:
    """One input that all layers get."""

    shape: tuple[int, ...]
    dtype: str
    layout: str

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.shape))} {self.dtype} {self.layout}"

    def tensor(self, device: torch.device) -> Tensor:
        """Random values of this shape, dtype and layout."""
        x = torch.randn(self.shape, device=device, dtype=DTYPES[self.dtype])
        return x.contiguous(memory_format=LAYOUTS[self.layout])


@dataclass(frozen=True)
class Result:
    """One layer in one case: ratios to torch's BatchNorm, memory in sizes of x, share of the bandwidth."""

    median: float
    p10: float
    p90: float
    microseconds: float
    memory: float
    bandwidth: float
    seconds: list[float]


def cases(shapes: Sequence[tuple[int, ...]], dtypes: Sequence[str], layouts: Sequence[str]) -> list[Case]:
    """All combinations; `(N, C)` has one layout."""
    return [
        Case(shape, dtype, layout)
        for shape in shapes
        for dtype in dtypes
        for layout in (layouts if len(shape) == 4 else ["contiguous"])
    ]


def training_step(layer: nn.Module, x: Tensor, dy: Tensor) -> Step:
    """Forward and backward of `layer`; the gradients go at its end, as in a training loop."""
    inputs = [x, *layer.parameters()]

    def step() -> None:
        layer(x).backward(dy)
        for tensor in inputs:
            tensor.grad = None

    return step


def measure(
    case: Case, norms: list[str], device: torch.device, rounds: int, budget: float
) -> dict[str, Result]:
    """Every layer's result in this case, the baseline first."""
    torch.manual_seed(0)
    x, dy = case.tensor(device), case.tensor(device)
    floor = PASSES / 2 * copy_seconds(x)
    x.requires_grad_()
    steps = {name: training_step(layer, x, dy) for name, layer in layers(norms, x).items()}
    seconds = interleaved(steps, device, rounds, budget)
    results = {}
    for name, times in seconds.items():
        ratios = [mine / torchs for mine, torchs in zip(times, seconds[BASELINE], strict=True)]
        typical = statistics.median(times)
        results[name] = Result(
            statistics.median(ratios),
            *percentiles(ratios),
            typical * 1e6,
            peak_memory(steps[name], device) / dy.nbytes,
            floor / typical,
            times,
        )
    return results


def percentiles(values: list[float]) -> tuple[float, float]:
    """The 10th and the 90th."""
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return tenths[0], tenths[-1]


def case_table(case: Case, results: dict[str, Result]) -> Table:
    """Every layer in one case."""
    rounds = len(results[BASELINE].seconds)
    table = Table("layer", title=f"{case}, {rounds} rounds", **STYLE)
    for column in ("ratio", "p10..p90", "µs", "memory", "share"):
        table.add_column(column, justify="right")
    for name, r in results.items():
        table.add_row(
            name,
            f"{r.median:.2f}",
            f"{r.p10:.2f}..{r.p90:.2f}",
            f"{r.microseconds:.0f}",
            f"{r.memory:.2f}",
            f"{r.bandwidth:.0%}",
        )
    return table


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
    table = Table("layer", title=title, **STYLE)
    for column in ("mean", "worst", "memory", "share"):
        table.add_column(column, justify="right")
    table.add_column("worst case")
    for name, row in rows.items():
        numbers = f"{row['geometric_mean']:.2f}", f"{row['worst']:.2f}", f"{row['memory']:.2f}"
        table.add_row(name, *numbers, f"{row['bandwidth']:.0%}", row["worst_case"])
    return table


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options, each list split and checked; argparse prints what is wrong and exits with 2."""
    parser = argparse.ArgumentParser(prog="bnlight bench norm", description=__doc__)

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

    def positive(text: str) -> int:
        if not text.isdigit() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
        return int(text)

    def listed(option: str, known: Sequence[str]) -> None:
        default = ",".join(known)
        parser.add_argument(option, type=names(known), default=default, help=f"some of {default}")

    parser.add_argument("--shapes", type=shapes, help=f"default: {SHAPES}")
    listed("--dtypes", list(DTYPES))
    listed("--layouts", list(LAYOUTS))
    listed("--norms", norm_names())
    parser.add_argument("--rounds", type=positive, default=15, help="at most, within the time (default: 15)")
    parser.add_argument("--threads", type=positive, default=1, help="of the CPU (default: 1)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="two small shapes in float32, in seconds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers to FILE")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    if options.json is not None and not options.json.absolute().parent.is_dir():
        parser.error(f"--json: there is no folder {options.json.absolute().parent}")
    if options.quick:
        options.dtypes = ["float32"]
    options.shapes = options.shapes or shapes("8x512x7x7,256x128" if options.quick else SHAPES)
    return options


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark, print a table per case and one over all; returns the exit code."""
    options = parse(arguments)
    console, begun = Console(), time.perf_counter()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    chosen = cases(options.shapes, options.dtypes, options.layouts)
    about = {
        "what": "forward and backward in training mode, ratio to torch.nn.BatchNorm within each round",
        "hardware": hardware(device),
        "device": options.device,
        "torch": torch.__version__,
        "threads": options.threads,
        "rounds": options.rounds,
    }
    console.print(", ".join(f"{key} {value}" for key, value in about.items() if key != "what"))
    console.print(f"{about['what']}; memory: peak beyond the step's start, in sizes of x;")
    console.print(f"share: of the measured copy bandwidth, if a step were {PASSES} passes over x\n")
    measured: dict[Case, dict[str, Result]] = {}
    budget = (12.0 if options.quick else 150.0) / len(chosen)
    for case in chosen:
        measured[case] = measure(case, options.norms, device, options.rounds, budget)
        console.print(case_table(case, measured[case]), "")
    rows = summary(measured)
    console.print(summary_table(rows, len(chosen)))
    seconds = time.perf_counter() - begun
    console.print(f"\n{len(chosen)} cases in {seconds:.0f} s")
    if options.json is not None:
        raw = [
            {**asdict(case), "layers": {name: asdict(result) for name, result in results.items()}}
            for case, results in measured.items()
        ]
        text = json.dumps({**about, "seconds": seconds, "cases": raw, "summary": rows}, indent=1)
        options.json.write_text(text + "\n", encoding="utf-8")
    return 0
