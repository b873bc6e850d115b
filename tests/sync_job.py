"""Trainings under Lightning on one or more ranks: python sync_job.py FOLDER STRATEGY:DEVICES:NODES:SYNC:CASE...

Rank 0 saves what came out of each in FOLDER/STRATEGY:...:CASE.pt, or the error in .txt and goes on with the next.
SYNC is none, stock, or the group of NormSync.
"""

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from bnlight import NormSync
from bnlight.models import MLP, ResNet
from bnlight.norm import BatchNorm

STEPS, SAMPLES = 20, 16  # of all ranks together
CASES = {
    "mlp_torch": lambda: MLP((6,), 3, nn.BatchNorm1d, width=8, depth=2),
    "mlp_ours": lambda: MLP((6,), 3, BatchNorm, width=8, depth=2),
    "resnet_torch": lambda: ResNet((2, 8, 8), 3, nn.BatchNorm2d, depth=8, width=4),
    "resnet_ours": lambda: ResNet((2, 8, 8), 3, BatchNorm, depth=8, width=4),
}


class Module(pl.LightningModule):
    def __init__(self, case: str, file: Path) -> None:
        super().__init__()
        self.case, self.file = case, file
        self.net = CASES[case]()
        self.means: list[Tensor] = []

    def train_dataloader(self) -> DataLoader:
        return batches(self.case, self.trainer.global_rank, self.trainer.world_size)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def on_train_batch_end(self, *_: Any) -> None:
        norm = next(m for m in self.modules() if getattr(m, "running_mean", None) is not None)
        self.means.append(self.all_gather(norm.running_mean.clone()).view(self.trainer.world_size, -1))
        self.ranks = norm.meeting.ranks() if hasattr(norm, "meeting") else 1

    def on_train_end(self) -> None:
        if self.trainer.is_global_zero:
            wrapped = self.trainer.strategy.model
            seen = {
                "state": self.state_dict(),
                "means": self.means,
                "ranks": self.ranks,
                "world": self.trainer.world_size,
                "steps": self.trainer.global_step,
                "broadcast": getattr(wrapped, "forward_sync_buffers", None),
            }
            torch.save(seen, self.file)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)


def batches(case: str, rank: int, world: int) -> DataLoader:
    """This rank's part of each batch of 16."""
    generator = torch.Generator().manual_seed(3)
    shape = (6,) if case.startswith("mlp") else (2, 8, 8)
    x = torch.randn(STEPS * SAMPLES, *shape, generator=generator, dtype=torch.float64) * 2 + 1
    y = torch.randint(3, (len(x),), generator=generator)
    return DataLoader(TensorDataset(x[rank::world], y[rank::world]), batch_size=SAMPLES // world)


def train(file: Path, strategy: str, devices: str, nodes: str, sync: str, case: str) -> None:
    own = [] if sync in ("none", "stock") else [NormSync(int(sync) if sync.isdigit() else sync)]
    pl.seed_everything(0, verbose=False)
    module = Module(case, file).double()
    before = {path: type(m) for path, m in module.named_modules()}
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=int(devices),
        num_nodes=int(nodes),
        strategy=strategy,
        plugins=own,
        sync_batchnorm=sync != "none",
        max_epochs=1,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module)
    assert before == {path: type(m) for path, m in module.named_modules()}
    assert trainer.world_size in (1, int(devices) * int(nodes))


def main(folder: str, *runs: str) -> None:
    warnings.simplefilter("ignore")
    for run in runs:
        try:
            train(Path(folder, f"{run}.pt"), *run.split(":"))
        except Exception as error:
            Path(folder, f"{run}.txt").write_text(str(error))
    if dist.is_initialized():
        dist.destroy_process_group()
    os._exit(0)  # what is left of torch's and gloo's threads now and then aborts a process that ends


if __name__ == "__main__":
    main(*sys.argv[1:])
