"""Merge the running statistics that the ranks have gathered apart."""

import torch
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm

from bnlight.norm import BatchLayerNorm, FullNorm
from bnlight.norm.paths import named_layers, unwrapped
from bnlight.norm.sync import ProcessGroup
from bnlight.population.observe import frozen, layers_of
from bnlight.population.ranks import number_of_ranks, of_all_ranks


def reduce_statistics(
    model: nn.Module, process_group: ProcessGroup = "world", *, weight: float | None = None
) -> nn.Module:
    """Give every rank the statistics of all ranks' data, from those each has gathered; returns the model.

    `mean = E[mean_r]` and `var = E[var_r] + Var[mean_r]` over the ranks r, each with its weight: those of the
    joined data, up to the factor n / (n - 1) of unbiased variances. So it is for bnlight's layers with running
    averages and torch's BatchNorm and InstanceNorm. A BatchRenorm's standard deviation is the root of the joined
    variance + eps; FullNorm's averaged gradients become their mean, BatchLayerNorm's batch size the largest.
    Training may go on from the result.

    A layer's weight on a rank is the number of batches it has averaged there (`num_batches_tracked`): a rank
    that has never called it does not count, and with `momentum=None` the merge is exact for any numbers. Where
    no rank has counted any (torch's InstanceNorm never does) all count alike. `weight`, if given, is this rank's
    for all layers instead, for instance its number of samples. Afterwards `num_batches_tracked` is the
    largest of the ranks', as if they had trained in step.

    All ranks end with the same bits. What they agree on already, such as synchronized layers, stays as it is to
    the bit, and so do the layers that are frozen: by `freeze_norm`, or in evaluation mode in a model in
    training mode. Two collectives for the whole model. Without a process group, or with one rank, nothing
    happens.

    DistributedDataParallel with `broadcast_buffers=True` overwrites the other ranks' averages by rank 0's at each
    forward: set it False, or there is nothing of theirs to merge but the last batch.

    Raises RuntimeError on every rank if their models have different layers; ValueError for a negative weight;
    TypeError for what is no process group.

    Source: the variance of a mixture of the ranks' distributions; see Chan et al. 1983 (doi
    10.1080/00031305.1983.10483115) for merging moments.
    """
    if weight is not None and not 0 <= weight < float("inf"):
        raise ValueError(f"reduce_statistics: weight must be a number of at least 0, got {weight}")
    net = unwrapped(model)
    layers = layers_of(net) | {
        path: layer
        for path, layer in named_layers(net)
        if isinstance(layer, _InstanceNorm) and layer.running_mean is not None
    }
    layers = {path: layer for path, layer in layers.items() if not frozen(layer, net)}
    if number_of_ranks(process_group) == 1 or not layers:
        return model
    parts = {path: [_weight(layer, weight), *_averages(layer).values()] for path, layer in layers.items()}
    with torch.inference_mode(False), torch.no_grad():
        for path, rows in of_all_ranks("reduce_statistics", parts, process_group).items():
            _merge(layers[path], *rows)
    return model


def _averages(layer: nn.Module) -> dict[str, Tensor]:
    """What the layer averages over its batches, the mean first, then the variance."""
    names = ["running_mean", "running_var", "num_batches_tracked"]
    if isinstance(layer, FullNorm):
        names += ["mean_grad", "var_grad"]
    if isinstance(layer, BatchLayerNorm):
        names += ["batch_size"]
    return {name: buffer for name in names if (buffer := layer._buffers.get(name)) is not None}


def _weight(layer: nn.Module, weight: float | None) -> Tensor:
    mean, tracked = layer.get_buffer("running_mean"), layer._buffers.get("num_batches_tracked")
    if weight is not None or tracked is None:
        return mean.new_tensor(1.0 if weight is None else weight, dtype=torch.float64)
    return tracked


def _merge(layer: nn.Module, weights: Tensor, *rows: Tensor) -> None:
    if not bool(weights.any()):
        weights = torch.ones_like(weights)
    shares = weights / weights.sum()  # (ranks, 1)
    mean = (shares * rows[0]).sum(0)
    for (name, average), values in zip(_averages(layer).items(), rows, strict=True):
        if name in ("num_batches_tracked", "batch_size"):
            new = values.amax(0)
        elif name == "running_var":
            new = (shares * (values + (rows[0] - mean).square())).sum(0)
        else:
            new = (shares * values).sum(0)
        agreed = (values == values[0]).all(0)
        if name == "running_var":
            agreed &= (rows[0] == rows[0][0]).all(0)
        new = torch.where(agreed, values[0], new)
        average.copy_(new.view(average.shape).to(average.device))
