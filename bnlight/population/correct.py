"""Each example's own statistics have a part in evaluation, as they have in training."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnlight.norm import BatchRenorm, FullNorm
from bnlight.norm.batch import BatchStatistics
from bnlight.norm.paths import unwrapped
from bnlight.population.observe import Forward, Pool, layers_of, pooled, warn_of_missed


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
