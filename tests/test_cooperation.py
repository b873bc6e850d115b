"""Several processes around the same jobs: nobody shares a directory, nothing runs twice, the dead are replaced."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import SMALL, until

from bnlight.cli import main
from bnlight.run import sweep
from bnlight.run.ranks.agree import differences
from bnlight.run.status import read_status, update_status
from bnlight.run.survive import lock
from bnlight.run.survive.lock import JobBusy, own, owner

Start = Callable[..., subprocess.Popen[str]]
JOB = [*SMALL, "progress=off"]

# A data module that writes down who trains which job, and takes its time.
MINE = """
import os, pathlib, time
from bnlight.data import Digits

class Data(Digits):
    def setup(self, stage):
        if stage == "fit":
            with open("trained", "a") as file:
                file.write(f"{pathlib.Path(self.trainer.default_root_dir).name} {os.getpid()}\\n")
            time.sleep(float(os.environ.get("SLOW", 0)))
        super().setup(stage)
"""
CUSTOM = [*JOB, "data=custom", "data._target_=mine.Data"]

# Many processes that have imported everything and start their jobs at the same instant.
TOGETHER = """
import os, sys, time
from bnlight.cli import main
import bnlight.run.train
arguments = sys.argv[2:]
children = []
for number in range(int(sys.argv[1])):
    child = os.fork()
    if child == 0:
        while not os.path.exists("go"):
            time.sleep(0.001)
        os.dup2(os.open(f"said-{number}", os.O_CREAT | os.O_WRONLY), 1)
        os._exit(main(["train", *[argument.replace("NUMBER", str(number)) for argument in arguments]]))
    children.append(child)
open("go", "w").close()
sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
"""


@pytest.fixture
def ours(project: Path) -> Path:
    (project / "mine.py").write_text(MINE)
    return project


def together(project: Path, count: int, *arguments: str, **environment: str) -> list[str]:
    """Start `count` jobs at one instant; what each said."""
    command = [sys.executable, "-c", TOGETHER, str(count), *arguments]
    done = subprocess.run(command, cwd=project, env=os.environ | environment, timeout=240, check=False)
    assert done.returncode == 0
    return [path.read_text() for path in sorted(project.glob("said-*"))]


def trained(project: Path) -> Counter[str]:
    """How often each job was trained."""
    return Counter(line.split()[0] for line in (project / "trained").read_text().splitlines())


def test_twenty_different_jobs_at_one_instant_have_a_directory_each(ours: Path) -> None:
    together(ours, 20, *CUSTOM, "seed=NUMBER", "+trainer.limit_train_batches=2")
    jobs = list(ours.glob("outputs/train/*/result.json"))
    assert len(jobs) == 20
    seeds = {json.loads((job.parent / "status.json").read_text())["pid"] for job in jobs}
    assert len(seeds) == 20
    assert sorted(trained(ours).values()) == [1] * 20


def test_twenty_equal_jobs_at_one_instant_run_once_and_the_others_say_who_runs_it(ours: Path) -> None:
    said = together(ours, 20, *CUSTOM, "+trainer.limit_train_batches=2", SLOW="3")
    assert list(trained(ours).values()) == [1]
    (runner,) = [text for text in said if "done in" in text]
    others = [text for text in said if text is not runner]
    assert len(others) == 19
    (line,) = (ours / "trained").read_text().splitlines()
    for text in others:
        assert f"is being run by process {line.split()[1]} on " in text or "done before, skipped" in text


def test_two_sweeps_of_one_name_share_the_work_and_both_end_with_the_whole_comparison(
    ours: Path, start: Start
) -> None:
    two = [start("train", "-m", *CUSTOM, "seed=range(6)", SLOW="0.7") for _ in range(2)]
    outputs = [process.communicate(timeout=240)[0] for process in two]
    assert [process.returncode for process in two] == [0, 0]
    assert sorted(trained(ours).values()) == [1] * 6
    by = {line.split()[1] for line in (ours / "trained").read_text().splitlines()}
    assert len(by) == 2  # both have worked
    for output in outputs:
        assert "6 jobs, 6 done" in output
    assert any("running elsewhere, skipped: " in output for output in outputs)


def test_a_job_that_runs_elsewhere_is_left_alone_and_taken_over_when_its_owner_dies(
    ours: Path, start: Start, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as environment:
        environment.setenv("SLOW", "1000")
        first = multiprocessing.get_context("fork").Process(target=main, args=(["train", *CUSTOM, "seed=0"],))
        first.start()
    until((ours / "trained").exists)
    second = start("train", "-m", *CUSTOM, "seed=0,1")
    said = ""
    while "Waiting for 1 jobs that run elsewhere" not in said:
        assert second.stdout is not None
        line = second.stdout.readline()
        assert line, said  # it has ended
        said += line
    assert said.count("done in") == 1  # the other job
    second.send_signal(signal.SIGINT)
    second.communicate(timeout=60)
    assert second.returncode == 130
    assert first.is_alive()
    states = [read_status(path.parent)["state"] for path in ours.glob("outputs/train/*/status.json")]
    assert sorted(states) == ["done", "running"]

    wait = sweep.wait

    def kill_and_wait(directory: Path) -> None:
        first.kill()
        wait(directory)

    monkeypatch.setattr(sweep, "wait", kill_and_wait)
    assert main(["train", "-m", *CUSTOM, "seed=0,1"]) == 0
    first.join(30)
    said = capsys.readouterr().out
    assert "running elsewhere, skipped: " in said
    assert "Waiting for 1 jobs that run elsewhere" in said
    assert "interrupted before, continued" in said
    assert said.count("done in") == 1
    assert "2 jobs, 2 done" in said


def test_a_process_that_a_job_has_forked_does_not_keep_the_job(tmp_path: Path) -> None:
    said, _, (process,) = hosts(1, tmp_path, forks=True)  # such as the workers of a DataLoader
    assert said == ["owns"]
    assert owner(tmp_path)
    process.kill()
    process.join()
    assert owner(tmp_path) == {}
    with own(tmp_path):
        pass


# Two hosts that share a directory, but not the kernel's locks.
def _host(name: str, directory: Path, takes: Any, leaves: Any, pipe: Any, forks: bool) -> None:
    if not forks:
        lock.socket.gethostname = lambda: name  # type: ignore[attr-defined]
        fcntl.flock = lambda *_: None  # type: ignore[assignment]
    takes.wait(30)
    try:
        with own(directory):
            if forks and os.fork() == 0:
                time.sleep(20)
                os._exit(0)
            pipe.send("owns")
            leaves.wait(30)
    except JobBusy as busy:
        pipe.send(str(busy))


def hosts(count: int, directory: Path, forks: bool = False) -> tuple[list[str], Any, list[Any]]:
    context = multiprocessing.get_context("fork")
    takes, leaves = context.Event(), context.Event()
    ends, processes = [], []
    for number in range(count):
        here, there = context.Pipe()
        process = context.Process(
            target=_host, args=(f"host-{number}", directory, takes, leaves, there, forks)
        )
        process.start()
        ends.append(here)
        processes.append(process)
    takes.set()
    return [end.recv() for end in ends], leaves, processes


def test_hosts_without_a_common_lock_take_a_job_once(tmp_path: Path) -> None:
    for turn in range(5):  # of one directory: it is given back and taken again
        said, leaves, processes = hosts(6, tmp_path / "job")
        assert said.count("owns") == 1, (turn, said)
        assert all(
            "is being run by process" in text or "being taken" in text for text in said if text != "owns"
        )
        leaves.set()
        for process in processes:
            process.join(30)


def test_a_silent_owner_on_another_host_is_a_dead_one(tmp_path: Path) -> None:
    job = tmp_path / "job"
    said, _, (process,) = hosts(1, job)
    assert said == ["owns"]
    assert owner(job)["host"] == "host-0"
    with pytest.raises(JobBusy, match="on host-0"), own(job):
        pass
    process.kill()
    process.join()
    assert owner(job)["host"] == "host-0"  # nobody can know yet
    old = time.time() - lock.STALE_SECONDS - 1
    os.utime(job / ".lock", (old, old))
    os.utime(next(job.glob(".claim-*")), (old, old))
    assert owner(job) == {}
    with own(job) as last_alive:
        assert last_alive == pytest.approx(old)
        assert owner(job)["pid"] == os.getpid()


def test_a_job_that_another_machine_is_about_to_take_is_waited_for_and_not_asked_for_again_and_again(
    ours: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *JOB, "seed=0,1", "-m", "--dry-run"]) == 0
    name = capsys.readouterr().out.split()[1].rstrip(":")
    job = ours / "outputs" / "train" / name
    job.mkdir()
    (job / ".claim-1").touch()  # and died before it could say who it was
    (job / ".lock").touch()
    assert owner(job)
    monkeypatch.setattr(lock, "STALE_SECONDS", 5.0)
    assert main(["train", "-m", *JOB, "seed=0,1"]) == 0
    said = capsys.readouterr().out
    assert said.count("is being taken by another machine") == 1
    assert said.count("Waiting for 1 jobs") == 1
    assert read_status(job)["state"] == "done"


def test_who_cannot_write_into_the_lock_keeps_nobody_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(lock, "_write", full)
        with pytest.raises(OSError, match="No space"), own(tmp_path):
            pass
    with own(tmp_path):
        pass


def test_the_owner_gives_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "SECONDS_BETWEEN_BEATS", 0.05)
    with own(tmp_path):
        os.utime(tmp_path / ".lock", (1, 1))
        time.sleep(0.3)
        assert time.time() - (tmp_path / ".lock").stat().st_mtime < 5
    assert not list(tmp_path.glob(".claim-*"))


def test_status_is_never_lost_between_two_writers(tmp_path: Path) -> None:
    def write(name: str) -> None:
        for number in range(200):
            update_status(tmp_path, **{f"{name}{number}": number})

    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write, args=(name,)) for name in "abc"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(read_status(tmp_path)) == 600


def test_ranks_with_different_configs_stop_within_seconds_and_show_both(ours: Path) -> None:
    (ours / "go.py").write_text(
        "import os, sys\nfrom bnlight.cli import main\n"
        "other = ['optimizer.lr=0.3', 'seed=4'] if os.environ['RANK'] == '1' else []\n"
        f"sys.exit(main(['train', *{JOB!r}, 'trainer=ddp', 'trainer.accelerator=cpu', 'trainer.devices=2', *other]))\n"
    )
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "go.py",
    ]
    begun = time.monotonic()
    done = subprocess.run(torchrun, cwd=ours, capture_output=True, text=True, timeout=120, check=False)
    assert time.monotonic() - begun < 60  # the imports of three processes
    assert done.returncode != 0
    assert "rank 1 has another config than rank 0, so nothing was started:" in done.stderr
    assert "optimizer.lr: rank 0 0.1, rank 1 0.3" in done.stderr
    assert "seed: rank 0 0, rank 1 4" in done.stderr
    assert not list(ours.glob("outputs/**/status.json"))
    left = [p for p in psutil.process_iter(["cmdline"]) if str(ours) in " ".join(p.info["cmdline"] or [])]
    assert not left


def test_differences_are_named_by_key() -> None:
    first = {"a": {"b": 1, "c": 2}, "job": {"name": "x"}}
    other = {"a": {"b": 1, "c": 3}, "d": None, "job": {"name": "y"}}
    assert differences(first, other, 2).splitlines() == [
        "  a.c: rank 0 2, rank 2 3",
        "  d: rank 0 (no such key), rank 2 None",
    ]
