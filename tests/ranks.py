"""Real processes in one gloo group, for tests of what ranks do together."""

import faulthandler
import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


class Ranks:
    """Processes that each run the functions they are given, at the same time."""

    def __init__(self, pipes: list[Connection]) -> None:
        self.pipes = pipes

    def run(self, function: Callable[..., Any], *arguments: Any, patience: float = 60) -> list[Any]:
        """What `function(*arguments)` returns, or raises, on each rank."""
        for pipe in self.pipes:
            pipe.send((function, arguments))
        results = []
        for rank, pipe in enumerate(self.pipes):
            assert pipe.poll(patience), f"rank {rank} hangs in {function.__name__}"
            results.append(pipe.recv())
        return results


@contextmanager
def start(size: int, folder: Path) -> Iterator[Ranks]:
    """`size` processes in one gloo group, until the end of the block."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for rank in range(size):
        here, there = context.Pipe()
        process = context.Process(target=_serve, args=(rank, size, str(folder / "store"), there), daemon=True)
        process.start()
        there.close()
        pipes.append(here)
        processes.append(process)
    try:
        yield Ranks(pipes)
    finally:
        for pipe in pipes:
            pipe.close()
        for process in processes:
            process.join(10)
            if process.is_alive():
                process.kill()


def _serve(rank: int, size: int, store: str, pipe: Connection) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    faulthandler.enable()
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            break
        try:
            result = function(*arguments)
        except Exception as error:
            error.add_note(traceback.format_exc())
            result = error
        pipe.send(result)
    dist.destroy_process_group()
