"""Two ranks of which one or both are killed go on, bit by bit, from the last checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_survival import ARGUMENTS, MINE, assert_same_run

from bnlight.cli import main
from bnlight.run.status import read_status

RANKS = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.max_epochs=2", "sync=none"]
RANKS += ["trainer.log_every_n_steps=4", "checkpoint_every=4"]


def test_killed_ranks_go_on_as_if_they_had_not_been_killed(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project / "mine.py").write_text(MINE)
    job = ["train", *ARGUMENTS, *RANKS]
    assert main([*job, "paths.outputs=whole"]) == 0
    for killed, at in (("1", 7), ("01", 14)):  # the one in its first epoch of 9 steps, both in the second
        cut = [*job, f"paths.outputs=cut-{killed}"]
        with monkeypatch.context() as environment:
            for name, value in (("AT", str(at)), ("ON", killed), ("SIGNAL", "SIGKILL")):
                environment.setenv(name, value)
            assert main(cut) == 1
        (directory,) = (path.parent for path in Path(f"cut-{killed}").glob("train/*/status.json"))
        status = read_status(directory)
        assert status["state"] == "failed"
        assert "was killed by SIGKILL" in status["error"]
        assert main([*cut, "--retry-failed"]) == 0
        assert_same_run(project / "whole", project / f"cut-{killed}")
