"""What users have reported of checkpoints elsewhere, tried here; docs/tested-against.md lists the reports."""

from __future__ import annotations

from pathlib import Path

from own_code import MAE, MINE, SERIES

from bnlight.cli import main
from bnlight.run.status import read_status

MORE = '''
import numpy as np
from pathlib import Path


class Keeper(pl.Callback):
    """Keeps what most callbacks keep: a score as numpy has it, and a place."""

    def on_train_epoch_end(self, trainer, module):
        with open("epochs", "a") as file:
            file.write("one\\n")

    def state_dict(self):
        return {"best": np.float64(0.5), "where": Path("somewhere")}


class Careful(Keeper):
    def state_dict(self):
        return {"best": 0.5, "where": "somewhere", "at": torch.tensor(1.0)}
'''


def test_state_that_cannot_be_loaded_again_costs_no_training(project: Path) -> None:
    """materialyzeai/matgl#802, nerfstudio-project/nerfstudio#3702: checkpoints with numpy values in them cannot be
    loaded with weights_only=True, which is found out after the training."""
    (project / "mine.py").write_text(MINE + MORE)
    keeper = ["callbacks=[default]", "+callbacks.keeper._target_=mine.Keeper"]
    own = [*SERIES, *MAE, "module=custom", "module._target_=mine.Regression", "replace_norm=true", *keeper]
    code = main(["train", *own, "trainer.max_epochs=3"])
    (job,) = (path.parent for path in Path("outputs").rglob("status.json"))
    assert code == 1
    assert len(Path("epochs").read_text().splitlines()) == 1  # at the first save
    error = read_status(job)["error"]
    assert "callbacks.Keeper has numpy" in error
    assert "pathlib" in error
    assert "float(x)" in error
    keeper[1] = "+callbacks.keeper._target_=mine.Careful"
    assert main(["train", *own[: -len(keeper)], *keeper, "trainer.max_epochs=3"]) == 0
