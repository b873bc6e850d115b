"""W&B, offline and with its real core process: one run per job, complete and rightly ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import SMALL
from wandb_file import read_run

from bnlight.cli import main
from bnlight.run.tracking.logger import logged_in

TRACKED = [*(argument for argument in SMALL if not argument.startswith("logger")), "logger=wandb"]


def runs(project: Path, sweep: str = "train") -> dict[str, list[Path]]:
    jobs = [path.parent for path in project.glob(f"outputs/{sweep}/*/status.json")]
    return {job.name: sorted(job.glob("wandb/offline-run-*")) for job in jobs}


def test_each_job_of_a_sweep_has_exactly_one_run_that_holds_its_own_config(project: Path) -> None:
    before = dict(os.environ)
    assert main(["train", "-m", *TRACKED, "norm=batch,group", "seed=1,2"]) == 0
    assert dict(os.environ) == before
    found = runs(project)
    assert len(found) == 4
    ids = set()
    for name, (directory,) in found.items():
        run = read_run(directory)
        job = project / "outputs" / "train" / name
        config = yaml.safe_load((job / "config.yaml").read_text())
        assert run["name"] == name
        assert (run["group"], run["project"], run["exit_code"]) == ("train", "bnlight", 0)
        assert run["job_type"] == config["job"]["choices"]["norm"] == name.split("-")[0]
        assert set(run["tags"]) == {run["job_type"], "mlp", "digits"}
        assert run["config"]["norm"]["name"] == run["job_type"]
        assert run["config"]["seed"] == config["seed"]
        assert run["config"]["model"] == config["model"]
        assert run["config"]["trainer"]["max_epochs"] == 1
        assert {"train/loss", "val/accuracy", "test/accuracy", "train/seconds_per_step"} <= run["metrics"]
        assert run["id"] == json.loads((job / "status.json").read_text())["wandb_id"]
        ids.add(run["id"])
    assert len(ids) == 4


def test_a_failed_job_ends_its_run_as_failed_and_the_next_has_its_own(project: Path) -> None:
    (project / "mine.py").write_text(
        """
from bnlight.norm import BatchNorm

class Norm(BatchNorm):
    def __init__(self, channels, fails=False):
        super().__init__(channels)
        self.fails = fails

    def forward(self, x, mask=None):
        if self.fails:
            raise RuntimeError("as asked")
        return super().forward(x, mask)
"""
    )
    custom = ["norm=custom", "norm._target_=mine.Norm", "+norm.fails=true,false"]
    assert main(["train", "-m", *TRACKED, *custom]) == 1
    codes = {read_run(directory)["config"]["norm"]["fails"]: read_run(directory)["exit_code"]
             for (directory,) in runs(project).values()}  # fmt: skip
    assert codes == {True: 1, False: 0}


def test_without_wandb_it_is_not_even_imported(project: Path) -> None:
    code = (
        "import sys; from bnlight.cli import main\n"
        f"assert main(['train', *{SMALL!r}]) == 0\n"
        "assert 'pytorch_lightning' in sys.modules\n"
        "print('wandb' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
    assert not list(project.glob("**/wandb"))


def test_credentials_are_found_without_the_network(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NETRC", str(project / "netrc"))
    assert not logged_in()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.com")
    (project / "netrc").write_text(f"machine wandb.example.com login user password {'0' * 40}\n")
    (project / "netrc").chmod(0o600)
    assert logged_in()
    monkeypatch.setenv("WANDB_BASE_URL", "https://other.example.com")
    assert not logged_in()
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert logged_in()


def test_a_server_that_cannot_be_reached_costs_no_job(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE")
    script = (
        "import sys; from bnlight.cli import main; import bnlight.run.tracking.logger as tracking\n"
        "tracking.SECONDS_TO_CONNECT = 2.0\n"
        f"sys.exit(main(['train', '-m', *{TRACKED!r}, 'seed=0,1']))"
    )
    environment = os.environ | {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, check=False, timeout=120)
    assert done.returncode == 0
    assert [len(directories) for directories in runs(project).values()] == [1, 1]
