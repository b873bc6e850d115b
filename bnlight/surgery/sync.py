"""Statistics over the batches of all ranks, and back."""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnlight.norm.batch import BatchStatistics
from bnlight.norm.paths import named_layers
from bnlight.norm.sync import Meeting, ProcessGroup
from bnlight.surgery.parameters import warn_of_scripted
from bnlight.surgery.synchronized import Synchronized, synchronize, unsynchronize


def sync_norm(
    model: nn.Module, process_group: ProcessGroup = "world", *, timeout: float | None = None
) -> nn.Module:
    """Let all layers with batch statistics take them over the batches of all ranks; returns the model.

    They are bnlight's, and torch's `BatchNorm1d`, `2d`, `3d`, `SyncBatchNorm`, the lazy ones and their
    subclasses, which keep what they do besides. Outputs, gradients and buffers are those of one process that
    has the joined batch, however uneven the ranks' batches are; a rank without samples passes an empty batch.
    Training costs each layer one collective forward and one backward, evaluation none. Any backend and device
    will do.

    Nothing else changes: modules stay the same objects, shared ones shared, with their hooks, parameters,
    buffers, state-dict keys and train flags; a layer in evaluation mode stays frozen. One thing does: while it is
    synchronized, a `SyncBatchNorm` is no instance of its class, as DistributedDataParallel refuses that on CPU.

    Calling it again is as good as once: a layer that is synchronized already keeps its process group, unless a
    ProcessGroup is given, and its timeout; `unsync_norm` forgets both.

    In DistributedDataParallel set `broadcast_buffers=False` (since torch 2.13 `forward_sync_buffers=False`): the
    buffers agree by themselves, and its broadcast at each forward would wait for a missing rank in the place of
    the layer, which knows its name.

    Args:
        process_group: "world" (the default group, looked up at each forward, so that the model may be built
            before there is one) or a ProcessGroup.
        timeout: seconds after which a rank that does not come is an error (on CPU; None, and devices, use the
            process group's own timeout).

    Every rank must call the layers equally often, in the same order. RuntimeError with the layer's path, its
    call and the rank if ranks meet in different layers, or if one does not come in time; ValueError if all
    ranks together have one value per channel; TypeError, in training, from a subclass of torch's layers that
    does not end in `torch.nn.functional.batch_norm`. Warns of batch norms in scripted modules, which stay local.
    """
    if process_group is None:
        raise TypeError(
            'sync_norm: process_group must be "world" or a ProcessGroup, got None; see unsync_norm'
        )
    layers = {
        module: path
        for path, module in named_layers(model)
        if isinstance(module, BatchStatistics | _BatchNorm)
    }
    warn_of_scripted("sync_norm", model, buffer="running_mean")
    width = max((_row_length(layer) for layer in layers), default=0)
    for number, (layer, path) in enumerate(layers.items()):
        kept, patience = _met(layer) if process_group == "world" else (None, None)
        patience = patience if timeout is None else timeout
        meeting = Meeting(kept or process_group, layer=number, path=path, width=width, timeout=patience)
        if isinstance(layer, BatchStatistics):
            layer.meeting = meeting
        else:
            synchronize(layer, meeting)
    return model


def unsync_norm(model: nn.Module) -> nn.Module:
    """Let every layer take its statistics from its own process again; returns the model.

    torch's layers are of their original classes again, and all that `sync_norm` has added is gone.
    """
    for module in model.modules():
        if isinstance(module, BatchStatistics):
            module.process_group = None
        elif isinstance(module, _BatchNorm):
            unsynchronize(module)
    return model


def _met(layer: nn.Module) -> tuple[ProcessGroup, float | None]:
    """Over which group the layer is synchronized already, and its timeout."""
    if isinstance(layer, BatchStatistics | Synchronized):
        return layer.meeting.group, layer.meeting.timeout
    return (layer.process_group if isinstance(layer, nn.SyncBatchNorm) else None), None


def _row_length(layer: BatchStatistics | _BatchNorm) -> int:
    return layer.row_length() if isinstance(layer, BatchStatistics) else 1 + 3 * layer.num_features
