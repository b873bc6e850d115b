"""A job in a process that outlives it leaves nothing behind."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import random
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import numpy as np
import torch

from bnlight.lightning.stop import ASKING

log = logging.getLogger(__name__)


@contextlib.contextmanager
def isolated() -> Iterator[None]:
    """Give back, at the end of the block, what a training changes in its process.

    That is: the working directory, environment, import path and streams, seeds and generators, torch's global
    switches, the process group, signal handlers, and memory of the accelerator. A process that the job has forked
    ends with the block.
    """
    process, folder, streams = os.getpid(), Path.cwd(), (sys.stdout, sys.stderr)
    path, device = [*sys.path], getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)
    gradients, anomaly = torch.is_grad_enabled(), torch.is_anomaly_enabled()
    environment = dict(os.environ)
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    deterministic = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    precision, dtype = torch.get_float32_matmul_precision(), torch.get_default_dtype()
    threads = torch.get_num_threads()
    main = threading.current_thread() is threading.main_thread()
    handlers = {name: signal.getsignal(name) for name in ASKING} if main else {}
    frozen = gc.get_freeze_count() == 0  # else somebody else has frozen, and unfreezes
    if frozen:
        gc.freeze()  # the collection at the end looks at the job's own objects, not at all of torch's: 0.2 s
    try:
        yield
    finally:
        if os.getpid() != process:
            _end_fork()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        if Path.cwd() != folder:
            log.warning("the job has left the working directory %s: back to %s", Path.cwd(), folder)
            os.chdir(folder)
        sys.path[:], (sys.stdout, sys.stderr) = path, streams
        torch.set_grad_enabled(gradients)
        torch.autograd.set_detect_anomaly(anomaly)
        if getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None) is not device:
            torch.set_default_device(None if device is None else device.device)
        os.environ.clear()
        os.environ.update(environment)
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        torch.use_deterministic_algorithms(deterministic[0], warn_only=deterministic[1])
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
        torch.set_float32_matmul_precision(precision)
        torch.set_default_dtype(dtype)
        torch.set_num_threads(threads)
        for name, handler in handlers.items():
            signal.signal(name, handler)
        gc.collect()
        if frozen:
            gc.unfreeze()
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.empty_cache()


def _end_fork() -> None:
    """A child that has left the job's code would take itself for the sweep, and run the other jobs."""
    if failed := sys.exc_info()[0] is not None:
        traceback.print_exc()
        sys.stderr.flush()
    os._exit(int(failed))


@contextlib.contextmanager
def log_to(path: Path, rank: int = 0) -> Iterator[None]:
    """Append what is logged and warned during the block to `path`, each line with the rank it comes from.

    What Lightning says of itself goes to the file alone.
    """
    handler = logging.FileHandler(path, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter(f"%(asctime)s rank {rank} %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    level = root.level
    lightning = [
        logging.getLogger(name) for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch")
    ]
    propagation = [logger.propagate for logger in lightning]
    muted = [handler for logger in lightning for handler in logger.handlers]
    levels = [handler.level for handler in muted]
    show_warning = warnings.showwarning

    def show_and_log(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        log.warning("%s:%s: %s: %s", filename, lineno, category.__name__, message)
        if not any(f"/{package}/" in filename for package in ("pytorch_lightning", "lightning_fabric")):
            show_warning(message, category, filename, lineno, file, line)

    warnings.showwarning = show_and_log
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    for logger in lightning:
        logger.propagate = True
    for console in muted:
        console.setLevel(logging.ERROR)
    try:
        yield
    finally:
        warnings.showwarning = show_warning
        root.removeHandler(handler)
        root.setLevel(level)
        for logger, propagate in zip(lightning, propagation, strict=True):
            logger.propagate = propagate
        for console, before in zip(muted, levels, strict=True):
            console.setLevel(before)
        handler.close()
