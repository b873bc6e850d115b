"""Ranks that somebody else has started (torchrun, srun, submitit): who they are, and whether they fit the trainer.

Every rank finds its own place in the environment.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


class WrongRanks(ValueError):
    """The ranks that were started are not those that the job wants."""


@dataclass(frozen=True)
class Started:
    """This process's place among the ranks, and what started them."""

    by: str  # torchrun, srun, submitit or another
    launch: str  # the same on all ranks of one launch and on no others
    variable: str  # the environment variable that has the number of ranks
    world_size: int
    rank: int
    local_rank: int
    per_node: str  # ranks on each node as SLURM writes it, such as 2(x2); empty where nobody says

    def nodes(self) -> list[int]:
        """The number of ranks on each node."""
        counts = []
        for part in filter(None, self.per_node.split(",")):
            number, times = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part).groups()  # type: ignore[union-attr]
            counts += [int(number)] * int(times or 1)
        return counts


def started() -> Started | None:
    """This process's place, or None if it was started alone and starts the ranks of its jobs itself."""
    env = os.environ
    if "TORCHELASTIC_RUN_ID" in env:
        port, restart = env.get("MASTER_PORT", ""), env.get("TORCHELASTIC_RESTART_COUNT", "0")
        return _by_torch_names("torchrun", f"{env['TORCHELASTIC_RUN_ID']}-{port}-{restart}")
    if env.get("SUBMITIT_EXECUTOR") == "local" and int(env.get("SUBMITIT_LOCAL_NTASKS", "1")) > 1:
        tasks, rank = env["SUBMITIT_LOCAL_NTASKS"], int(env["SUBMITIT_LOCAL_GLOBALID"])
        launch = f"submitit-{env['SUBMITIT_LOCAL_JOB_ID']}"
        return Started("submitit", launch, "SUBMITIT_LOCAL_NTASKS", int(tasks), rank, rank, tasks)
    if _in_step_of_several_tasks():
        restart = env.get("SLURM_RESTART_COUNT", "0")
        return Started(
            by="srun",
            launch=f"slurm-{env['SLURM_JOB_ID']}-{env.get('SLURM_STEP_ID', '0')}-{restart}",
            variable="SLURM_STEP_NUM_TASKS",
            world_size=int(env["SLURM_STEP_NUM_TASKS"]),
            rank=int(env["SLURM_PROCID"]),
            local_rank=int(env["SLURM_LOCALID"]),
            per_node=env.get("SLURM_STEP_TASKS_PER_NODE", ""),
        )
    if "LOCAL_RANK" in env and int(env.get("WORLD_SIZE", "1")) > 1:
        return _by_torch_names(
            "the environment", f"{env.get('MASTER_ADDR', '')}-{env.get('MASTER_PORT', '')}"
        )
    return None


def check_ranks(trainer: Mapping[str, Any], devices: int) -> None:
    """Refuse, on every rank alike and before anybody waits, a number of ranks that the trainer does not want.

    Raises WrongRanks with one sentence that names the variable, its value, and the value wanted.
    """
    nodes = int(trainer.get("num_nodes") or 1)
    wanted, place = devices * nodes, started()
    keys = f"trainer.devices={devices} x trainer.num_nodes={nodes}"
    if place is None:
        if nodes > 1:
            tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "unset")
            seen = f"SLURM_STEP_NUM_TASKS={tasks}" if "SLURM_JOB_ID" in os.environ else "WORLD_SIZE=unset"
            raise WrongRanks(
                f"the ranks of this job were not started on {nodes} nodes: wanted {wanted} ({keys}), seen {seen}; "
                f"start the same command with `srun --nodes={nodes} --ntasks-per-node={devices}`, or with torchrun "
                "on each node"
            )
        return
    how = {
        "srun": f"srun --nodes={nodes} --ntasks-per-node={devices}",
        "torchrun": f"torchrun --nnodes={nodes} --nproc-per-node={devices}",
        "submitit": f"hydra.launcher.tasks_per_node={devices}",
    }.get(place.by, f"{place.variable}={wanted}")
    if place.world_size != wanted:
        raise WrongRanks(
            f"{place.variable}={place.world_size}, but {keys} wants {wanted}: start {wanted} with `{how}`, or set "
            f"the trainer to the {place.world_size} that were started"
        )
    if place.nodes() and place.nodes() != [devices] * nodes:
        raise WrongRanks(
            f"SLURM_STEP_TASKS_PER_NODE={place.per_node}, but {keys} wants {devices} on each of {nodes}: "
            f"start them with `{how}`"
        )


def cluster_environment(plugins: list[Any]) -> list[Any]:
    """What Lightning must be given so that it does not take SLURM's variables for its own orders.

    It would refuse `--ntasks`, wait for ranks nobody starts, and requeue jobs by itself.
    """
    from lightning_fabric.plugins.environments.lightning import LightningEnvironment

    given = any("Environment" in str(plugin) for plugin in plugins)
    ours = "SLURM_JOB_ID" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ
    return [LightningEnvironment()] if ours and not given else []


def _in_step_of_several_tasks() -> bool:
    """Whether srun started this process beside others.

    SLURM_NTASKS does not tell: a batch script has it too, and runs once. The job's name does not either: `srun`
    without sbatch calls a job after its command. In a step with a terminal (`srun --pty`) only one task is used.
    """
    env = os.environ
    return (
        int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1
        and "SLURM_PROCID" in env
        and "SLURM_PTY_PORT" not in env
    )


def _by_torch_names(by: str, launch: str) -> Started:
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    local = int(os.environ.get("LOCAL_RANK", str(rank)))
    return Started(by, re.sub(r"[^\w.-]", "_", launch), "WORLD_SIZE", world, rank, local, "")
