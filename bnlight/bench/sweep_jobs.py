"""Small jobs one after the other in this process, in several ways: what `bnlight bench sweep` measures.

`python -m bnlight.bench.sweep_jobs WAY JOBS FOLDER` prints the seconds from the end of each job to the end of the next.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

# One batch of training, validation and test each: what is left is what a job costs whatever it trains.
JOB = [
    "model=mlp", "model.width=16", "model.depth=1", "trainer=cpu", "trainer.max_epochs=1",
    "+trainer.limit_train_batches=1", "+trainer.limit_val_batches=1", "+trainer.limit_test_batches=1", "threads=1",
]  # fmt: skip
WAYS = ("lightning", "hydra", "hydra + wandb", "bnlight", "bnlight + wandb")


def bnlight(jobs: int, folder: Path, logger: str) -> list[float]:
    """bnlight's own sweep; the times are those in the jobs' files."""
    from bnlight.cli import main

    given = [*JOB, f"logger={logger}", "progress=off", f"paths.outputs={folder}", f"seed=range({jobs})"]
    if main(["train", "-m", *given]):
        raise RuntimeError("a job has failed")
    states = [json.loads(path.read_text()) for path in folder.glob("train/*-s*/status.json")]
    return sorted(state["ended"] for state in states if state["pid"] == os.getpid())


def hydra(jobs: int, folder: Path, logger: str) -> list[float]:
    """Stock Hydra, Lightning and W&B on the same config: CSVLogger or WandbLogger, ModelCheckpoint, fit and test."""
    import hydra as stock
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import DictConfig, OmegaConf

    from bnlight.run import identity
    from bnlight.run.application import TRUST, VERSION_BASE, _argv

    identity.register()
    ended: list[float] = []

    def task(config: DictConfig) -> None:
        directory = Path(str(HydraConfig.get().runtime.output_dir))
        container: Any = OmegaConf.to_container(config, resolve=True)
        train(container, directory, logger)
        ended.append(time.time())

    given = [*JOB, f"seed=range({jobs})", f"hydra.sweep.dir={folder}", "hydra.sweep.subdir=${hydra:job.num}"]
    with _argv(["bench", "-m", *given, "~hydra.callbacks.bnlight"]):
        stock.main(config_path="pkg://bnlight.conf", config_name="train", **VERSION_BASE, **TRUST)(task)()
    return ended


def lightning(jobs: int, folder: Path) -> list[float]:
    """Lightning alone, in a loop, from one config."""
    from bnlight.run.application import compose_job

    config = compose_job(JOB)
    ended = []
    for number in range(jobs):
        train(config | {"seed": number}, folder / str(number), "")
        ended.append(time.time())
    return ended


def train(config: Any, directory: Path, logger: str) -> None:
    """One job as one would write it with Lightning: logger, best checkpoint, fit, test."""
    import pytorch_lightning as pl
    import torch
    from pytorch_lightning.callbacks import ModelCheckpoint
    from pytorch_lightning.loggers import CSVLogger, WandbLogger

    from bnlight.run.module import build_data, build_module

    torch.set_num_threads(1)
    pl.seed_everything(config["seed"], verbose=False)
    data = build_data(config)
    module = build_module(config, data)
    loggers: dict[str, Any] = {
        "": lambda: False,
        "csv": lambda: CSVLogger(directory),
        "wandb": lambda: WandbLogger(save_dir=directory, offline=True, project="bench", config=config),
    }
    options = {key: value for key, value in config["trainer"].items() if key != "_target_"}
    best: list[Any] = [ModelCheckpoint(directory, monitor="val/accuracy", mode="max")] if logger else []
    options |= {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    trainer = pl.Trainer(**options, callbacks=best, enable_checkpointing=bool(best), logger=loggers[logger]())
    trainer.fit(module, datamodule=data)
    trainer.test(module, datamodule=data, ckpt_path="best" if best else None, verbose=False)
    if logger == "wandb":
        import wandb

        wandb.finish()


def main() -> None:
    """The command line of one way."""
    way, jobs, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    os.environ["WANDB_MODE"] = "offline"
    os.environ["WANDB_SILENT"] = "true"
    name, _, tracker = way.partition(" + ")
    logger = tracker or "csv"
    with contextlib.redirect_stdout(sys.stderr):
        if name == "lightning":
            ended = lightning(jobs, folder)
        else:
            ended = (bnlight if name == "bnlight" else hydra)(jobs, folder, logger)
    print(json.dumps([after - before for before, after in itertools.pairwise(ended)]))


if __name__ == "__main__":
    main()
