"""Several jobs at a time on this machine: `hydra/launcher=parallel` and `hydra/launcher=ray_local`."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus

from bnlight.lightning.stop import ASKING
from bnlight.run import sweep
from bnlight.run.check import CommandError
from bnlight.run.launch.launchers import BnlightLauncher, Job, environment, not_done
from bnlight.run.ranks.devices import visible_devices
from bnlight.run.ranks.processes import WrongDevices, ended_how, processes_of
from bnlight.run.status import read_json
from bnlight.run.survive.command import journal, unfinished
from bnlight.run.survive.output import outlive_the_reader

SECONDS_BETWEEN_LOOKS = 1.0
ATTEMPTS, SECONDS_BETWEEN_ATTEMPTS = 10, 0.2
STOPPED = 130  # exit code of a job's process that a signal has stopped in order


class Parallel(BnlightLauncher):
    """`n_jobs` jobs at a time, counted as joblib counts (-1: one per core); each in a process of its own.

    The processes are forked from one that has imported torch and done nothing else, so imports are paid once.
    joblib's own worker pool is not used: when one of its workers dies it ends all the others.
    """

    needs = "cloudpickle"  # joblib itself comes with scikit-learn

    def run(self, jobs: list[Job]) -> dict[int, JobReturn]:
        import joblib

        number = self._at_a_time(joblib.effective_n_jobs)
        forks = multiprocessing.get_context("forkserver")
        forks.set_forkserver_preload(["bnlight.run.train", "bnlight.run.launch.launchers"])
        if sweep.current is not None:
            sweep.current.at_a_time = number
        live: dict[int, int] = {}  # process id by job number
        with threads_for(number), passing_on(lambda: list(live.values())) as stopped:
            runs = joblib.Parallel(n_jobs=number, backend="threading", batch_size=1, **self._rest())(
                joblib.delayed(self._one)(job, forks, live, stopped) for job in jobs
            )
        if stopped and stopped[0] in ASKING:
            raise KeyboardInterrupt
        return dict(zip([job.number for job in jobs], runs, strict=True))

    def _at_a_time(self, count: Callable[[int], int]) -> int:
        """`n_jobs`; null: as many as find a GPU, and without GPUs one per core."""
        number = self.options["n_jobs"]
        if number is not None:
            if not isinstance(number, int) or number == 0:
                raise CommandError(
                    f"hydra.launcher.n_jobs={number}: expected 1, 2, ..., -1 for one per core, or null"
                )
            return count(number)
        trainer, share = self.config.trainer, self.config.get("share_devices", 1) or 1
        gpus = len(visible_devices(str(trainer.get("accelerator", "auto"))))
        with contextlib.suppress(WrongDevices):  # each job will say so
            return max(1, gpus * share // processes_of(trainer)) if gpus else count(-1)
        return 1

    def _rest(self) -> dict[str, Any]:
        return {name: option for name, option in self.options.items() if name != "n_jobs"}

    def _one(self, job: Job, forks: Any, live: dict[int, int], stopped: list[int]) -> JobReturn:
        """Run one job to its end in a process of its own."""
        import cloudpickle

        if stopped:
            return not_done(job, "not started")
        here, there = forks.Pipe(duplex=False)
        what = cloudpickle.dumps((Path.cwd(), dict(os.environ), job))
        process = forks.Process(target=_in_child, args=(what, there), name="bnlight job")
        _start(process)
        there.close()
        live[job.number] = process.pid
        if stopped:  # while it was started
            os.kill(process.pid, stopped[0])
        wait([here, process.sentinel])
        while not here.poll() and _lives(process.pid):  # it was the server that died
            wait([here], SECONDS_BETWEEN_LOOKS)
        returned = None
        with contextlib.suppress(EOFError):
            returned = cloudpickle.loads(here.recv_bytes()) if here.poll() else None
        process.join()
        del live[job.number]
        if returned is None and (stopped or process.exitcode == STOPPED):
            returned = not_done(job, "stopped")
        elif returned is None:
            returned = self.failed(job, f"the process {ended_how(process.exitcode)}")
        if job.sweep is not None and returned.status == JobStatus.COMPLETED:
            took = read_json(job.directory() / "status.json").get("seconds")
            job.sweep.seconds += [took] if took else []  # for the labels of the jobs that start from now on
        if self.stops_after(returned):
            stopped.append(0)
        return returned


class RayLocal(BnlightLauncher):
    """Jobs as tasks of ray on this machine (or of the cluster `ray.address` names); ray decides how many at a time."""

    needs = "ray"

    def run(self, jobs: list[Job]) -> dict[int, JobReturn]:
        import ray

        returns: dict[int, JobReturn] = {}
        # The leases say which GPU a job has, so ray leaves the environment alone; each line is said as it is.
        with environment(RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0", RAY_DEDUP_LOGS="0"):
            ray.init(**self.options["init"])
        try:
            call = ray.remote(_in_ray).options(max_retries=0, **self.options["remote"])
            tasks = {call.remote(job): job for job in jobs}
            with passing_on(_begun_here) as stopped:
                while tasks:
                    for task in ray.wait(list(tasks), num_returns=1, timeout=SECONDS_BETWEEN_LOOKS)[0]:
                        job = tasks.pop(task)
                        returns[job.number] = self._returned(job, task, stopped)
                        if self.stops_after(returns[job.number]):
                            stopped.append(0)
                    for task in _not_begun(tasks) if stopped else ():
                        ray.cancel(task)
                        job = tasks.pop(task)
                        returns[job.number] = not_done(job, "not started")
        finally:
            ray.shutdown()
        if stopped and stopped[0] in ASKING:
            raise KeyboardInterrupt
        return returns

    def _returned(self, job: Job, task: Any, stopped: list[int]) -> JobReturn:
        import ray

        try:
            returned: JobReturn = ray.get(task)
        except ray.exceptions.RayError as error:
            if stopped:
                return not_done(job, "stopped")
            what = str(error).strip().splitlines()[0]
            return self.failed(job, f"the process ended: {what}")
        return returned


def _start(process: Any) -> None:
    """Start it; where the server that it is forked from was killed, from the next one."""
    for _ in range(ATTEMPTS - 1):
        with contextlib.suppress(OSError, EOFError):
            process.start()
            return
        time.sleep(SECONDS_BETWEEN_ATTEMPTS)  # for an instant, one that was killed still seems to live
    process.start()


def _lives(process: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, 0)
        return True
    return False


def _begun_here() -> list[int]:
    """The processes on this machine that have begun a job of this command and not ended it."""
    return [int(entry["pid"]) for entry in unfinished()]


def _not_begun(tasks: dict[Any, Job]) -> list[Any]:
    begun = {entry["job"] for entry in journal() if entry["event"] == "begun"}
    return [task for task, job in tasks.items() if str(job.directory()) not in begun]


def _in_ray(job: Job) -> JobReturn:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])  # ray's processes have it blocked
    return job()


def _in_child(pickled: bytes, answer: Connection) -> None:
    """The process of one job: answers with its return, or leaves with STOPPED."""
    import cloudpickle

    threading.Thread(target=_die_with_launcher, daemon=True).start()
    outlive_the_reader()
    try:
        folder, variables, job = cloudpickle.loads(pickled)
        os.chdir(folder)
        os.environ.clear()  # the process this one was forked from has those of its own start
        os.environ.update(variables)
        returned = job()
    except KeyboardInterrupt:
        sys.stdout.flush()
        sys.exit(STOPPED)
    answer.send_bytes(cloudpickle.dumps(returned))
    answer.close()


def _die_with_launcher() -> None:
    """The kernel's way (`die_with_parent`) will not do: the parent is the process that this one was forked from."""
    launcher = multiprocessing.parent_process()
    assert launcher is not None
    wait([launcher.sentinel])
    os.kill(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def threads_for(jobs: int) -> Iterator[None]:
    """Each of `jobs` processes that start in the block uses its share of the cores, unless the user has said."""
    share = str(max(1, (os.cpu_count() or 1) // jobs))
    with environment(OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", share)):
        yield


@contextlib.contextmanager
def passing_on(processes: Callable[[], list[int]]) -> Iterator[list[int]]:
    """Pass stopping signals on to the jobs' processes, and go on waiting for them; a second Ctrl-C does not wait.

    Yields a list that holds the signals that came.
    """
    came: list[int] = []

    def pass_on(signum: int, _: Any) -> None:
        came.append(signum)
        for process in processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signum)
        if came.count(signal.SIGINT) > 1:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    before = {signum: signal.signal(signum, pass_on) for signum in ASKING}
    try:
        yield came
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
