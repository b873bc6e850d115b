"""Statistics over the batches of all ranks, and back."""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnlight.norm.batch import BatchStatistics
from bnlight.norm.sync import Meeting, ProcessGroup


def sync_norm(
    model: nn.Module, process_group: ProcessGroup = "world", *, timeout: float | None = None
) -> nn.Module:
    """Let bnlight's layers with batch statistics take them over the batches of all ranks; returns the model.

    `process_group` is "world" (the default group, looked up at each forward, so that the model may be built
    before there is one) or a ProcessGroup. Any backend will do. Nothing but the layers' `process_group`
    changes: parameters, buffers and state-dict keys stay. Outputs, gradients and buffers are those of one
    process that has the joined batch, however uneven the ranks' batches are; a rank without samples passes an
    empty batch. Training costs each layer one collective forward and one backward, evaluation none.

    In DistributedDataParallel set `broadcast_buffers=False`: the buffers agree by themselves, and its broadcast
    at each forward would wait for a missing rank in the place of the layer, which knows its name.

    Every rank must call the layers equally often, in the same order. RuntimeError with the layer's path, its
    call and the rank if ranks meet in different layers, or if one does not come within `timeout` seconds (on
    CPU; None, and devices, use the process group's own timeout). TypeError if the model has torch's
    batch norm layers, which stay local; replace them by `bnlight.norm.BatchNorm`, whose state dict is the same.
    """
    torchs = [path for path, module in model.named_modules() if isinstance(module, _BatchNorm)]
    if torchs:
        raise TypeError(
            f"sync_norm synchronizes bnlight's layers, but {', '.join(map(repr, torchs))} are torch's; use "
            "bnlight.norm.BatchNorm, which loads their state dict"
        )
    layers = {m: path for path, m in model.named_modules() if isinstance(m, BatchStatistics)}
    width = max((layer.row_length() for layer in layers), default=0)
    for number, (layer, path) in enumerate(layers.items()):
        layer.meeting = Meeting(process_group, layer=number, path=path, width=width, timeout=timeout)
    return model


def unsync_norm(model: nn.Module) -> nn.Module:
    """Let every layer take its statistics from its own process again; returns the model."""
    for module in model.modules():
        if isinstance(module, BatchStatistics):
            module.process_group = None
    return model
