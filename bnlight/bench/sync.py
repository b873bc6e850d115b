"""Synchronized layers in two processes of this machine, each beside the same layer on its own."""

import multiprocessing
import queue
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bnlight.bench.cases import Case, Result, measure
from bnlight.bench.contenders import BASELINE, OF_POSITIONS, plain_batch_norm
from bnlight.bench.measure import keep_freed_memory
from bnlight.norm import NORMS
from bnlight.norm.batch import BatchStatistics
from bnlight.surgery import sync_norm

RANKS = 2
_spawn: Any = vars(torch.multiprocessing)["spawn"]  # without types
PATIENCE = 120.0
"""Seconds that a process waits for the other."""


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        dy = dy.clone()
        dist.all_reduce(dy)
        return dy


class NaiveSyncBatchNorm(nn.BatchNorm2d):
    """Synchronized batch norm as detectron2 has it: a differentiable all_reduce of mean and mean square."""

    def forward(self, x: Tensor) -> Tensor:
        axes = [axis for axis in range(x.dim()) if axis != 1]
        view = (1, -1, *[1] * (x.dim() - 2))
        values = x.float()
        sums = torch.cat([values.mean(axes), (values * values).mean(axes)])
        mean, mean_square = torch.chunk(_SumOverRanks.apply(sums) / dist.get_world_size(), 2)  # type: ignore[no-untyped-call]
        var = mean_square - mean * mean
        with torch.no_grad():
            for average, value in ((self.running_mean, mean), (self.running_var, var)):
                assert average is not None
                average.lerp_(value, 0.1)
        scale = self.weight * (var + self.eps).rsqrt()
        return (values * scale.view(view) + (self.bias - mean * scale).view(view)).to(x.dtype)


def synchronizable(norms: Sequence[str]) -> list[str]:
    """Those of the names whose layers take statistics over ranks."""
    return [name for name in norms if name in NORMS and issubclass(NORMS[name], BatchStatistics)]


def layers(norms: Sequence[str], x: Tensor) -> dict[str, nn.Module]:
    """The baseline, each layer on its own and over all ranks, and batch norm's other form over all ranks."""
    c = x.size(1)
    chosen: dict[str, nn.Module] = {BASELINE: plain_batch_norm(x)}
    for name in norms:
        if x.dim() > 2 or name not in OF_POSITIONS:
            chosen[name] = NORMS[name](c)
            chosen[f"{name}, {RANKS} ranks"] = sync_norm(NORMS[name](c))
    chosen[f"all_reduce, {RANKS} ranks"] = NaiveSyncBatchNorm(c)
    return chosen


def measure_ranks(
    cases: Sequence[Case], norms: Sequence[str], threads: int, rounds: int, budget: float
) -> Iterator[tuple[Case, dict[str, Result]]]:
    """Each case with what rank 0 of the processes measures while the other does the same.

    Raises what a process raises, and TimeoutError if they do not finish a case in time.
    """
    answers = multiprocessing.get_context("spawn").Queue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (f"file://{folder}/store", answers, cases, norms, threads, rounds, budget)
        running = _spawn(_rank, arguments, RANKS, join=False)
        try:
            for case in cases:
                yield case, _next(answers, running, PATIENCE + 10 * budget)
        finally:
            for process in running.processes:
                process.kill()
                process.join()


def _next(answers: Any, running: Any, patience: float) -> dict[str, Result]:
    end = time.monotonic() + patience
    while time.monotonic() < end:
        try:
            answer: dict[str, Result] = answers.get(timeout=0.5)
            return answer
        except queue.Empty:
            running.join(timeout=0)  # raises what a process has raised
    raise TimeoutError(f"the {RANKS} processes did not finish a case within {patience:.0f} seconds")


def _rank(
    rank: int,
    store: str,
    answers: Any,
    cases: Sequence[Case],
    norms: Sequence[str],
    threads: int,
    rounds: int,
    budget: float,
) -> None:
    torch.set_num_threads(threads)
    keep_freed_memory()
    patience = timedelta(seconds=PATIENCE)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS, timeout=patience)
    for case in cases:
        results = measure(case, partial(layers, norms), torch.device("cpu"), rounds, budget, _largest)
        if rank == 0:
            answers.put(results)
    dist.barrier()  # a process that leaves early takes the store with it
    dist.destroy_process_group()


def _largest(number: float) -> float:
    """The largest of all ranks' numbers, once all are here."""
    numbers = torch.tensor(number, dtype=torch.float64)
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return float(numbers)
