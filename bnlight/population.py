"""The statistics by which evaluation normalizes: estimated from data, and corrected by each example's own."""

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnlight.norm import BatchRenorm, FullNorm
from bnlight.norm.batch import BatchStatistics
from bnlight.observe import Forward, Pool, layers_of, pooled, unwrapped, warn_of_missed


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
    net = unwrapped(model)
    layers = layers_of(net)
    moving = {path: layer for path, layer in layers.items() if layer.training or not net.training}
    if not moving:
        if layers:
            warnings.warn(
                "precise_statistics: every norm is in evaluation mode in a model in training mode, so all count as "
                "frozen and stay as they were; call model.eval() first to estimate them",
                stacklevel=2,
            )
        return model
    pools = pooled("precise_statistics", net, moving, batches, forward, training=True)
    with torch.inference_mode(False), torch.no_grad():  # what is written may be trained with
        for pool in pools:
            _write(pool)
    warn_of_missed("precise_statistics", pools)
    return model


def correct_inference(
    model: nn.Module,
    example_weight: float,
    *,
    batches: Iterable[Any] | None = None,
    forward: Forward | None = None,
) -> nn.Module:
    """Weigh each example's own statistics with the running averages in evaluation; returns the model.

    `mean = (1 - a) * running_mean + a * mean_i`, `E2 = (1 - a) * (running_var + running_mean**2) + a * E2_i`

    and `var = E2 - mean**2` with `a = example_weight`, where `mean_i` and `E2_i` are the means of x and x**2
    over the (valid) positions of example i, one per channel. In training an example has a part in the
    statistics that normalize it, 1/n in a batch of n; plain evaluation gives it none. With small batches that
    can cost accuracy, and no retraining is needed to give it back. Training does not change; 0, as by default,
    is plain evaluation.

    Choose `a` on validation data, never on the test set: the best one may be 0.

    With `batches` the variance is exactly what training expects for the example, for `a = 1/n`, n being the
    number of examples that share statistics (a batch, a virtual batch, or all ranks' batches):

    `E[var | example i] = E2 - mean**2 - a * (1 - a) * example_var`

    `example_var`, the variance between the examples' means, is estimated over `batches`, in evaluation and over
    all ranks; batches, `forward`, what stays and what is raised are as in `precise_statistics`. The running
    averages should be the population's, so call that one first.

    In BatchInstanceNorm, BatchLayerNorm and SwitchableNorm the batch's part is corrected, in MeanOnlyBatchNorm
    the mean. The correction is a layer's buffers `example_weight` and `example_var`: None, and not in the state
    dict, unless it is on; loading a state dict that has them switches it on.

    Raises ValueError if `a` is not in [0, 1], or if the model has BatchRenorm or FullNorm, which train by their
    running averages and need no correction; TypeError if it has torch's batch norm layers.

    Source: Summers and Dinneen 2020 (arXiv 1906.03548), section 3.1, "inference example weighing"; the form with
    `batches` is derived here. EvalNorm (arXiv 1904.06031) learns such weights in training and is not here.

    >>> from bnlight.norm import BatchNorm
    >>> model = nn.Sequential(BatchNorm(1, eps=0.0)).eval()
    >>> x = torch.tensor([[[2.0, 4.0]]])  # its mean 3 and variance 1 instead of 0 and 1
    >>> correct_inference(model, 0.5)(x).detach().round(decimals=2)  # by mean 1.5 and variance 1 + 3**2 / 4
    tensor([[[0.2800, 1.3900]]])
    """
    if not 0 <= example_weight <= 1:
        raise ValueError(f"correct_inference: example_weight must be in [0, 1], got {example_weight}")
    net = unwrapped(model)
    if example_weight == 0:
        for module in net.modules():
            if isinstance(module, BatchStatistics):
                module.example_weight = module.example_var = None
        return model
    layers = layers_of(net)
    _refuse_correction(layers)
    pools = [Pool(path, layer) for path, layer in layers.items()]
    if layers and batches is not None:
        pools = pooled("correct_inference", net, layers, batches, forward, training=False)
        warn_of_missed("correct_inference", pools)
    with torch.inference_mode(False), torch.no_grad():
        for pool in pools:
            if batches is None or pool.reached:
                like = pool.running("running_var")
                pool.layer.example_weight = like.new_full((), example_weight)
                pool.layer.example_var = like.new_zeros(()) if batches is None else pool.unbiased().to(like)
    return model


def _write(pool: Pool) -> None:
    """Make the layer's running averages those of the pool, where that has enough values."""
    for name, values in (("running_mean", pool.mean), ("running_var", pool.unbiased())):
        old = pool.running(name)
        kept = old if old.shape == pool.shape else old.view(-1, *[1] * (len(pool.shape) - 1))
        new = torch.where(pool.number.view(pool.shape) > 1, values.view(pool.shape).to(old), kept)
        if old.shape == pool.shape:
            old.copy_(new)
        else:
            setattr(pool.layer, name, new)


def _refuse_correction(layers: dict[str, nn.Module]) -> None:
    for path, layer in layers.items():
        if isinstance(layer, _BatchNorm):
            raise TypeError(
                f"correct_inference: '{path}' is torch's {type(layer).__name__}; use bnlight.norm.BatchNorm, which "
                "loads its state dict"
            )
        if isinstance(layer, BatchRenorm | FullNorm):
            raise ValueError(
                f"correct_inference: '{path}' is a {type(layer).__name__}, which normalizes by its running averages "
                "in training as in evaluation: there is nothing to correct"
            )
