"""Devices of one machine: leased to one job at a time, in turn, given back by the living and the dead.

Made-up ids stand for GPUs, so that every machine can run these tests; the locks and processes are real.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL

from bnlight.run.ranks import devices
from bnlight.run.ranks.devices import Lease, devices_of, lease, leased_devices, visible_devices
from bnlight.run.survive.held import held

# A process that leases, notes when it held what, and says so.
HOLDER = """
import os, sys, time
from bnlight.run.ranks.devices import lease
number, share, seconds, log = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
with lease(number, "cpu", share, say=lambda text: print("waits:", text, flush=True), holder=sys.argv[5]) as got:
    with open(log, "a") as file:
        file.write(f"{time.time()} + {sys.argv[5]} {','.join(got.ids)}\\n")
    print("holds", flush=True)
    if os.environ.get("CHILD") and os.fork() == 0:
        time.sleep(60)
        os._exit(0)
    time.sleep(seconds)
    with open(log, "a") as file:
        file.write(f"{time.time()} - {sys.argv[5]} {','.join(got.ids)}\\n")
"""


Start = Callable[..., Any]


@pytest.fixture(autouse=True)
def _locks(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BNLIGHT_LEASES", str(project / "locks"))
    monkeypatch.setenv("BNLIGHT_DEVICES", "a,b")


@pytest.fixture
def start() -> Iterator[Callable[..., Any]]:
    processes = []

    def start(number: int = 1, share: int = 1, seconds: float = 60, name: str = "x", **env: str) -> Any:
        arguments = [str(number), str(share), str(seconds), "log", name]
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, *arguments],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | env,
            start_new_session=True,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


def said(process: Any) -> str:
    line: str = process.stdout.readline().strip()
    return line


def most_at_once() -> dict[str, int]:
    """How many held each device at the same time, at most."""
    now: dict[str, int] = {}
    most: dict[str, int] = {}
    for line in sorted(Path("log").read_text().splitlines()):
        _, sign, _, ids = line.split()
        for one in ids.split(","):
            now[one] = now.get(one, 0) + (1 if sign == "+" else -1)
            most[one] = max(most.get(one, 0), now[one])
    assert not any(now.values())
    return most


def test_jobs_never_hold_the_same_device_at_once_and_all_come_back(start: Start) -> None:
    jobs = [start(number, seconds=0.1, name=f"job{index}") for index, number in enumerate((1, 2, 1, 1, 2, 1))]
    assert [job.wait(timeout=60) for job in jobs] == [0] * 6
    assert most_at_once() == {"a": 1, "b": 1}
    with lease(2, "cpu", say=pytest.fail) as got:
        assert got is not None
        assert got.ids == ["a", "b"]


def test_a_killed_job_gives_its_devices_back_at_once_even_if_a_child_of_it_lives_on(start: Start) -> None:
    job = start(2, CHILD="1")
    assert said(job) == "holds"
    time.sleep(0.3)  # the child is there
    job.send_signal(signal.SIGKILL)
    job.wait()
    begun = time.monotonic()
    with lease(2, "cpu", say=pytest.fail):
        assert time.monotonic() - begun < 1


def test_who_waits_says_for_whom_and_comes_in_turn(start: Start) -> None:
    first = start(1, name="first", seconds=60)
    assert said(first) == "holds"
    both = start(2, name="both", seconds=0.1)
    assert said(both).startswith("waits: waits for 2 of the devices a, b: a has process ")
    late = start(1, name="late", seconds=0.1)  # b is free, but `both` came first and would wait for ever
    assert "others came first" in said(late) or True
    time.sleep(0.5)
    first.send_signal(signal.SIGKILL)
    assert (both.wait(30), late.wait(30)) == (0, 0)
    order = [line.split()[2] for line in Path("log").read_text().splitlines() if "+" in line]
    assert order == ["first", "both", "late"]


def test_the_place_in_the_line_of_one_who_died_waiting_is_lost(start: Start) -> None:
    first = start(2, name="first", seconds=3)
    assert said(first) == "holds"
    dead = start(2, name="dead")
    assert said(dead).startswith("waits:")
    dead.send_signal(signal.SIGKILL)
    dead.wait()
    with lease(1, "cpu"):
        assert first.wait(30) == 0


def test_jobs_that_may_share_do_and_one_that_may_not_waits_for_them(start: Start) -> None:
    jobs = [start(1, share=2, seconds=1.5, name=f"job{index}") for index in range(5)]
    while not Path("log").exists() or Path("log").read_text().count("+") < 4:
        time.sleep(0.05)
    alone = start(2, share=1, seconds=0.1, name="alone")
    assert [job.wait(timeout=60) for job in [*jobs, alone]] == [0] * 6
    lines = [line for line in Path("log").read_text().splitlines() if "alone" not in line]
    Path("log").write_text("\n".join(lines))
    assert most_at_once() == {"a": 2, "b": 2}  # the first two on different ones, then two each


def test_places_of_the_visible_list_can_be_asked_for() -> None:
    with lease([1], "cpu") as got:
        assert got is not None
        assert (got.ids, got.places) == (["b"], [1])


@pytest.mark.parametrize(
    ("wanted", "share", "said"),
    [
        (3, 1, "trainer.devices wants 3, but the visible devices are a, b"),
        ([5], 1, "wants"),
        (1, 0, "share_devices=0"),
    ],
)
def test_what_cannot_be_had_is_refused_and_not_waited_for(wanted: Any, share: int, said: str) -> None:
    with pytest.raises(ValueError, match=said), lease(wanted, "cpu", share):
        pass


def test_nothing_is_leased_on_a_cpu_and_where_nobody_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with lease(5, "cpu", share=None) as got:
        assert got is None
    monkeypatch.delenv("BNLIGHT_DEVICES")
    with lease(5, "cpu") as got:
        assert got is None
    assert not Path("locks").exists()


@pytest.mark.parametrize(
    ("variable", "ids"),
    [
        (None, ["0", "1", "2"]),
        ("2,0", ["2", "0"]),
        ("GPU-8f1c, MIG-5b/1/0", ["GPU-8f1c", "MIG-5b/1/0"]),
        ("", []),
    ],
)
def test_visible_devices_are_those_of_cuda(
    monkeypatch: pytest.MonkeyPatch, variable: str | None, ids: list[str]
) -> None:
    monkeypatch.delenv("BNLIGHT_DEVICES")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3 if variable is None else len(ids))
    monkeypatch.setattr(devices, "_uuids", dict)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if variable is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    assert visible_devices("gpu") == ids
    assert visible_devices("cpu") == []
    if len(ids) > 1:
        with lease(1, "auto") as first, lease(1, "auto") as second:
            assert first is not None
            assert second is not None
            assert (first.ids, second.ids) == (ids[:1], ids[1:2])
            assert first.for_new_processes()["CUDA_VISIBLE_DEVICES"] == ids[0]
            monkeypatch.setenv("BNLIGHT_LEASED", second.for_this_process()["BNLIGHT_LEASED"])
            assert leased_devices(1) == [1]  # what the Trainer of a process that sees all is given


def test_a_number_and_a_uuid_of_the_same_device_are_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BNLIGHT_DEVICES")
    monkeypatch.setattr(devices, "_uuids", lambda: {"0": "GPU-aaaa", "1": "GPU-bbbb"})
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    told: list[str] = []

    def give_up(text: str) -> None:
        told.append(text)
        raise TimeoutError

    with lease(1, "gpu"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-bb")
        with pytest.raises(TimeoutError), lease(1, "gpu", say=give_up):
            pass
    assert "GPU-bbbb has process" in told[0]


def test_each_slurm_allocation_has_devices_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    with lease(2, "cpu"):
        monkeypatch.setenv("SLURM_JOB_ID", "7")  # whose device a is not the other one's
        with lease(2, "cpu", say=pytest.fail) as got:
            assert got is not None


def test_what_is_leased_follows_the_trainer() -> None:
    assert devices_of({"devices": 2}) == 2
    assert devices_of({"devices": [1, 3]}) == [1, 3]
    assert leased_devices("auto") == "auto"
    assert Lease(["x", "y"], [0, 1]).for_new_processes()["BNLIGHT_LEASED"] == "2"


def test_two_sweeps_at_the_same_time_share_the_devices_of_the_machine(
    project: Path, bnlight: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    (project / "mine.py").write_text(
        """
import json, os, pathlib, time
from bnlight.data import Digits

class Data(Digits):
    def setup(self, stage):
        if stage == "fit":
            job = pathlib.Path(self.trainer.default_root_dir)
            ids = json.loads((job / "status.json").read_text())["devices"]
            with open("log", "a") as file:
                file.write(f"{time.time()} + {job.name} {','.join(ids)}\\n")
            until = time.monotonic() + 60  # keep the device until the other sweep has begun, too
            while len(list(job.parent.glob("*/status.json"))) < 3 and time.monotonic() < until:
                time.sleep(0.1)
            time.sleep(3)
        super().setup(stage)

    def teardown(self, stage):
        if stage == "test":
            job = pathlib.Path(self.trainer.default_root_dir)
            ids = json.loads((job / "status.json").read_text())["devices"]
            with open("log", "a") as file:
                file.write(f"{time.time()} - {job.name} {','.join(ids)}\\n")
"""
    )
    own = [*SMALL, "data=custom", "data._target_=mine.Data", "+trainer.limit_train_batches=5"]
    command = [sys.executable, "-m", "bnlight", "train", "-m", *own, "hydra/launcher=parallel"]
    sweeps = [
        subprocess.Popen(
            [*command, "hydra.launcher.n_jobs=2", f"seed={seeds}"], stdout=subprocess.PIPE, text=True
        )
        for seeds in ("0,1", "2,3")
    ]
    output = "".join(sweep.communicate(timeout=300)[0] for sweep in sweeps)
    assert [sweep.returncode for sweep in sweeps] == [0, 0]
    assert most_at_once() == {"a": 1, "b": 1}
    assert "waits for 1 of the devices a, b" in output
    for status in project.glob("outputs/train/*/status.json"):
        assert json.loads(status.read_text())["devices"] in (["a"], ["b"])


def test_a_forked_child_holds_no_locks() -> None:
    with lease(2, "cpu"):
        assert len(held) == 2
        context = multiprocessing.get_context("fork")
        child = context.Process(target=lambda: os._exit(len(held)))
        child.start()
        child.join()
        assert child.exitcode == 0
