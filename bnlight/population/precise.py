"""Estimate the statistics for evaluation from data: the training set's, or another's."""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bnlight.norm import BatchRenorm
from bnlight.norm.core import Moments, Plan
from bnlight.norm.paths import unwrapped
from bnlight.population.learned import trains_by_averages, warn_of_unconverged
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
    layers that no batch has reached, and of a model whose norms are all frozen; they stay as they are. Warns of
    batches that are not finite at a layer, which are left out there. Warns (UnconvergedAverages) of BatchRenorm and
    FullNorm layers whose averages still remember their initial values: by those the network has learned, so
    evaluate it by them.

    Source: Wu and Johnson 2021 (arXiv 2105.07576), section 3; on dropout: Li et al. 2019 (arXiv 1801.05134).

    >>> layer = nn.BatchNorm1d(1)
    >>> _ = precise_statistics(layer, [torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [4.0], [5.0]])])
    >>> layer.running_mean, layer.running_var
    (tensor([3.]), tensor([2.5000]))
    """
    warn_of_unconverged(
        "precise_statistics",
        moving_layers(unwrapped(model)),
        "Evaluate it as it is; or train longer, with a larger momentum, or a BatchRenorm with "
        "bnlight.norm.renorm_schedule (callbacks=[default,renorm_schedule]), and estimate then",
    )
    _estimate("precise_statistics", model, batches, forward, 0.0, {})
    return model


def adapt_statistics(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Forward | None = None,
    source_samples: float = 0.0,
    source: Iterable[Any] | None = None,
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

    Both train by their running averages, and where those have not converged the network has learned to work with
    what they are, not with the data's statistics. Then (a warning, UnconvergedAverages, says so) give batches of
    the training data as `source`. For each such layer it is measured how the averages relate to those data,

    `r = clip(source_std / running_std)` and `d = clip((source_mean - running_mean) / running_std)`

    with a BatchRenorm's own bounds, and the new averages relate so to the new data: `std = target_std / r`, `mean =
    target_mean - d * std`. On the training data themselves nothing changes, up to the bounds. The other layers do
    not need it, and one call is enough.

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
    net = unwrapped(model)
    moving = moving_layers(net)
    if source is None:
        corrections: dict[str, Correction] = {
            path: _AS_BATCH_NORM for path, layer in moving.items() if isinstance(layer, BatchRenorm)
        }
        warn_of_unconverged(
            "adapt_statistics",
            moving,
            "Give batches of its training data as source=, on the command line --with-source, and it keeps what it "
            "has learned with",
        )
    else:
        learned = {path: layer for path, layer in moving.items() if trains_by_averages(layer)}
        pools = pooled("adapt_statistics", net, learned, source, forward, training=True) if learned else []
        corrections = {pool.path: _correction(pool) for pool in pools if pool.reached}
    _estimate("adapt_statistics", model, batches, forward, source_samples, corrections)
    return model


Correction = tuple[Tensor | float, Tensor | float]
"""The factor and the shift that a layer's normalized values get, each `(C,)` or one number."""
_AS_BATCH_NORM: Correction = (1.0, 0.0)


def _correction(pool: Pool) -> Correction:
    """How a layer that trains by its averages relates them to the values in the pool."""
    layer: Any = pool.layer
    std = (pool.running("running_var").to(pool.var) + layer.eps).sqrt()
    r = (pool.unbiased() + layer.eps).sqrt() / std
    d = (pool.mean - pool.running("running_mean")) / std
    if isinstance(layer, BatchRenorm):
        r_max, d_max = layer.r_max.to(r), layer.d_max.to(r)
        r = r.clamp(1 / r_max if layer.r_min is None else r_max.new_tensor(layer.r_min), r_max)
        d = d.clamp(-d_max, d_max)
    return r, d


@contextmanager
def _corrected(moving: dict[str, nn.Module], corrections: dict[str, Correction]) -> Iterator[None]:
    """These layers normalize by the batch with corrections that are given, not taken from their averages."""

    def step_of(layer: Any, correction: Correction) -> Any:
        def step(batch: Moments, used: Tensor | None) -> Plan:
            layer.follows(batch, used)
            r, d = (batch.mean.new_tensor(1.0) * value for value in correction)
            return Plan(batch.mean, batch.var, correction=(r.to(batch.mean), d.to(batch.mean)))

        return step

    try:
        for path, correction in corrections.items():
            moving[path].__dict__["step"] = step_of(moving[path], correction)
        yield
    finally:
        for path in corrections:
            moving[path].__dict__.pop("step", None)


def _estimate(
    name: str,
    model: nn.Module,
    batches: Iterable[Any],
    forward: Forward | None,
    source_samples: float,
    corrections: dict[str, Correction],
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
    with _corrected(moving, corrections):
        pools = pooled(name, net, moving, batches, forward, training=True)
    with torch.inference_mode(False), torch.no_grad():  # what is written may be trained with
        for pool in pools:
            _write(pool, source_samples, corrections.get(pool.path, _AS_BATCH_NORM))
    warn_of_missed(name, pools, stacklevel=4)


def _write(pool: Pool, source_samples: float, correction: Correction) -> None:
    """Make the layer's running averages those of the pool, where that has enough values, or mix them."""
    share = 1.0 if source_samples == 0 else pool.samples / (pool.samples + source_samples)
    mean, var = pool.mean, pool.unbiased()
    if correction is not _AS_BATCH_NORM:
        layer: Any = pool.layer
        (r, d), eps = correction, layer.eps
        std = (var + eps).sqrt() / r
        mean, var = mean - d * std, (std * std - eps).clamp(min=0)
    for name, values in (("running_mean", mean), ("running_var", var)):
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
