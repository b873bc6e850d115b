"""`bnlight doctor`: the findings for the job that a command line describes, without running it."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint, EarlyStopping

from bnlight.doctor import Diagnosis, Finding
from bnlight.lightning.build import instantiate
from bnlight.lightning.doctor import Doctor
from bnlight.lightning.initial import initialize
from bnlight.run import sweep
from bnlight.run.isolation import import_targets, isolated, log_to
from bnlight.run.job import CommandError
from bnlight.run.module import build_data, build_module
from bnlight.run.ranks.processes import processes_of
from bnlight.run.weights import weights_file

_TOLD: dict[Path, set[str]] = {}


def doctor_of_job(config: Mapping[str, Any], directory: Path, label: str) -> Doctor:
    """The callback of a job; what this process has said in the same sweep it does not say again."""
    title = f"{label} {config['job']['name'].rsplit('-', 1)[0]}".strip()  # without the hash
    told = _TOLD.setdefault(directory.parent, set()) if sweep.current is not None else None

    def tell(line: str) -> None:
        if config["progress"] != "off":
            print(f"{title}  {line}", flush=True)

    return Doctor(tell=tell, told=told)


def main(arguments: list[str]) -> int:
    """Print the findings; returns 0 if there are none or only notes, 1 for warnings, 2 for a wrong command."""
    if arguments[:1] in (["-h"], ["--help"]):
        print(
            "usage: bnlight doctor [overrides]\n\nWhat is wrong, or worth knowing, about the norms of the job that "
            "`bnlight train [overrides]` would run.\nExit code: 0 nothing or only notes, 1 warnings, 2 the command is "
            "wrong."
        )
        return 0
    from bnlight.run.application import compose_job  # here, as every rank of a job imports this file

    try:
        found = examine_job(compose_job(arguments))
    except CommandError as error:
        print(error, file=sys.stderr)
        return 2
    print(found)
    return 1 if found.warnings else 0


def examine_job(config: dict[str, Any]) -> Diagnosis:
    """Train the job's first batches on one device, with nothing written and nobody told, and look at them.

    CommandError if its data, module or callbacks cannot be built.
    """
    trainer_config = config["trainer"]
    ranks = processes_of(trainer_config) * int(trainer_config.get("num_nodes") or 1)
    synchronized = bool(config["sync"].get("_target_")) or bool(trainer_config.get("sync_batchnorm"))
    doctor = Doctor(tell=lambda line: None, devices=ranks, synchronized=synchronized and ranks > 1)
    with tempfile.TemporaryDirectory() as folder, log_to(Path(folder) / "log"), isolated():
        import_targets(config)
        pl.seed_everything(config["seed"], workers=True, verbose=False)
        module, data, callbacks = _built(config)
        kept = [each for each in callbacks if not isinstance(each, Checkpoint | EarlyStopping)]
        trainer: pl.Trainer = instantiate(
            {**trainer_config, "devices": 1, "num_nodes": 1, "strategy": "auto"},
            callbacks=[*kept, doctor, _Enough(doctor)],
            logger=False,
            enable_checkpointing=False,
            default_root_dir=folder,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            limit_val_batches=0,
        )
        try:
            trainer.fit(module, datamodule=data)
        except _Seen:
            pass
        except Exception as error:
            text = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            failed = Finding(
                "first_step", "warning", (), f"the first steps fail ({text})", "bnlight train shows where"
            )
            return Diagnosis([*doctor.diagnosis, failed])
    return doctor.diagnosis


def _built(config: dict[str, Any]) -> tuple[pl.LightningModule, pl.LightningDataModule, list[pl.Callback]]:
    try:
        data = build_data(config)
        module = build_module(config, data)
        if config.get("init_from"):
            initialize(module, weights_file(config["init_from"]))
        return module, data, [instantiate(callback) for callback in config["callbacks"].values() if callback]
    except Exception as error:  # of somebody's class, or of its arguments
        reason = f"{type(error).__name__}: {error}"
        raise CommandError(f"the job cannot be built: {reason}\nbnlight train shows where") from error


class _Seen(Exception):
    """Enough was seen."""


class _Enough(pl.Callback):
    """Ends the training once the doctor has seen enough."""

    def __init__(self, doctor: Doctor) -> None:
        self.doctor = doctor

    def on_train_batch_end(self, *args: Any) -> None:
        if self.doctor.finished:
            raise _Seen

    def on_train_epoch_end(self, *args: Any) -> None:
        raise _Seen
