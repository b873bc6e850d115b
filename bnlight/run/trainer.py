"""Which arguments of Lightning's Trainer a job may be given: each works, or is refused in words before any job."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

# What a job has from elsewhere: here it would have no effect, and a sweep over it would compare equal jobs.
ELSEWHERE = {
    "callbacks": "callbacks are added by +callbacks.mine._target_=my_package.MyCallback",
    "logger": "a logger is chosen by logger=custom logger._target_=my_package.MyLogger",
    "enable_checkpointing": "checkpoints are callbacks: callbacks.best=null callbacks.last=null leaves them out",
    "enable_progress_bar": "what is shown is chosen by progress=bar, plain or off",
    "default_root_dir": "a job's directory is below paths.outputs",
    "model_registry": "a job's checkpoints are in its directory, and logger.log_model=best gives W&B the best",
}
NO_RESULT = {  # if they are true
    "fast_dev_run": "a job would keep no checkpoint and no metrics; for a short one: trainer.max_epochs=1 "
    "+trainer.limit_train_batches=2 +trainer.limit_val_batches=2",
    "barebones": "a job would have no callbacks and no metrics, and so no result",
}
# As in conf/trainer: these are known to be right without asking Lightning, whose import takes seconds.
USUAL: dict[str, tuple[Any, ...]] = {
    "strategy": ("auto", "ddp"),
    "precision": ("32-true",),
    "deterministic": (False, True),
    "gradient_clip_val": (None,),
    "val_check_interval": (1.0,),
    "check_val_every_n_epoch": (1,),
    "accumulate_grad_batches": (1,),
    "log_every_n_steps": (20,),
}
WHOLE = ("max_epochs", "max_steps", "min_epochs", "min_steps")


def wrong_trainer(trainer: Mapping[str, Any], metric: str | None) -> str | None:
    """What is wrong with the Trainer's resolved config, for a job that is judged by `metric`; None if all is well."""
    for key, way in ELSEWHERE.items():
        if key in trainer:
            return f"trainer.{key} has no effect here: {way}"
    for key, why in NO_RESULT.items():
        if trainer.get(key):
            return f"trainer.{key}={trainer[key]}: {why}"
    strategy = trainer.get("strategy")
    started = strategy.get("start_method") if isinstance(strategy, Mapping) else strategy
    if _starts(str(started)):
        return (
            f"trainer.strategy={started} starts the processes of a job from inside the Trainer; bnlight starts them "
            "itself, each with what it needs: trainer.strategy=ddp"
        )
    return _unvalidated(trainer, metric) or _refused_by_lightning(trainer)


def _starts(strategy: str) -> bool:
    """Whether a strategy, or the start method of one, makes processes from inside the Trainer."""
    return strategy.startswith(("ddp_spawn", "ddp_fork", "ddp_notebook", "spawn", "fork"))


def _unvalidated(trainer: Mapping[str, Any], metric: str | None) -> str | None:
    """A metric of the validation never comes if nothing is validated."""
    every, epochs = trainer.get("check_val_every_n_epoch"), trainer.get("max_epochs")
    never = None
    if trainer.get("limit_val_batches") in (0, 0.0) and trainer["limit_val_batches"] is not False:
        never = "trainer.limit_val_batches=0"
    elif isinstance(every, int) and isinstance(epochs, int) and every > epochs > 0:
        never = f"trainer.check_val_every_n_epoch={every} with trainer.max_epochs={epochs}"
    if never is None or metric is None or not metric.startswith("val"):
        return None
    return (
        f"{never} validates never, but the best checkpoint is chosen by {metric}: choose a metric of the training "
        "(monitor.metric=train/loss monitor.mode=min), or none (monitor.metric=null), which keeps the last"
    )


def _refused_by_lightning(trainer: Mapping[str, Any]) -> str | None:
    """What Lightning says of arguments that are not the usual ones; objects in them are left for the job to build."""
    asked = {
        key: value
        for key, value in trainer.items()
        if key not in ("_target_", "devices", "plugins")
        and value not in USUAL.get(key, ())
        and not (key in WHOLE and type(value) is int and value > 0)
        and not isinstance(value, Mapping)
    }
    accumulated = asked.get("accumulate_grad_batches", 1)
    if type(accumulated) is not int or accumulated < 1:
        return f"trainer.accumulate_grad_batches={accumulated}: expected 1, 2, ..."
    accelerator = asked.pop("accelerator", "auto")
    nodes = asked.pop("num_nodes", 1)
    if type(nodes) is not int or nodes < 1:
        return f"trainer.num_nodes={nodes}: expected 1, 2, ..."
    if accelerator not in ("auto", "cpu", "gpu", "cuda", "mps", "tpu"):
        return f"trainer.accelerator={accelerator}: expected auto, cpu or gpu"
    return _tried(str(trainer["_target_"]), json.dumps(asked, sort_keys=True)) if asked else None


@functools.cache
def _tried(target: str, asked: str) -> str | None:
    """A Trainer with these arguments, on one CPU: what speaks against it."""
    import logging

    from lightning_fabric.plugins.environments.lightning import LightningEnvironment
    from pytorch_lightning.strategies import StrategyRegistry

    from bnlight.lightning.build import arguments, instantiate
    from bnlight.run.isolation import isolated

    given = json.loads(asked)
    taken = arguments({"_target_": target})
    open_ = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
    if not open_ and (unknown := given.keys() - taken.keys()):
        known = ", ".join(name for name in taken if name not in ELSEWHERE)
        return f"{target} has no argument {', '.join(sorted(unknown))}. Its arguments: {known}"
    strategy = given.pop("strategy", "auto")
    names = ["auto", *(name for name in StrategyRegistry.available_strategies() if not _starts(name))]
    if strategy not in names:
        return f"trainer.strategy={strategy} is unknown; choose one of {', '.join(names)}"
    said = logging.getLogger("pytorch_lightning")
    level = said.level
    said.setLevel(logging.ERROR)
    try:
        with isolated():
            instantiate(
                {
                    "_target_": target,
                    **given,
                    "accelerator": "cpu",
                    "devices": 1,
                    "enable_progress_bar": False,
                },
                logger=False,
                enable_checkpointing=False,
                plugins=[LightningEnvironment()],  # SLURM's variables are not for this one
            )
    except Exception as error:  # whatever Lightning has against them
        return f"trainer: {' '.join(f'{key}={value}' for key, value in given.items())}: {error}"
    finally:
        said.setLevel(level)
    return None
