"""Averaged weights (Lightning's EMAWeightAveraging) of a stopped run are those of the run that was not stopped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_survival import ARGUMENTS, MINE, assert_same_run

from bnlight.cli import main

EMA = ["+callbacks.ema._target_=pytorch_lightning.callbacks.EMAWeightAveraging", "+callbacks.ema.decay=0.9"]
MOMENTS = [(7, "SIGTERM"), (18, "SIGINT"), (27, "SIGTERM")]  # in the first epoch, at its end, in the second


@pytest.mark.parametrize("more", [[], ["+callbacks.ema.update_starting_at_step=10"]], ids=["at once", "late"])
def test_averaged_weights_resume_bit_by_bit(
    project: Path, monkeypatch: pytest.MonkeyPatch, more: list[str]
) -> None:
    (project / "mine.py").write_text(MINE)
    job = ["train", *ARGUMENTS, *EMA, *more]
    assert main([*job, "paths.outputs=whole"]) == 0
    (last,) = Path("whole").glob("train/*/checkpoints/last.ckpt")
    saved = torch.load(last, weights_only=True)
    averaged, current = saved["state_dict"], saved["current_model_state"]
    assert any(not torch.equal(averaged[name], current[name]) for name in averaged)
    for step, name in MOMENTS:
        cut = [*job, f"paths.outputs=at-{step}"]
        with monkeypatch.context() as environment:
            environment.setenv("AT", str(step))
            environment.setenv("SIGNAL", name)
            assert main(cut) == 130
        assert main(cut) == 0
        assert_same_run(Path("whole"), Path(f"at-{step}"))
