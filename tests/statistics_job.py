"""Trainings on two ranks with callbacks for statistics: python statistics_job.py FOLDER CASE...

Rank r saves what it saw in FOLDER/CASE/r.pt, beside the checkpoints. The ranks' samples are of different kinds.
"""

import re
import sys
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from bnlight import NormSync
from bnlight.callbacks import FreezeNorm, PoolStatistics, PreciseStatistics, ReduceStatistics
from bnlight.norm import BatchNorm, BatchRenorm

SAMPLES, BATCH = 48, 4


class Module(pl.LightningModule):
    def __init__(self, norm: type[nn.Module] = nn.BatchNorm1d) -> None:
        super().__init__()
        torch.manual_seed(0)
        first = norm(3, momentum=None)
        self.net = nn.Sequential(first, nn.Linear(3, 4), norm(4), nn.Linear(4, 1)).double()
        self.seen: dict[str, Any] = {}

    def train_dataloader(self) -> DataLoader:
        return loader(samples(1))  # Lightning would shuffle it

    def val_dataloader(self) -> DataLoader:
        return loader(samples(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return (self(batch[0]) - batch[1]).square().mean()

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        loss = (self(batch[0]) - batch[1]).square().mean()
        self.log("val/loss", loss, sync_dist=True, on_epoch=True)

    def keep(self, when: str) -> None:
        self.seen.setdefault(when, []).append({name: t.clone() for name, t in self.state_dict().items()})

    def on_train_batch_end(self, *_: Any) -> None:
        self.keep("step")

    def on_validation_start(self) -> None:
        self.keep("validation")

    def on_validation_end(self) -> None:
        if not self.trainer.sanity_checking:
            self.seen.setdefault("loss", []).append(float(self.trainer.callback_metrics["val/loss"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)


def samples(seed: int, number: int = SAMPLES) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(number, 3, generator=generator, dtype=torch.float64)
    x[1::2] = x[1::2] * 2 + 5  # rank 1's
    return TensorDataset(x, x.sum(1, keepdim=True).sin())


def loader(data: TensorDataset) -> DataLoader:
    return DataLoader(data, batch_size=BATCH, sampler=DistributedSampler(data, shuffle=False))


def callbacks(case: str, folder: Path) -> list[pl.Callback]:
    case = re.sub("_(ours|renorm|sync)$", "", case)
    every: dict[str, Any] = {"filename": "{epoch}", "save_top_k": -1}
    if case in ("reduce_within", "reduce_within_weights", "stock_within"):
        every = {"filename": "{step}", "save_top_k": -1, "every_n_train_steps": 2}
        every["save_weights_only"] = case.endswith("weights")
    chosen: list[pl.Callback] = {
        "reduce": [ReduceStatistics()],
        "reduce_ema": [EMAWeightAveraging(decay=0.5), ReduceStatistics()],
        "precise": [PreciseStatistics(4)],
        "precise_ema": [EMAWeightAveraging(decay=0.5), PreciseStatistics(4)],
        "freeze": [FreezeNorm(3)],
        "freeze_reduce": [ReduceStatistics(), FreezeNorm(0.5)],
        "pool": [PoolStatistics(), ReduceStatistics()],
    }.get(case, [ReduceStatistics()] if "reduce" in case else [])
    return [*chosen, ModelCheckpoint(folder, **every)]


def main(folder: str, *cases: str) -> None:
    warnings.simplefilter("ignore")
    for case in cases:
        place = Path(folder) / case
        place.mkdir()
        kind = case.rpartition("_")[2]
        norm = {"ours": BatchNorm, "renorm": BatchRenorm}.get(kind, nn.BatchNorm1d)
        module = Module(norm)
        module.place = place
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=2,
            strategy="ddp_fork",
            use_distributed_sampler=False,
            plugins=[NormSync()] if kind == "sync" else [],
            callbacks=[*callbacks(case, place), Keep()],
            max_epochs=2,
            accumulate_grad_batches=4 if case == "pool" else 1,
            num_sanity_val_steps=1,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module)


class Keep(pl.Callback):
    """Saves what the rank has seen, last."""

    def on_fit_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        pl_module.keep("end")
        pl_module.seen["attributes"] = [*vars(pl_module)]
        torch.save(pl_module.seen, pl_module.place / f"{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
