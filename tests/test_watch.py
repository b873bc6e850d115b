"""Watching a sweep: from its files, live on a terminal, in plain lines elsewhere."""

from __future__ import annotations

import json
import os
import pty
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import SMALL

from bnlight.cli import main
from bnlight.run.reached import announce, reach
from bnlight.run.status import own, write_json
from bnlight.run.watch import Reader


def job(sweep: Path, name: str, **status: object) -> Path:
    write_json(sweep / name / "status.json", {"pid": 1, "host": socket.gethostname()} | status)
    return sweep / name


def test_status_reads_states_from_files_alone_and_a_dead_owner_is_no_running_job(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep, now = tmp_path / "norms", time.time()
    announce(sweep, 10, "key")
    for name in ("a", "b", "dead", "silent", "afar", "here"):
        reach(sweep, "key", name)
    job(sweep, "a", state="done", seconds=100.0)
    job(sweep, "b", state="failed", error="ValueError: as asked\nand more", seconds=10.0)
    job(sweep, "dead", state="running", heartbeat=now)
    job(sweep, "silent", state="running", host="elsewhere", heartbeat=now - 1000)
    where = {"epoch": 3, "max_epochs": 8, "step": 120, "progress": 0.25, "resumed_at": 0.0}
    where |= {"monitor": "val/accuracy", "metrics": {"val/accuracy": 0.9}}
    job(sweep, "afar", state="running", host="elsewhere", heartbeat=now, training_since=now - 50, **where)
    running = job(sweep, "here", state="running", heartbeat=now, started=now - 50, **where)
    with own(running):
        assert main(["status", str(sweep)]) == 0
        said = capsys.readouterr().out
        overview = Reader(sweep).read()
        assert main(["status", str(sweep), "--json"]) == 0
        content = json.loads(capsys.readouterr().out)
    assert said.startswith("6 of 10 jobs: 1 done, 2 running, 1 failed, 2 interrupted, 4 left; 6 min left\n")
    for line in ("afar", "here"):
        assert f"  {line}  epoch 3/8, step 120, val/accuracy 0.9000, 2 min left\n" in said
    assert "  b  failed: ValueError: as asked\n" in said
    assert "  dead  interrupted\n" in said
    # 4 jobs of 100 s and two that need 150 s more, two at a time
    assert overview.time_left() == pytest.approx((4 * 100 + 2 * 150) / 2, abs=2)
    assert content["counts"] == {"done": 1, "running": 2, "failed": 1, "interrupted": 2, "left": 4}
    assert main(["status", str(tmp_path / "none")]) == 2


def test_jobs_to_come_are_those_of_the_last_sweep_whatever_else_the_folder_holds(tmp_path: Path) -> None:
    first, second = tmp_path / "train", tmp_path / "norms"
    announce(first, 3, "earlier")
    for name in ("a", "b", "c"):
        reach(first, "earlier", name)
        job(first, name, state="done")
    announce(first, 4, "later")
    for name in ("c", "d", "c"):  # c is in both, and the command was given twice
        reach(first, "later", name)
    job(first, "d", state="failed")
    announce(second, 5, "other")
    reach(second, "other", "e")
    job(second, "e", state="done")
    assert Reader(first).read().left == 4 - len({"c", "d"})
    overview = Reader(tmp_path).read()
    assert overview.left == 2 + 4
    assert overview.summary() == "5 of 11 jobs: 4 done, 1 failed, 6 left"


def test_watching_is_plain_where_there_is_no_terminal_and_ends_with_the_sweep(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job(tmp_path, "a", state="done")
    assert main(["status", str(tmp_path), "--watch"]) == 0
    assert capsys.readouterr().out == "1 jobs: 1 done\n"


def test_a_thousand_jobs_are_listed_without_torch(tmp_path: Path) -> None:
    for number in range(1000):
        job(tmp_path, f"job-{number}", state="done", seconds=1.0)
    code = (
        "import sys; from bnlight.cli import main\n"
        f"assert main(['status', {str(tmp_path)!r}]) == 0\n"
        "assert not {'torch', 'hydra', 'pandas', 'yaml'} & {*sys.modules}"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == "1000 jobs: 1000 done\n"


def test_a_sweep_on_a_terminal_has_one_live_view_and_loses_no_line(project: Path) -> None:
    told = project / "told.py"
    told.write_text(
        "from bnlight.norm import BatchNorm\nprint('said while imported', flush=True)\nNorm = BatchNorm\n"
    )
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update(TERM="xterm", COLUMNS="100", PYTHONPATH=str(project))
        few = [one for one in SMALL if "max_epochs" not in one]
        own_norm = ["norm=custom", "norm._target_=told.Norm"]
        arguments = ["train", "-m", *few, *own_norm, "trainer.max_epochs=40", "seed=0,1"]
        os.execv(sys.executable, [sys.executable, "-m", "bnlight", *arguments])
    raw = b""
    while True:
        try:
            data = os.read(terminal, 4096)
        except OSError:  # the other end is closed
            break
        raw += data
        if not data:
            break
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", raw.decode())
    assert "1 of 2 jobs: 1 running, 1 left" in text
    assert "2 jobs: 1 done, 1 running" in text
    assert re.search(
        r"Norm-mlp-digits-s0-\w+ +epoch \d+/40, step \d+, val/accuracy 0\.\d{4}, \d+ s left", text
    )
    assert text.count(": done in ") == 2  # what the worker says stays
    assert "said while imported" in text
    assert "comparison.html" in text
    assert raw.count(b"\x1b[?25h") >= raw.count(b"\x1b[?25l") > 0  # the cursor is there again
