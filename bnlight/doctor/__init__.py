"""What often goes wrong with norms, looked for in a model and its training before it costs a day."""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnlight.doctor.case import Case
from bnlight.doctor.finding import Diagnosis, Finding
from bnlight.doctor.layers import LAYER_CHECKS
from bnlight.doctor.look import Look, looking
from bnlight.doctor.training import (
    class_sorted,
    decayed_norms,
    labels_of,
    labels_of_data,
    last_batch,
    unconverged,
)
from bnlight.norm.paths import unwrapped
from bnlight.population.observe import Forward
from bnlight.surgery import unsync_norm
from bnlight.surgery.dress import plain_class
from bnlight.surgery.fold import copied
from bnlight.surgery.fold_trace import take_hooks_off

__all__ = ["BATCHES", "Case", "Diagnosis", "Finding", "Look", "diagnose", "examine", "sorted_classes"]

BATCHES = 8
"""So many batches' labels are looked at."""


def diagnose(
    model: nn.Module,
    batch: Any = None,
    *,
    forward: Forward | None = None,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    loader: Iterable[Any] | None = None,
    devices: int = 1,
    accumulate: int = 1,
) -> Diagnosis:
    """What is wrong, or worth knowing, about the norms of a model and how it is trained: a list that prints.

    Give as much as there is: each check looks at what it needs and is silent without. One batch of one rank goes
    forward through a copy of the model in training mode (a norm in evaluation mode inside a model in training
    mode is frozen and stays so), with a graph, without a backward. Model, buffers,
    gradients, hooks and torch's, numpy's and Python's random numbers stay as they are.

    Args:
        model: any module; wrapped in DDP or DataParallel, the module inside.
        batch: a batch as training has it: a tensor, or a tuple or list that starts with one. Default: the
            loader's first.
        forward: called as `forward(model, batch)` instead of the model, for batches of any kind.
        optimizer: one or several.
        loader: of the training; the labels of its first 8 batches are looked at, if it gives (input, label).
        devices: number of ranks.
        accumulate: batches per optimizer step.

    docs/doctor.md lists the checks with their thresholds and sources.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    >>> for finding in diagnose(net, torch.randn(2, 3, 8, 8)):
    ...     print(finding.severity, finding.check, finding.layers)
    warning few_values ('1',)
    note redundant_bias ('0',)
    """
    net = unwrapped(model)
    optimizers = [] if optimizer is None else optimizer if isinstance(optimizer, Sequence) else [optimizer]
    findings: list[Finding] = []
    with _random_numbers_kept():
        batches = [] if loader is None else [*itertools.islice(loader, BATCHES)]
        if batch is None and batches:
            batch = batches[0]
        look = None
        if batch is not None:
            look, error = _try(net, batch, forward)
            findings += [] if error is None else [_failed(error)]
    case = Case(net, look, devices, accumulate)
    labels = [found for each in batches if (found := labels_of(each)) is not None]
    findings += examine(case, optimizers, loader, labels)
    return Diagnosis(findings)


def examine(
    case: Case,
    optimizers: Iterable[torch.optim.Optimizer] = (),
    loader: Any = None,
    labels: Sequence[Tensor] = (),
) -> Iterator[Finding]:
    """All checks of a case, each for itself; a loader's batches are not asked for."""
    checks: list[Callable[[Case], Iterable[Finding]]] = [
        *LAYER_CHECKS,
        unconverged,
        partial(last_batch, loader=loader),
        partial(decayed_norms, optimizers=optimizers),
        partial(sorted_classes, loader=loader, labels=labels),
    ]
    for check in checks:
        try:
            yield from check(case)
        except Exception as error:  # of one check with somebody's model; the others go on
            name = getattr(check, "func", check).__name__
            yield Finding(
                "doctor", "note", (), f"the check {name} failed: {_described(error)}", "Please report it"
            )


def sorted_classes(case: Case, loader: Any, labels: Sequence[Tensor]) -> Iterator[Finding]:
    """Whether the batches with these labels are sorted by class, by the loader's data set if that knows all labels."""
    yield from class_sorted(case, labels, labels_of_data(loader) if labels else None)


class _LocalSyncBatchNorm(nn.SyncBatchNorm):
    """Normalizes by this rank's batch, on any device: others do not take part in looking."""

    forward = _BatchNorm.forward


def _try(net: nn.Module, batch: Any, forward: Forward | None) -> tuple[Look, Exception | None]:
    """Look at the batch's way through a copy of the model, as far as it comes."""
    copy = copied(net)
    if not net.training:
        copy.train()
    for module in copy.modules():
        take_hooks_off(module)
    unsync_norm(copy)
    for module in copy.modules():
        if plain_class(module) is nn.SyncBatchNorm:
            module.__class__ = _LocalSyncBatchNorm
    look = Look(copy)
    try:
        with looking(look), torch.enable_grad():
            if forward is not None:
                forward(copy, batch)
            else:
                copy(_input(copy, batch))
    # What a model does with a batch is its own affair; what was seen until then counts.
    except Exception as error:
        return look, error
    return look, None


def _input(model: nn.Module, batch: Any) -> Tensor:
    x = batch[0] if isinstance(batch, list | tuple) and batch else batch
    if not isinstance(x, Tensor):
        raise TypeError(
            f"a batch that starts with a tensor is expected, got {type(x).__name__}; say what to do with it: "
            "forward=lambda model, batch: model(**batch)"
        )
    tensors = itertools.chain(model.parameters(), model.buffers())
    x = x.to(next(tensors, x).device)
    return x.detach().requires_grad_() if x.is_floating_point() else x


def _failed(error: Exception) -> Finding:
    return Finding(
        "forward",
        "note",
        (),
        f"the forward of the batch failed, so that some checks saw nothing or only its beginning ({_described(error)})",
        "Pass a batch as training has it, or forward=",
    )


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


@contextmanager
def _random_numbers_kept() -> Iterator[None]:
    numpy = sys.modules.get("numpy")
    python, arrays = random.getstate(), None if numpy is None else numpy.random.get_state()
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(arrays)
