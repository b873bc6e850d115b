"""Jobs given to submitit: `hydra/launcher=slurm`, and `hydra/launcher=local`, which does the same on this machine.

The launching process submits, tells when jobs end, and compares them at last. It keeps nothing that the jobs'
directories do not have: if it dies, the jobs go on, and the same command later picks up what they left.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn
from omegaconf import DictConfig

from bnlight.run.job import CommandError
from bnlight.run.launch.launchers import BnlightLauncher, Job, environment, not_done
from bnlight.run.launch.parallel import passing_on, threads_for
from bnlight.run.launch.search import Turn
from bnlight.run.launch.submitted import FOLDER, forget, submit, submitted
from bnlight.run.ranks.processes import WrongDevices, ended_how, processes_of
from bnlight.run.status import read_status

COMMANDS = ("sbatch", "squeue", "scancel", "srun")
SECONDS_BETWEEN_LOOKS = 1.0
SECONDS_BETWEEN_QUEUE_LOOKS = 10.0  # squeue asks the cluster's controller
SECONDS_FOR_FILES = 20.0  # a result may show up on a shared file system after its job has left the queue
UNKNOWN = "no longer known to SLURM"
# If SLURM queues such a job again, its state says so soon.
ENDED = (
    UNKNOWN, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "PREEMPTED", "OUT_OF_MEMORY", "NODE_FAIL", "BOOT_FAIL",
    "DEADLINE", "REVOKED", "LAUNCH_FAILED",
)  # fmt: skip


class _Submitit(BnlightLauncher):
    needs = "submitit"
    cluster = ""
    own: tuple[str, ...] = ()  # options that submitit's executor does not know

    def launch(self, job_overrides: Any, initial_job_idx: int) -> list[JobReturn]:
        self._check_tasks(job_overrides)
        return super().launch(job_overrides, initial_job_idx)

    def executor(self) -> Any:
        """submitit's, with the preset's keys, which are those of Hydra's own submitit launcher."""
        import submitit

        known = ("timeout_min", "cpus_per_task", "gpus_per_node", "tasks_per_node", "mem_gb", "nodes", "name")
        options = {
            name: value for name, value in self.options.items() if value is not None and name not in self.own
        }
        folder, timeouts = options.pop("submitit_folder"), options.pop("max_num_timeout", None)
        first = {} if timeouts is None else {f"{self.cluster}_max_num_timeout": timeouts}
        executor = submitit.AutoExecutor(cluster=self.cluster, folder=folder, **first)
        executor.update_parameters(
            **{
                name if name in (*known, "stderr_to_stdout") else f"{self.cluster}_{name}": value
                for name, value in options.items()
            }
        )
        return executor

    def collect(self, job: Job, task: Any, ended: str) -> JobReturn:
        """What a job that has left the queue returned: from its result, or from how it ended."""
        try:
            kind, result = pickle.loads(task.paths.result_pickle.read_bytes())
        except (FileNotFoundError, EOFError):
            kind, result = "none", ""
        if kind == "success" and isinstance(result, JobReturn):
            self._tell(job, task)
            return result
        state = read_status(job.directory()).get("state")
        if state == "preempted":
            print(f"{job.label} {job.directory().name}: preempted; the same command continues it", flush=True)
            return not_done(job, "preempted")
        last = str(result).strip().splitlines()[-1:] if kind == "error" else []
        return self.failed(job, f"{'; '.join([ended, *last])}; see {task.paths.stderr}")

    def _tell(self, job: Job, task: Any) -> None:
        """What the job has last said of itself, which is how it ended."""
        name = job.directory().name
        lines = (
            task.paths.stdout.read_text(encoding="utf-8").splitlines() if task.paths.stdout.exists() else []
        )
        told = [line for line in lines if line.startswith(f"{job.label} {name}")]
        state = read_status(job.directory()).get("state", "not started")
        print(told[-1] if told else f"{job.label} {name}: {state}", flush=True)

    def _check_tasks(self, job_overrides: Any) -> None:
        """One task per job, which starts the ranks itself, or one per rank: else no job need wait in a queue."""
        tasks, nodes = int(self.options.get("tasks_per_node") or 1), int(self.options.get("nodes") or 1)
        for overrides in {
            tuple(o for o in line if "trainer" in o.split("=")[0]): line for line in job_overrides
        }.values():
            config: DictConfig = self.context.config_loader.load_sweep_config(self.config, list(overrides))
            wanted_nodes = int(config.trainer.get("num_nodes") or 1)
            try:
                devices = processes_of(config.trainer)
            except WrongDevices:
                continue  # the job says so
            if (tasks, nodes) == (1, 1) == (1, wanted_nodes) or (tasks, nodes) == (devices, wanted_nodes):
                continue
            raise CommandError(
                f"hydra.launcher.tasks_per_node={tasks} and nodes={nodes} start {tasks * nodes} tasks, but "
                f"trainer.devices={devices} x trainer.num_nodes={wanted_nodes} wants {devices * wanted_nodes} ranks: "
                + ("set tasks_per_node=1, and the task starts them, or " if wanted_nodes == 1 else "set ")
                + f"tasks_per_node={devices} nodes={wanted_nodes}"
            )


class Local(_Submitit):
    """Jobs as submitit runs them without a cluster: processes that outlive this one, `array_parallelism` at a time."""

    cluster = "local"
    own = ("array_parallelism",)

    def run(self, jobs: list[Job]) -> dict[int, JobReturn]:
        at_a_time = int(self.options["array_parallelism"])
        executor, waiting, returns = self.executor(), list(jobs), {}
        running: dict[Any, Job] = {}
        with threads_for(at_a_time), passing_on(lambda: [task._process.pid for task in running]) as stopped:
            while running or (waiting and not stopped):
                while waiting and len(running) < at_a_time and not stopped:
                    job = waiting.pop(0)
                    running[executor.submit(job)] = job
                for task in [task for task in running if task._process.poll() is not None]:
                    job = running.pop(task)
                    ended = f"the process {ended_how(task._process.returncode)}"
                    returns[job.number] = (
                        not_done(job, "stopped") if stopped else self.collect(job, task, ended)
                    )
                    if self.stops_after(returns[job.number]):
                        stopped.append(0)
                        returns |= {left.number: not_done(left, "not started") for left in waiting}
                time.sleep(SECONDS_BETWEEN_LOOKS / 10)
        if len(returns) < len(jobs):
            raise KeyboardInterrupt
        return returns


class Slurm(_Submitit):
    """Jobs of SLURM, several of them as one job array."""

    cluster = "slurm"

    def run(self, jobs: list[Job]) -> dict[int, JobReturn]:
        if absent := [name for name in COMMANDS if shutil.which(name) is None]:
            raise CommandError(
                f"hydra/launcher=slurm needs SLURM, but PATH has no {', '.join(absent)}: run this where jobs are "
                "submitted (a login node), or choose hydra/launcher=parallel or local, which need none"
            )
        tasks = self._given(jobs)
        left = {name: job for name, (_, job) in tasks.items()}
        returns: dict[int, JobReturn] = {}
        gone: dict[str, float] = {}  # since when a job is not in the queue any more
        looked, states = float("-inf"), dict.fromkeys(tasks, "PENDING")
        try:
            while left:
                if time.monotonic() - looked > SECONDS_BETWEEN_QUEUE_LOOKS:
                    now = queue(_arrays(tasks))
                    looked, states = time.monotonic(), states if now is None else now
                for name, job in list(left.items()):
                    state = states.get(name, UNKNOWN)
                    if state in ENDED:
                        gone.setdefault(name, time.monotonic())
                    else:
                        gone.pop(name, None)
                    late = time.monotonic() - gone.get(name, time.monotonic()) > SECONDS_FOR_FILES
                    task = tasks[name][0]
                    if task.paths.result_pickle.exists() or late:
                        returns[job.number] = self.collect(job, task, f"SLURM job {name} ended: {state}")
                        forget(job.directory())
                        del left[name]
                        if self.stops_after(returns[job.number]):
                            _cancel(left)
                            returns |= {job.number: not_done(job, "cancelled") for job in left.values()}
                            return returns
                time.sleep(SECONDS_BETWEEN_LOOKS)
        except KeyboardInterrupt:
            print(f"\nCancelling {len(left)} SLURM jobs; those that run leave a checkpoint first", flush=True)
            _cancel(left)
            raise
        return returns

    def _given(self, jobs: list[Job]) -> dict[str, tuple[Any, Job]]:
        """The jobs by their numbers in SLURM, to which those that it does not have yet are given now."""
        import submitit

        folder, here = Path(str(self.config.hydra.sweep.dir)), self.options["submitit_folder"]
        with Turn(folder / f"{FOLDER}.lock") as turn:  # else two commands would submit the same jobs
            turn.take()
            queued = self._queued(jobs)
            tasks: dict[str, tuple[Any, Job]]
            tasks = {name: (submitit.SlurmJob(here, name), job) for name, job in queued.items()}
            waiting = {job.number for job in queued.values()}
            if new := [job for job in jobs if job.number not in waiting]:
                given = self._submit(new)
                for task, job in zip(given, new, strict=True):
                    tasks[task.job_id] = task, job
                    submit(job.directory(), task.job_id)
        if queued:
            print(
                f"{len(queued)} jobs are in SLURM's queue already ({', '.join(_arrays(queued))})", flush=True
            )
        if new:
            numbers = ", ".join(_arrays(tasks.keys() - queued.keys()))
            place = next(iter(tasks.values()))[0].paths.folder.parent
            print(f"{len(new)} jobs given to SLURM ({numbers}); what they print is in {place}", flush=True)
        return tasks

    def _submit(self, jobs: list[Job]) -> list[Any]:
        """submitit's tasks of `jobs`, whose `checkpoint` it calls."""
        from submitit.core.utils import FailedJobError

        try:
            with _outside(), contextlib.redirect_stderr(io.StringIO()):  # it prints what it raises
                return list(self.executor().submit_array(jobs))
        except FailedJobError as error:
            given = {name: value for name, value in self.options.items() if value is not None}
            raise CommandError(
                f"SLURM takes none of the {len(jobs)} jobs: {error}; hydra.launcher is {given}"
            ) from None

    def _queued(self, jobs: list[Job]) -> dict[str, Job]:
        """The jobs that an earlier command has submitted and that wait or run; `--force` takes back those that wait."""
        known = {number: job for job in jobs if (number := submitted(job.directory()))}
        states = queue(_arrays(known)) if known else {}
        if states is None:
            raise CommandError(
                f"squeue does not answer, and {len(known)} jobs were given to SLURM before "
                f"({', '.join(_arrays(known))}): they may wait there still. Try again when `squeue` works"
            )
        queued = {name: job for name, job in known.items() if states.get(name, UNKNOWN) not in ENDED}
        if self.config.get("rerun") == "all":
            waiting = {name: job for name, job in queued.items() if states[name] == "PENDING"}
            _cancel(waiting)
            queued = {name: job for name, job in queued.items() if name not in waiting}
        return queued


def queue(arrays: list[str]) -> dict[str, str] | None:
    """The state of each job and array task of `arrays`, also of those that ended lately; None if SLURM is silent."""
    which = ["--array", "--states=all", f"--jobs={','.join(arrays)}"]
    command = ["squeue", "--noheader", *which, "--format=%i|%T"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        return None
    # An invalid number is the one of a job that has long ended.
    if done.returncode and "Invalid job id" not in done.stderr:
        return None
    return dict(line.split("|") for line in done.stdout.split())


def _cancel(jobs: dict[str, Job]) -> None:
    if jobs:
        subprocess.run(["scancel", *jobs], capture_output=True, timeout=60, check=False)
        for job in jobs.values():
            forget(job.directory())


def _arrays(tasks: Any) -> list[str]:
    return sorted({str(name).split("_")[0] for name in tasks})


@contextlib.contextmanager
def _outside() -> Iterator[None]:
    """Inside an allocation: submit as from a login shell, so that the new jobs inherit nothing of this one's shape."""
    inherited = {}
    if "SLURM_JOB_ID" in os.environ:
        prefixes = ("SLURM_", "SLURMD_", "SRUN_", "SUBMITIT_", "PMI_", "PMIX_")
        names = [name for name in os.environ if name.startswith(prefixes) and name != "SLURM_CONF"]
        inherited = dict.fromkeys(
            [*names, "CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL"]
        )
    with environment(**inherited):
        yield
