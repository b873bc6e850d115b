"""A real SLURM on this machine for the tests: two virtual nodes, no root daemons left behind, nothing in /etc.

`from slurm import slurm` in a test file makes the fixture known there. It needs root and Debian's packages slurm-wlm
and munge, and skips with the reason where they are absent. Test processes that run at the same time share one.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import pytest

BOX = Path("/tmp/bnlight-slurm")
CPUS = 8  # of each node; they may be more than the machine has
# A job that goes back into the queue waits there until its credential has run out, in SLURM's own settings for 120 s.
SECONDS_TO_REQUEUE = 10
NEEDED = ("slurmctld", "slurmd", "sbatch", "srun", "munged")

CONFIG = """
ClusterName=bnlight
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=cred_expire={requeue}
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=2,bf_interval=1
ReturnToService=2
KillWait=8
SlurmctldPidFile={box}/slurmctld.pid
SlurmdPidFile={box}/slurmd-%n.pid
SlurmdSpoolDir={box}/spool-%n
StateSaveLocation={box}/state
SlurmctldLogFile={box}/slurmctld.log
SlurmdLogFile={box}/slurmd-%n.log
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{second}] CPUs={cpus} RealMemory=4000 State=UNKNOWN
PartitionName=debug Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture(scope="session")
def slurm() -> Iterator[dict[str, str]]:
    """The environment that reaches the cluster."""
    lacking = [name for name in NEEDED if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")]
    if lacking:
        pytest.skip(f"no SLURM here ({', '.join(lacking)}): apt-get install slurm-wlm munge")
    if os.geteuid() != 0:
        pytest.skip("starting a SLURM needs root")
    with Path(f"{BOX}.lock").open("w") as lock:
        _join(lock)
        try:
            yield environment()
        finally:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return  # another test process still uses it
            _down()


@pytest.fixture
def cluster(slurm: dict[str, str], project: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The cluster for one test; what a test that failed has left in its queue goes."""
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    yield
    if left := queue(project):
        subprocess.run(["scancel", "--full", *{number.split("_")[0] for number in left}], check=False)


def queue(project: Path) -> dict[str, str]:
    """The state of each job, and of each task of an array, that was submitted in the project."""
    command = ["squeue", "--noheader", "--array", "--format=%i %T %Z"]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    lines = [line.split(maxsplit=2) for line in said.splitlines()]
    return {number: state for number, state, folder in lines if folder == str(project)}


def _join(lock: TextIO) -> None:
    """Share the cluster that is up, or bring one up; the lock is shared by those who use it."""
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # another test process uses one, or is bringing it up or down
            fcntl.flock(lock, fcntl.LOCK_SH)
            if _is_up():
                return
            fcntl.flock(lock, fcntl.LOCK_UN)
            time.sleep(0.2)
        else:
            if not _is_up():
                _down()
                _up()
            fcntl.flock(lock, fcntl.LOCK_SH)
            return


def environment() -> dict[str, str]:
    return {"SLURM_CONF": str(BOX / "slurm.conf"), "PATH": f"{os.environ['PATH']}:/usr/sbin"}


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, env=os.environ | environment(), capture_output=True, text=True, check=False, timeout=60
    )


def _is_up() -> bool:
    if not (BOX / "slurm.conf").exists():
        return False
    states = _run("sinfo", "-h", "-N", "-o", "%t").stdout.split()
    return len(states) == 2 and all(state in ("idle", "mix", "alloc", "comp") for state in states)


def _up() -> None:
    _munge()
    (BOX / "state").mkdir(parents=True)
    ports = _free_ports()
    config = CONFIG.format(
        host=socket.gethostname().split(".")[0],
        box=BOX, cpus=CPUS, requeue=SECONDS_TO_REQUEUE, ctld=ports[0], first=ports[1], second=ports[1] + 1,
    )  # fmt: skip
    (BOX / "slurm.conf").write_text(config)
    for command in (["slurmctld"], ["slurmd", "-N", "n1"], ["slurmd", "-N", "n2"]):
        for name in command[2:]:
            (BOX / f"spool-{name}").mkdir()
        done = _run(*command)
        assert done.returncode == 0, f"{command}: {done.stderr}"
    deadline = time.monotonic() + 30
    while not _is_up():
        if time.monotonic() > deadline:
            logs = "\n".join(path.read_text()[-1500:] for path in BOX.glob("*.log"))
            raise RuntimeError(f"SLURM did not come up:\n{logs}")
        time.sleep(0.2)


def _munge() -> None:
    """Debian's munge, started by hand where no init system does."""
    if subprocess.run(["munge", "-n"], capture_output=True, check=False).returncode == 0:
        return
    key = Path("/etc/munge/munge.key")
    if not key.exists() or not key.stat().st_size:
        key.write_bytes(os.urandom(1024))
        shutil.chown(key, "munge", "munge")
        key.chmod(0o400)
    for folder in ("/run/munge", "/var/log/munge"):
        Path(folder).mkdir(exist_ok=True)
        shutil.chown(folder, "munge", "munge")
        Path(folder).chmod(0o755)
    munged = ["setpriv", "--reuid=munge", "--regid=munge", "--init-groups", "/usr/sbin/munged"]
    subprocess.run(munged, check=True)


def _free_ports() -> tuple[int, int]:
    """One port, and the first of two that follow each other."""
    for first in range(17000, 17900, 3):
        probes = [socket.socket() for _ in range(3)]
        try:
            for offset, probe in enumerate(probes):
                probe.bind(("127.0.0.1", first + offset))
        except OSError:
            continue
        finally:
            for probe in probes:
                probe.close()
        return first, first + 1
    raise RuntimeError("no three free ports in 17000..17900")


def _down() -> None:
    if (BOX / "slurm.conf").exists():
        _run("scancel", "--full", "--user=root")
        deadline = time.monotonic() + 30  # a step whose slurmd has gone would never end
        while _run("squeue", "-h").stdout.strip() and time.monotonic() < deadline:
            time.sleep(0.2)
    for file in [*BOX.glob("slurmd-*.pid"), *BOX.glob("slurmctld.pid")]:
        _stop(int(file.read_text()))
    shutil.rmtree(BOX, ignore_errors=True)


def _stop(pid: int) -> None:
    for stop in (signal.SIGTERM, signal.SIGKILL):
        for _ in range(50):
            try:
                os.kill(pid, stop)
            except ProcessLookupError:
                return
            time.sleep(0.1)
