"""Small jobs one after the other in this process, in several ways: what `bnlight bench sweep` measures.

`python -m bnlight.bench.sweep_jobs WAY JOBS FOLDER` prints, as JSON, what each job but the first and the last has cost
beyond its training steps: a list of pairs, seconds and CPU seconds (those of W&B's service included).
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from bnlight.bench.clock import Clock, begin_job, cpu_of_children, overheads

STEPS = 8
JOB = [
    "model=mlp", "model.width=16", "model.depth=1", "trainer=cpu", "trainer.max_epochs=1", "threads=1",
    f"+trainer.limit_train_batches={STEPS}", "+trainer.limit_val_batches=1", "+trainer.limit_test_batches=1",
]  # fmt: skip
WAYS = {  # each with the one that it is compared to
    "Hydra alone": "",  # which composes the config and calls a function that does nothing
    "Lightning alone": "",  # in a loop, with one config: fit and test
    "Hydra + Lightning": "",
    "Hydra + Lightning + W&B": "",
    "bnlight": "Hydra + Lightning",
    "bnlight + W&B": "Hydra + Lightning + W&B",
}


def bnlight(jobs: int, folder: Path, logger: str) -> None:
    """bnlight's own sweep."""
    from bnlight.cli import main

    given = [*JOB, f"logger={logger}", "progress=off", f"paths.outputs={folder}", f"seed=range({jobs})"]
    if main(["train", "-m", *given, "+callbacks.clock._target_=bnlight.bench.clock.Clock"]):
        raise RuntimeError("a job has failed")


def hydra(jobs: int, folder: Path, job: Callable[[Any, Path], None]) -> None:
    """Stock Hydra on the same config, with `job` of the config and its directory."""
    import hydra as stock
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import DictConfig, OmegaConf

    from bnlight.run import identity
    from bnlight.run.application import TRUST, VERSION_BASE, _argv

    identity.register()

    def task(config: DictConfig) -> None:
        directory = Path(str(HydraConfig.get().runtime.output_dir))
        job(OmegaConf.to_container(config, resolve=True), directory)

    given = [*JOB, f"seed=range({jobs})", f"hydra.sweep.dir={folder}", "hydra.sweep.subdir=${hydra:job.num}"]
    with _argv(["bench", "-m", *given, "~hydra.callbacks.bnlight"]):
        stock.main(config_path="pkg://bnlight.conf", config_name="train", **VERSION_BASE, **TRUST)(task)()


def lightning(jobs: int, folder: Path) -> None:
    """Lightning alone, in a loop, from one config."""
    from bnlight.run.application import compose_job

    config = compose_job(JOB)
    for number in range(jobs):
        train(config | {"seed": number}, folder / str(number), "")


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
    best: list[pl.Callback] = (
        [ModelCheckpoint(directory, monitor="val/accuracy", mode="max")] if logger else []
    )
    options |= {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    trainer = pl.Trainer(
        **options, callbacks=[*best, Clock()], enable_checkpointing=bool(best), logger=loggers[logger]()
    )
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
    logger = "wandb" if way.endswith("W&B") else "csv"
    with contextlib.redirect_stdout(sys.stderr):
        if way == "Hydra alone":
            hydra(jobs, folder, lambda config, directory: begin_job())
        elif way == "Lightning alone":
            lightning(jobs, folder)
        elif way.startswith("Hydra"):
            hydra(jobs, folder, partial(train, logger=logger))
        else:
            bnlight(jobs, folder, logger)
    services = cpu_of_children()
    print(json.dumps([(seconds, cpu + services) for seconds, cpu in overheads()]))


if __name__ == "__main__":
    main()
