"""Estimate the statistics for evaluation from data: the training set's, or another's."""

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from bnlight.norm import BatchRenorm
from bnlight.norm.paths import unwrapped
from bnlight.population.observe import (
    Forward,
    Pool,
    layers_of,
    moving_layers,
    pooled,
    warn_of_missed,
)


def precise_statistics(
    model: nn.Module, batches: Iterable[Any], *, forward: Forward | None = None
) -> nn.Module:
    """Estimate the statistics for evaluation from `batches`, with the weights as they are; returns the model.

    The running averages of training lag behind the weights and forget all but the last batches. This replaces
    them by the mean and the unbiased variance of all values that a layer sees in `batches`, in bnlight's
    layers with batch statistics, BatchRenorm too, and in torch's. The values of unequal batches, of virtual
    batches, of a layer called several times and of all ranks count alike, those behind a mask do not, nor do
    batches that `small_batch="running"` leaves out. 10**3 to 10**4 samples are enough.

    The norms run as in training, everything else as in evaluation: with dropout the variances would be larger
    than evaluation's. Synchronized layers normalize by this rank's batch. BatchRenorm and FullNorm normalize
    by their running averages in training: where those are far off, what later layers see is too, and a second
    call comes closer. A norm in evaluation mode inside a model in training mode is frozen and stays as it is,
    as do norms without running averages; a model in evaluation mode has none that are frozen.

    Nothing else changes, and nothing at all after an error: number of batches, other buffers, train flags,
    gradients, torch's random numbers. Wrapped in DDP or DataParallel, or compiled, the model runs without.

    With an initialized process group every rank must call this, with batches of its own, as many as it has:
    they meet once per layer, afterwards, and end with the same statistics.

    Args:
        batches: tensors, or tuples and lists whose first element is the input; it moves to the model's device.
        forward: called as `forward(model, batch)` instead, for batches of any kind.

    Raises ValueError if there are no batches on any rank, TypeError for batches that need a `forward`. Warns of
    layers that no batch has reached, and of a model whose norms are all frozen; they stay as they are.

    Source: Wu and Johnson 2021 (arXiv 2105.07576), section 3; on dropout: Li et al. 2019 (arXiv 1801.05134).

    >>> layer = nn.BatchNorm1d(1)
    >>> _ = precise_statistics(layer, [torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [4.0], [5.0]])])
    >>> layer.running_mean, layer.running_var
    (tensor([3.]), tensor([2.5000]))
    """
    _estimate("precise_statistics", model, batches, forward, 0.0)
    return model


def adapt_statistics(
    model: nn.Module, batches: Iterable[Any], *, forward: Forward | None = None, source_samples: float = 0.0
) -> nn.Module:
    """Adapt the model to other data by their statistics ("AdaBN"); no labels are needed; returns the model.

    A trained network on data of another kind (another scanner, weather, camera) gets the mean and variance
    that its layers see in `batches` of those data; its weights, also the norms', stay as they are. Choose the
    batches as the data will come: with all classes in their usual shares, some hundred samples or more.

    With few target samples, `source_samples=N` counts the statistics that the layers have as if they came from
    N samples, with the n samples of `batches` that reach a layer on all ranks:

    `mean = (N * source_mean + n * target_mean) / (N + n)`, and the variance likewise

    Layers, batches, ranks, `forward`, what stays as it was and what is raised are as in `precise_statistics`:
    torch's and bnlight's layers with running averages, in a model in evaluation mode all that `freeze_norm` has
    not frozen. In BatchRenorm every layer's batches normalize it meanwhile, so that later layers see adapted
    values; FullNorm normalizes by its running averages: call this two or three times.

    Raises ValueError also for a negative `source_samples`.

    Source: Li et al. 2016 (arXiv 1603.04779), section 3.3; `source_samples`: Schneider et al. 2020 (arXiv
    2006.16971), equation 3.

    >>> layer = nn.BatchNorm1d(1).eval()  # mean 0 and variance 1, counted as 2 samples
    >>> _ = adapt_statistics(layer, [torch.tensor([[3.0], [5.0]])], source_samples=2)
    >>> layer.running_mean, layer.running_var
    (tensor([2.]), tensor([1.5000]))
    """
    if not source_samples >= 0:
        raise ValueError(f"adapt_statistics: source_samples must not be negative, got {source_samples}")
    renorms = [m for m in unwrapped(model).modules() if isinstance(m, BatchRenorm)]
    bounds = [(layer.r_max.clone(), layer.d_max.clone()) for layer in renorms]
    try:
        for layer in renorms:  # batch norm
            layer.r_max.fill_(1)
            layer.d_max.fill_(0)
        _estimate("adapt_statistics", model, batches, forward, source_samples)
    finally:
        for layer, (r_max, d_max) in zip(renorms, bounds, strict=True):
            layer.r_max.copy_(r_max)
            layer.d_max.copy_(d_max)
    return model


def _estimate(
    name: str, model: nn.Module, batches: Iterable[Any], forward: Forward | None, source_samples: float
) -> None:
    net = unwrapped(model)
    moving = moving_layers(net)
    if not moving:
        if layers_of(net):
            warnings.warn(
                f"{name}: every norm is frozen, or in evaluation mode in a model in training mode, which counts as "
                "frozen, so all stay as they were; call model.eval() or bnlight.unfreeze_norm(model) first to "
                "estimate them",
                stacklevel=3,
            )
        return
    pools = pooled(name, net, moving, batches, forward, training=True)
    with torch.inference_mode(False), torch.no_grad():  # what is written may be trained with
        for pool in pools:
            _write(pool, source_samples)
    warn_of_missed(name, pools, stacklevel=4)


def _write(pool: Pool, source_samples: float) -> None:
    """Make the layer's running averages those of the pool, where that has enough values, or mix them."""
    share = 1.0 if source_samples == 0 else pool.samples / (pool.samples + source_samples)
    for name, values in (("running_mean", pool.mean), ("running_var", pool.unbiased())):
        old = pool.running(name)
        kept = old if old.shape == pool.shape else old.view(-1, *[1] * (len(pool.shape) - 1))
        mixed = (
            values.view(pool.shape) * share + kept * (1 - share)
            if source_samples
            else values.view(pool.shape)
        )
        new = torch.where(pool.number.view(pool.shape) > 1, mixed.to(old), kept)
        if old.shape == pool.shape:
            old.copy_(new)
        else:
            setattr(pool.layer, name, new)
