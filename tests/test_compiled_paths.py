"""A network that is compiled inside a module: paths, patterns and checkpoints are those of the plain one."""

from __future__ import annotations

from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

import bnlight
from bnlight.doctor.case import Case
from bnlight.lightning.initial import initialize
from bnlight.lightning.replace import replace_norms
from bnlight.run.load import restored


class Net(pl.LightningModule):
    def __init__(self, compiled: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net: nn.Module = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
        if compiled:
            self.net = torch.compile(self.net, backend="eager")


def saved(module: Net, path: Path, *, replaced: bool = False) -> Path:
    """A checkpoint of Lightning's."""
    if replaced:
        replace_norms(module, "renorm")
    trainer = pl.Trainer(
        logger=False, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False
    )
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path / "saved.ckpt")
    return path / "saved.ckpt"


def values(module: nn.Module) -> list[torch.Tensor]:
    return [*module.state_dict().values()]


@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("here", [False, True])
def test_a_checkpoint_is_loaded_whichever_side_is_compiled(
    tmp_path: Path, there: bool, here: bool, replaced: bool
) -> None:
    module = Net(there)
    file = saved(module, tmp_path, replaced=replaced)
    assert any("_orig_mod" in key for key in torch.load(file, weights_only=True)["state_dict"]) is there
    loaded = bnlight.load(file, Net, compiled=here)
    assert isinstance(loaded, Net)
    assert all(map(torch.equal, values(loaded), values(module)))
    if not replaced:
        assert type(loaded) is Net
        twin = restored(Net(here), torch.load(file, weights_only=True))
        assert all(map(torch.equal, values(twin), values(module)))
        other = Net(here)
        assert "7 tensors" in initialize(other, file) or "9 tensors" in initialize(other, file)
        assert all(map(torch.equal, values(other), values(module)))


def test_layers_have_the_same_paths_and_patterns_compiled_or_not() -> None:
    module = Net(True)
    with pytest.raises(ValueError, match=r"matches none of the layers net\.1"):
        bnlight.freeze_norm(module, include="nothing")
    bnlight.freeze_norm(module, include="net.1")
    assert [*Case(module).norms.values()] == ["net.1"]
    bnlight.unfreeze_norm(module)
    report = bnlight.replace_norm(module, "batch", include="net.1")
    assert [row.path for row in report] == ["net.1"]
    bnlight.sync_norm(module)
    assert [m.meeting.path for m in module.modules() if isinstance(m, bnlight.norm.BatchNorm)] == ["net.1"]
