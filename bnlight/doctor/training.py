"""The checks of what is around the model: optimizer, loader, labels."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bnlight.doctor.case import Case
from bnlight.doctor.finding import Finding
from bnlight.norm.batch import BatchStatistics
from bnlight.population.learned import REMEMBERED, remembered

LABELS = ("label", "labels", "y", "target", "targets")
SURE = 6.0
"""Standard deviations below what chance gives from which batches count as sorted by class."""


def decayed_norms(case: Case, optimizers: Iterable[torch.optim.Optimizer]) -> Iterator[Finding]:
    """Weight decay on norms' weights and biases."""
    decayed: dict[int, float] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if group.get("weight_decay"):
                decayed |= {id(parameter): group["weight_decay"] for parameter in group["params"]}
    layers = [
        path
        for norm, path in case.norms.items()
        if any(p.requires_grad and id(p) in decayed for p in norm.parameters(recurse=False))
    ]
    if layers:
        yield Finding(
            "decayed_norms",
            "note",
            tuple(layers),
            f"weight decay ({max(decayed.values()):g}) pulls the norms' weights and biases to 0",
            "Give bnlight.norm_parameters(model) a group of its own with weight_decay=0",
        )


def unconverged(case: Case) -> Iterator[Finding]:
    """Layers that train by running averages which the training is too short to make the data's."""
    if not case.batches:
        return
    shares = {path: remembered(norm, case.batches) for norm, path in case.batch_norms.items()}
    layers = [path for path, share in shares.items() if share > REMEMBERED]
    if layers:
        enough = math.ceil(100 * (1 - REMEMBERED ** (1 / case.batches))) / 100
        larger = f", or use larger steps of the averages (norm.momentum={enough:g})" if enough < 1 else ""
        yield Finding(
            "unconverged",
            "warning",
            tuple(layers),
            f"these train by running averages, which after the {case.batches} batches of this training will still be "
            f"{max(shares.values()):.0%} their initial values",
            f"Train longer{larger}",
        )


def last_batch(case: Case, loader: Any) -> Iterator[Finding]:
    """A last batch of one sample."""
    local = {norm: path for norm, path in case.batch_norms.items() if not case.is_synchronized(norm)}
    if not local or not any(last_size(each, case.devices) == 1 for each in _loaders(loader)):
        return
    values = {path: min(call.values // call.samples for call in calls) for _, path, calls in case.calls()}
    failing = [path for norm, path in local.items() if values.get(path) == 1 and _refuses(norm)]
    what = "stops the training with an error" if failing else "is normalized by itself and moves the averages"
    yield Finding(
        "last_batch",
        "warning",
        tuple(failing or local.values()),
        f"the last batch of an epoch has one sample, which {what}",
        "drop_last=True in the DataLoader, another batch size, or small_batch='running' in bnlight's layers",
    )


def _refuses(norm: Any) -> bool:
    """Whether a layer does not train with one value per channel."""
    return not isinstance(norm, BatchStatistics) or (norm.small_batch == "error" and norm.too_few > 0)


def last_size(loader: Any, devices: int) -> int | None:
    """Number of samples in a rank's last batch of an epoch; None if that cannot be known."""
    parts = getattr(loader, "parts", None)
    if isinstance(parts, Sequence) and parts and isinstance(parts[-1], slice):  # bnlight's own loaders
        return int(parts[-1].stop - parts[-1].start) if len(parts) > 1 else None
    size, sampler = getattr(loader, "batch_size", None), getattr(loader, "sampler", None)
    if not isinstance(size, int) or size < 2 or getattr(loader, "drop_last", False):
        return None
    try:
        samples = len(sampler)  # type: ignore[arg-type]
    except TypeError:
        return None
    if devices > 1 and not hasattr(sampler, "num_replicas"):
        samples = math.ceil(samples / devices)
    return samples % size or size


def _loaders(loader: Any) -> list[Any]:
    if isinstance(loader, Mapping):
        return [each for value in loader.values() for each in _loaders(value)]
    if isinstance(loader, list | tuple):
        return [each for value in loader for each in _loaders(value)]
    return [] if loader is None else [loader]


def class_sorted(case: Case, labels: Sequence[Tensor], known: Tensor | None = None) -> Iterator[Finding]:
    """Batches of few classes: what is common in a batch says what is in it, and the statistics are not the data's.

    `labels` are those of a few batches, `known` those of the whole data set if it has them.
    """
    if not case.batch_norms or len(labels) < 2:
        return
    everything = torch.cat([*labels]) if known is None else known
    counts = torch.tensor([*Counter(everything.tolist()).values()], dtype=torch.float64)
    share = counts / counts.sum()
    seen = [len(set(batch.tolist())) for batch in labels]
    means, variances = zip(*(distinct_by_chance(share, len(batch)) for batch in labels), strict=True)
    expected, deviation = sum(means), math.sqrt(sum(variances) + 1e-12)
    if sum(seen) < expected - SURE * deviation and sum(seen) < 0.7 * expected:
        yield Finding(
            "class_sorted",
            "warning",
            tuple(case.batch_norms.values()),
            f"batches have {sum(seen) / len(seen):.1f} classes, where shuffled ones would have "
            f"{expected / len(seen):.1f}: batch statistics give the labels away, and evaluation does not have them",
            "Shuffle the training data (shuffle=True), or use a norm without batch statistics (norm=group)",
        )


def distinct_by_chance(share: Tensor, number: int) -> tuple[float, float]:
    """Mean and variance of the number of classes among `number` samples drawn by their shares, `(K,)`."""
    absent = (1 - share) ** number
    mean = float((1 - absent).sum())
    if len(share) > 1000:
        return mean, mean  # an upper bound: the classes' presences are negatively correlated
    both = (1 - share[:, None] - share[None, :]).clamp(min=0) ** number
    covariance = both - absent[:, None] * absent[None, :]
    covariance.fill_diagonal_(0)
    return mean, max(0.0, float((absent * (1 - absent)).sum() + covariance.sum()))


def labels_of(batch: Any) -> Tensor | None:
    """The class labels of a batch: integers, one per sample, behind the input or under a usual name."""
    if isinstance(batch, Mapping):
        found = next((batch[name] for name in LABELS if name in batch), None)
    elif isinstance(batch, list | tuple) and len(batch) > 1:
        found = batch[1]
    else:
        found = None
    if not isinstance(found, Tensor) or found.dim() != 1 or len(found) < 2 or found.is_floating_point():
        return None
    return found.detach().cpu()


def labels_of_data(loader: Any) -> Tensor | None:
    """The labels of all of a loader's samples, where its data set keeps them; None else."""
    loaders = _loaders(loader)
    if len(loaders) != 1:
        return None
    dataset = getattr(loaders[0], "dataset", None)
    tensors = getattr(dataset, "tensors", None)  # of a TensorDataset
    candidates = (
        getattr(loaders[0], "y", None),  # of bnlight's own loaders
        getattr(dataset, "targets", None),
        getattr(dataset, "labels", None),
        tensors[1] if isinstance(tensors, tuple) and len(tensors) == 2 else None,
    )
    for found in candidates:
        if isinstance(found, list | tuple):
            try:
                found = torch.tensor(found)
            except (TypeError, ValueError):
                continue
        if isinstance(found, Tensor) and found.dim() == 1 and len(found) and not found.is_floating_point():
            return found.detach().cpu()
    return None
