"""One benchmark case: an input, and how long each layer takes for it."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bnlight.bench.contenders import BASELINE
from bnlight.bench.measure import Agree, Step, copy_seconds, interleaved, own, peak_memory

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
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
    case: Case,
    contenders: Callable[[Tensor], dict[str, nn.Module]],
    device: torch.device,
    rounds: int,
    budget: float,
    agree: Agree = own,
) -> dict[str, Result]:
    """The result of each of the contenders for the input."""
    torch.manual_seed(0)
    x, dy = case.tensor(device), case.tensor(device)
    floor = PASSES / 2 * copy_seconds(x)
    x.requires_grad_()
    steps = {name: training_step(layer, x, dy) for name, layer in contenders(x).items()}
    seconds = interleaved(steps, device, rounds, budget, agree)
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
