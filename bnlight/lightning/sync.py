"""Lightning's plugin that synchronizes the norms while a model is fitted."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch.distributed as dist
from pytorch_lightning.plugins import TorchSyncBatchNorm
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bnlight.norm.batch import BatchStatistics
from bnlight.norm.sync import ProcessGroup
from bnlight.surgery import sync_norm, unsync_norm
from bnlight.surgery.groups import Group, check_group, process_group
from bnlight.surgery.synchronized import Synchronized


class NormSync(TorchSyncBatchNorm):
    """`Trainer(plugins=[NormSync()])`: statistics over the batches of all ranks while the model is fitted.

    `bnlight.sync_norm` after the ranks have met and `bnlight.unsync_norm` when the fit ends: bnlight's and torch's
    layers, on any device and backend, gloo on CPU too, with every module, hook, flag and state-dict key as it
    was. Checkpoints need nothing of it. It may stand beside `sync_batchnorm=True`, whose place it takes. The
    strategies `ddp`, `ddp_spawn`, `ddp_fork`, `ddp_notebook` and `fsdp` call it; on one device nothing does, and
    nothing changes.

    DistributedDataParallel copies rank 0's buffers to all ranks at each forward. That is left out, where torch can
    (2.13), if all of the model's buffers are layers' that are synchronized over all ranks, and agree anyway.

    Args:
        group: "world" is all ranks; "node" the ranks of one machine, n (a number) each n consecutive ranks. In a
            part of the ranks the running averages are of that part's batches; in DistributedDataParallel all ranks
            evaluate by those of rank 0's part, as its checkpoint does.

    Raises ValueError for another group, and at the start of the fit for a number that does not divide the ranks.
    """

    def __init__(self, group: Group = "world") -> None:
        check_group(group)
        other = sys.modules.get("lightning.pytorch.plugins.layer_sync")  # the same classes under another name
        if other is not None:
            other.TorchSyncBatchNorm.register(NormSync)
        self.group = group
        self._made: tuple[Any, ProcessGroup] = None, None
        self._ddp_arguments: dict[str, Any] = {}

    def apply(self, model: nn.Module) -> nn.Module:
        world = dist.group.WORLD if dist.is_initialized() else None
        if self._made[0] is not world or self._made[1] is None:
            self._made = world, process_group(self.group)
        sync_norm(model, self._made[1])
        self._leave_out_broadcast(model)
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        self._ddp_arguments.pop("forward_sync_buffers", None)
        self._ddp_arguments = {}
        return unsync_norm(model)

    def __getstate__(self) -> dict[str, Any]:  # process groups stay in their process
        return {"group": self.group, "_made": (None, None), "_ddp_arguments": {}}

    def _leave_out_broadcast(self, model: nn.Module) -> None:
        strategy = getattr(getattr(model, "_trainer", None), "strategy", None)
        arguments = getattr(strategy, "_ddp_kwargs", None)
        possible = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
        if (
            arguments is None
            or not possible
            or arguments.keys() & {"broadcast_buffers", "forward_sync_buffers"}
        ):
            return
        agreeing = {
            id(buffer)
            for module in model.modules()
            if isinstance(module, BatchStatistics | Synchronized) and module.process_group == "world"
            for buffer in module.buffers(recurse=False)
        }
        if all(id(buffer) in agreeing for buffer in model.buffers()):
            arguments["forward_sync_buffers"] = False
            self._ddp_arguments = arguments
