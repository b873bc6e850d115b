"""A job in a process that outlives it leaves nothing behind."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import random
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from hydra._internal.utils import _locate

from bnlight.run.process_state import PARTS

log = logging.getLogger(__name__)


_changed: dict[str, dict[str, Any]] = {}  # by importing a module: of each part, what `_difference` says
_imported: dict[str, Any] = {}  # the parts as the running job has found them after its imports


@contextlib.contextmanager
def isolated() -> Iterator[None]:
    """Give back, at the end of the block, what a training changes in its process, and log what that was.

    That is everything in `PARTS`, generators of random numbers, the process group, and memory of the accelerator.
    A process that the job has forked ends with the block.
    """
    process, before = os.getpid(), _read()
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
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
        found, begun = _read(), before | _imported
        _imported.clear()
        for part in PARTS:
            if found[part.name] != before[part.name]:
                part.write(before[part.name])
        left = [part.name for part in PARTS if not part.usual and found[part.name] != begun[part.name]]
        if left:
            log.warning("put back, as the job has left it changed: %s", ", ".join(left))
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        gc.collect()
        if frozen:
            gc.unfreeze()
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.empty_cache()


def import_targets(config: Any) -> None:
    """Import what the `_target_`s in `config` name, for a job within `isolated`.

    A module is run once in a process, so what it sets when it is imported would be gone after the first job: it is
    noted, and set again for each later job whose config names something of that module. What cannot be imported is
    left to whoever builds it, and says so.
    """
    for target in dict.fromkeys(_targets(config)):
        before, loaded = _read(), {*sys.modules}
        with contextlib.suppress(ImportError, ValueError):  # Hydra makes them of whatever the module raises
            _locate(target)
        difference = {
            name: _difference(before[name], value)
            for name, value in _read().items()
            if value != before[name] and name != "the working directory"
        }
        new = {*sys.modules} - loaded
        _changed.update(dict.fromkeys(new, difference))
        module = target
        while module and module not in sys.modules:
            module = module.rpartition(".")[0]
        if module not in new:
            for part in PARTS:
                if part.name in _changed.get(module, {}):
                    now = part.read()
                    if (value := _with(now, _changed[module][part.name])) != now:
                        part.write(value)
    _imported.update(_read())


def _targets(config: Any) -> Iterator[str]:
    if isinstance(config, Mapping):
        if isinstance(target := config.get("_target_"), str):
            yield target
        config = list(config.values())
    if isinstance(config, list):
        for item in config:
            yield from _targets(item)


def _read() -> dict[str, Any]:
    return {part.name: part.read() for part in PARTS}


def _difference(before: Any, after: Any) -> Any:
    """What has come into a dict; before and behind a list; the new value of anything else."""
    if isinstance(after, dict):
        return {key: value for key, value in after.items() if key not in before or before[key] != value}
    if isinstance(after, list):
        first = next((index for index, item in enumerate(after) if item in before), len(after))
        return after[:first], [item for item in after[first:] if item not in before]
    return after


def _with(value: Any, difference: Any) -> Any:
    if isinstance(value, dict):
        return value | difference
    if isinstance(value, list):
        ahead, behind = ([item for item in items if item not in value] for items in difference)
        return [*ahead, *value, *behind]
    return difference


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
