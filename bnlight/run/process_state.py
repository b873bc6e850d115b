"""What of a process's state a job may change, and how each piece is read and written."""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf.basecontainer import BaseContainer


@dataclass(frozen=True)
class Part:
    """A piece of a process's state that a training may change; a dict or list is read as a copy.

    `usual`: Lightning, torch or bnlight change it in the course of a job, so nobody needs to be told.
    """

    name: str
    read: Callable[[], Any]
    write: Callable[[Any], object]
    usual: bool = False


def _folder() -> Path | None:
    try:
        return Path.cwd()
    except FileNotFoundError:  # it has been removed
        return None


def _write_environment(values: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(values)


def _write_path(values: list[str]) -> None:
    sys.path[:] = values


def _write_streams(values: tuple[Any, Any]) -> None:
    sys.stdout, sys.stderr = values


def _device() -> torch.device | None:
    context = getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)
    return None if context is None else context.device


def _deterministic() -> tuple[bool, bool]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )


def _cudnn() -> tuple[bool, ...]:
    return (
        torch.backends.cudnn.enabled,
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
    )


def _write_cudnn(values: tuple[bool, ...]) -> None:
    cudnn = torch.backends.cudnn
    cudnn.enabled, cudnn.deterministic, cudnn.benchmark = values  # type: ignore[assignment,unused-ignore]


def _write_filters(values: list[Any]) -> None:
    warnings.resetwarnings()  # which also forgets what was already shown by the old ones
    warnings.filters[:] = values  # type: ignore[index]


def _write_show(value: Any) -> None:
    warnings.showwarning = value


def _write_handlers(values: list[logging.Handler]) -> None:
    logging.getLogger().handlers[:] = values


HOOKS = {
    name: value
    for name, value in vars(torch.nn.modules.module).items()
    if name.startswith("_global_") and isinstance(value, dict)
}


def _hooks() -> dict[tuple[str, Any], Any]:
    return {(name, key): hook for name, hooks in HOOKS.items() for key, hook in hooks.items()}


def _write_hooks(values: dict[tuple[str, Any], Any]) -> None:
    for hooks in HOOKS.values():
        hooks.clear()
    for (name, key), hook in values.items():
        HOOKS[name][key] = hook


def _write_resolvers(values: dict[str, Any]) -> None:
    BaseContainer._resolvers.clear()
    BaseContainer._resolvers.update(values)


def _signals() -> dict[int, Any]:
    if threading.current_thread() is not threading.main_thread():  # no other may set them
        return {}
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    return {
        number: handler for number, handler in handlers.items() if handler is not None
    }  # None: not Python's


def _write_signals(values: dict[int, Any]) -> None:
    for number, handler in values.items():
        if signal.getsignal(number) is not handler:
            signal.signal(number, handler)


PARTS = (
    Part("the working directory", _folder, os.chdir),
    Part("the environment", lambda: dict(os.environ), _write_environment, usual=True),
    Part("sys.path", lambda: [*sys.path], _write_path),
    Part("sys.stdout and sys.stderr", lambda: (sys.stdout, sys.stderr), _write_streams),
    Part("torch's default device", _device, torch.set_default_device),
    Part("torch's default dtype", torch.get_default_dtype, torch.set_default_dtype),
    Part("the mode of gradients", torch.is_grad_enabled, torch.set_grad_enabled),
    Part("the detection of anomalies", torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    Part(
        "deterministic algorithms",
        _deterministic,
        lambda values: torch.use_deterministic_algorithms(values[0], warn_only=values[1]),
        usual=True,
    ),
    Part("cuDNN's switches", _cudnn, _write_cudnn, usual=True),
    Part("the number of threads", torch.get_num_threads, torch.set_num_threads, usual=True),
    Part(
        "the precision of matrix products",
        torch.get_float32_matmul_precision,
        torch.set_float32_matmul_precision,
    ),
    Part(
        "the sharing strategy of processes",
        torch.multiprocessing.get_sharing_strategy,
        torch.multiprocessing.set_sharing_strategy,
    ),
    Part("hooks of all modules", _hooks, _write_hooks),
    Part("filters of warnings", lambda: [*warnings.filters], _write_filters),
    Part("warnings.showwarning", lambda: warnings.showwarning, _write_show),
    Part(
        "the level of logging",
        lambda: logging.getLogger().level,
        lambda value: logging.getLogger().setLevel(value),
    ),
    Part("handlers of logging", lambda: [*logging.getLogger().handlers], _write_handlers),
    Part("OmegaConf's resolvers", lambda: dict(BaseContainer._resolvers), _write_resolvers),
    Part("signal handlers", _signals, _write_signals),
    Part("numpy's handling of errors", np.geterr, lambda values: np.seterr(**values)),
    Part("garbage collection", gc.isenabled, lambda value: gc.enable() if value else gc.disable()),
)
