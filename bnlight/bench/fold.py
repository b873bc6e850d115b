"""`bnlight bench fold`: inference of bnlight's networks after `bnlight.fold_norm`, against before."""

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from bnlight.bench.cases import percentiles
from bnlight.bench.command import Options, Report, positive, table
from bnlight.bench.measure import hardware, interleaved, keep_freed_memory
from bnlight.models import CNN, MLP, ResNet
from bnlight.norm import BatchNorm
from bnlight.surgery import FoldReport, fold_norm

NORMS = {
    "torch": {"image": nn.BatchNorm2d, "rows": nn.BatchNorm1d},
    "bnlight": {"image": BatchNorm, "rows": BatchNorm},
}
MODELS: dict[str, tuple[str, tuple[int, ...], Callable[[Any], nn.Module]]] = {
    "resnet": (
        "ResNet-20, 3x32x32",
        (3, 32, 32),
        lambda norm: ResNet((3, 32, 32), 10, norm["image"], depth=20),
    ),
    "resnet18": (
        "ResNet-18, 3x224x224",
        (3, 224, 224),
        lambda norm: ResNet((3, 224, 224), 1000, norm["image"], depth=18, style="imagenet"),
    ),
    "cnn": ("CNN, 3x32x32", (3, 32, 32), lambda norm: CNN((3, 32, 32), 10, norm["image"])),
    "mlp": ("MLP 3x128, 784", (784,), lambda norm: MLP((784,), 10, norm["rows"])),
}


@dataclass(frozen=True)
class Speed:
    """Time of a folded network as a ratio to the same one unfolded, within each round."""

    model: str
    norm: str
    batch: int
    median: float
    p10: float
    p90: float
    before_us: float
    after_us: float
    error: float


def measure(model: str, norm: str, batch: int, device: torch.device, rounds: int, budget: float) -> Speed:
    """The network's inference in evaluation mode, eager, without gradients."""
    torch.manual_seed(0)
    _, shape, build = MODELS[model]
    net = build(NORMS[norm]).to(device)
    x = torch.randn(batch, *shape, device=device)
    with torch.no_grad():
        net(torch.randn(8, *shape, device=device))  # statistics that are not 0 and 1
    net.eval()
    folded = fold_norm(net)
    assert isinstance(folded.fold_report, FoldReport)
    assert not folded.fold_report.kept, folded.fold_report
    with torch.inference_mode():
        expected = net(x)
        error = float((folded(x) - expected).norm() / expected.norm())
        steps = {"before": partial(_run, net, x), "after": partial(_run, folded, x)}
        seconds = interleaved(steps, device, rounds, budget)
    ratios = [after / before for before, after in zip(seconds["before"], seconds["after"], strict=True)]
    micro = {name: statistics.median(times) * 1e6 for name, times in seconds.items()}
    low, high = percentiles(ratios)
    return Speed(
        model, norm, batch, statistics.median(ratios), low, high, micro["before"], micro["after"], error
    )


def _run(net: nn.Module, x: torch.Tensor) -> None:
    net(x)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options; argparse prints what is wrong and exits with 2."""
    parser = Options("fold", __doc__, rounds=15, what="at most, within the time")
    parser.add_argument(
        "--models", nargs="+", choices=[*MODELS], default=[*MODELS], metavar="NAME", help=", ".join(MODELS)
    )
    parser.add_argument(
        "--norms", nargs="+", choices=[*NORMS], default=[*NORMS], metavar="NAME", help=", ".join(NORMS)
    )
    parser.add_argument(
        "--batches",
        nargs="+",
        type=positive,
        default=[1, 32],
        metavar="N",
        help="batch sizes (default: 1 32)",
    )
    return parser.checked(arguments)


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark and print its table; returns the exit code."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    cases = [(m, n, b) for m in options.models for n in options.norms for b in options.batches]
    about = {
        "what": "inference after fold_norm, ratio to before within each round; eager, float32",
        "hardware": hardware(device),
        "torch": torch.__version__,
        "threads": options.threads,
        "rounds": options.rounds,
        "freed memory kept": device.type != "cpu" or keep_freed_memory(),
    }
    report = Report(about)
    columns = ["batch", "ratio", "p10..p90", "before µs", "after µs", "error"]
    shown = table(["network", "norm"], columns)
    speeds = []
    for model, norm, batch in cases:
        speed = measure(model, norm, batch, device, options.rounds, budget=120.0 / len(cases))
        speeds.append(speed)
        shown.add_row(
            MODELS[model][0],
            norm,
            str(batch),
            f"{speed.median:.2f}",
            f"{speed.p10:.2f}..{speed.p90:.2f}",
            f"{speed.before_us:.0f}",
            f"{speed.after_us:.0f}",
            f"{speed.error:.0e}",
        )
    report.table(shown)
    report.end(f"{len(cases)} cases", options.json, cases=[asdict(speed) for speed in speeds])
    return 0
