"""Finished jobs keep the checkpoints that are asked for, unfinished ones all of theirs."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from conftest import SMALL

from bnlight.cli import main
from bnlight.run import prune
from bnlight.run.status import write_json


def checkpoints(project: Path) -> dict[str, set[str]]:
    jobs = project.glob("outputs/train/*/status.json")
    return {path.parent.name: {file.name for file in path.parent.glob("checkpoints/*")} for path in jobs}


def test_a_finished_job_keeps_what_the_key_says(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *SMALL, "seed=0"]) == 0
    assert main(["train", *SMALL, "seed=1", "keep_checkpoints=best"]) == 0
    assert main(["train", *SMALL, "seed=2", "keep_checkpoints=none"]) == 0
    kept = {name.split("-")[3]: files for name, files in checkpoints(project).items()}
    assert kept == {"s0": {"best.ckpt", "last.ckpt"}, "s1": {"best.ckpt"}, "s2": set()}
    assert main(["train", *SMALL, "seed=0", "keep_checkpoints=best"]) == 0  # the same job, whatever is kept
    assert "done before, skipped" in capsys.readouterr().out
    assert main(["train", *SMALL, "keep_checkpoints=some"]) == 2
    assert "all, best, none" in capsys.readouterr().err


def test_prune_leaves_unfinished_jobs_and_those_without_a_best_alone(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    states = {"a": "done", "b": "diverged", "c": "failed", "d": "preempted", "e": "running", "f": "done"}
    for name, state in states.items():
        job = project / "outputs" / "train" / name
        (job / "checkpoints").mkdir(parents=True)
        write_json(job / "status.json", {"state": state})
        for file in ("last.ckpt",) if name == "f" else ("best.ckpt", "last.ckpt", ".last.ckpt.77"):
            (job / "checkpoints" / file).write_bytes(b"x" * 500_000)
    before = checkpoints(project)
    assert main(["prune", "outputs", "--dry-run"]) == 0
    assert "4 checkpoints, 2.0 MB, would be removed" in capsys.readouterr().out
    assert checkpoints(project) == before
    assert main(["prune", "outputs"]) == 0
    said = capsys.readouterr().out
    assert "4 checkpoints, 2.0 MB, were removed" in said
    for line in ("c: failed", "d: preempted", "e: interrupted"):
        assert f"left alone: {line}" in said
    left = {"a": {"best.ckpt"}, "b": {"best.ckpt"}}
    assert checkpoints(project) == before | left
    assert main(["prune", "outputs/train/f", "--keep", "none"]) == 0
    assert checkpoints(project) == before | left | {"f": set()}
    assert main(["prune", "nowhere"]) == 2


def test_prune_leaves_a_job_alone_that_it_may_not_touch(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def read_only(directory: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(directory / ".lock"))

    write_json(project / "outputs" / "a" / "status.json", {"state": "done"})
    monkeypatch.setattr(prune, "own", read_only)
    assert main(["prune", "outputs"]) == 0
    assert "left alone: a: [Errno 30] Read-only file system" in capsys.readouterr().out
