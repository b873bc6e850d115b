"""Somebody's own Hydra application gets bnlight's groups, and its own options come first."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import hydra
import pytest

APP = """
{imports}

@hydra.main(config_path="conf", config_name="app", **VERSION_BASE)
def app(cfg):
    from bnlight.surgery import replace_norm
    norm = instantiate(cfg.norm)
    layer = norm(8)
    chosen = cfg.weight._target_, cfg.sync._target_, cfg.optimizer.nesterov, cfg.size
    print(type(layer).__module__, type(layer).__name__, *chosen)

app()
"""
START = """
import hydra
from hydra import utils
NEW = hasattr(utils, "UNSAFE_DISABLE_EXECUTION_CHECKS")
VERSION_BASE = {} if NEW else {"version_base": "1.3"}
def instantiate(config):
    trusted = {"_execution_whitelist_": utils.UNSAFE_DISABLE_EXECUTION_CHECKS} if NEW else {}
    return utils.instantiate(config, **trusted)
"""
PRIMARY = """
defaults:
  - norm: {norm}
  - weight: weight_standardization
  - sync: none
  - optimizer: sgd
  - _self_
{searchpath}
size: 3
"""
OWN = "_target_: torch.nn.BatchNorm1d\n_partial_: true\n"
WAYS = {
    "searchpath": START,
    "bnlight first": "import bnlight\n" + START,
    "hydra first": START + "import bnlight\n",
    "hydra has looked for plugins": START
    + "from hydra.core.plugins import Plugins\nPlugins.instance()\nimport bnlight\n",
    "entry point": START,
}


@pytest.mark.parametrize("way", WAYS)
def test_an_application_chooses_among_the_groups(project: Path, way: str) -> None:
    if way == "entry point" and hydra.__version__ < "1.4":
        pytest.skip("Hydra 1.4 has entry points for plugins; 1.3 does not")
    searchpath = "hydra: { searchpath: [pkg://bnlight.conf] }" if way == "searchpath" else ""
    conf = project / "conf"
    (conf / "norm").mkdir(parents=True)
    (conf / "app.yaml").write_text(PRIMARY.format(norm="renorm", searchpath=searchpath))
    (conf / "norm" / "batch.yaml").write_text(OWN)
    (project / "app.py").write_text(APP.format(imports=WAYS[way]))
    assert run(project) == "bnlight.norm.renorm BatchRenorm bnlight.norm.weight_standardization None True 3"
    assert run(project, "norm=group").startswith("bnlight.norm.sample GroupNorm")
    assert run(project, "norm=batch").startswith("torch.nn.modules.batchnorm BatchNorm1d")  # its own


def test_without_any_of_them_hydra_does_not_know_the_groups(project: Path) -> None:
    if hydra.__version__ >= "1.4":
        pytest.skip("Hydra 1.4 finds the groups by the entry point")
    (project / "conf").mkdir()
    (project / "conf" / "app.yaml").write_text(PRIMARY.format(norm="renorm", searchpath=""))
    (project / "app.py").write_text(APP.format(imports=START))
    with pytest.raises(subprocess.CalledProcessError) as error:
        run(project)
    assert "Could not find '" in error.value.stderr


def test_the_groups_are_on_the_path_once(project: Path) -> None:
    code = "import bnlight; from bnlight.run import searchpath; searchpath.register(); "
    code += "from hydra._internal.utils import create_config_search_path as create; "
    code += "print([e.path for e in create('pkg://bnlight.conf').get_path()])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    paths = done.stdout.count("'pkg://bnlight.conf'"), done.stdout.count("'pkg://bnlight.sweeps'")
    assert paths == (1, 1)


def run(folder: Path, *arguments: str) -> str:
    command = [sys.executable, "-W", "error", "app.py", *arguments]
    done = subprocess.run(command, cwd=folder, env=os.environ, capture_output=True, text=True, check=True)
    return done.stdout.strip()
