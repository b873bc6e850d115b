"""What one job changes in its process, the next one does not see; and `self.logger` is the logger that was chosen."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import wandb
from own_code import MAE, MINE, REGRESSION
from wandb_file import read_run

from bnlight.cli import main
from bnlight.compare import compare

LEAKS = """
import os, sys

class Leaky(Regression):
    def on_fit_start(self):
        os.makedirs("elsewhere", exist_ok=True)
        os.chdir("elsewhere")
        sys.path.append("/leaked")
        torch.set_default_device("cpu")
        torch.autograd.set_detect_anomaly(True)

class Leaves(Regression):
    # Writes down how it has found a thing, and changes it.
    def __init__(self, what):
        super().__init__()
        self.what = what

    def on_fit_start(self):
        with open("/".join([START, "found.txt"]), "a") as file:
            print(repr(eval(LOOK[self.what])), file=file)
        exec(CHANGE[self.what])

START = os.getcwd()

class Ends(Regression):
    def __init__(self, how):
        super().__init__()
        self.how = how

    def on_train_epoch_start(self):
        import wandb
        wandb.finish()
        if self.how == "init":
            wandb.init(project="own", reinit=True)

class Tracks(Regression):
    def on_train_start(self):
        self.logger.experiment.log({"own/value": 3.0})
        self.logger.log_table("own/table", columns=["a"], data=[[1]])
"""


def test_jobs_after_one_that_changes_its_process_are_where_and_what_they_should_be(project: Path) -> None:
    (project / "mine.py").write_text(MINE + LEAKS)
    before = [*sys.path]
    leaky = [*REGRESSION, *MAE, "module._target_=mine.Leaky", "seed=0,1"]
    assert main(["train", "-m", *leaky]) == 0
    assert Path.cwd() == project
    assert "/leaked" not in sys.path
    assert len(before) + 1 >= len(sys.path)  # the command itself makes the folder importable
    assert not torch.is_anomaly_enabled()
    assert getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None) is None
    assert len(compare("outputs/train").runs) == 2
    assert not Path("elsewhere/outputs").exists()


def test_the_logger_of_anybodys_module_is_the_wandb_logger(project: Path) -> None:
    (project / "mine.py").write_text(MINE + LEAKS)
    assert main(["train", *REGRESSION, *MAE, "module._target_=mine.Tracks", "logger=wandb"]) == 0
    (directory,) = project.glob("outputs/train/*/wandb/offline-run-*")
    logged = read_run(directory)["metrics"]
    assert {"own/value", "val/mae"} <= logged
    assert any(name.startswith("own/table") for name in logged)


@pytest.mark.parametrize("how", ["finish", "init"])
def test_a_module_that_ends_the_run_or_begins_its_own_fails_no_job(project: Path, how: str) -> None:
    (project / "mine.py").write_text(MINE + LEAKS)
    ends = ["module._target_=mine.Ends", f"+module.how={how}", "logger=wandb", "seed=0,1"]
    assert main(["train", "-m", *REGRESSION, *MAE, *ends]) == 0
    assert wandb.run is None
    for job in project.glob("outputs/train/*/"):
        assert "test/mae" in (job / "metrics.csv").read_text()


# What a job leaves behind, how one looks at it, and what job.log calls it.
LEFT = {
    "folder": (
        "os.makedirs('gone', exist_ok=True); os.chdir('gone')",
        "os.getcwd()",
        "the working directory",
    ),
    "environment": ("os.environ['LEFT'] = '1'", "os.environ.get('LEFT')", ""),
    "path": ("sys.path.insert(0, '/left')", "'/left' in sys.path", "sys.path"),
    "streams": ("import io; sys.stdout = io.StringIO()", "type(sys.stdout).__name__", "sys.stdout"),
    "device": ("torch.set_default_device('cpu')", "torch.utils._device.CURRENT_DEVICE", "default device"),
    "dtype": ("torch.set_default_dtype(torch.float16)", "torch.get_default_dtype()", ""),
    "anomaly": ("torch.autograd.set_detect_anomaly(True)", "torch.is_anomaly_enabled()", "anomalies"),
    "deterministic": (
        "torch.use_deterministic_algorithms(True)",
        "torch.are_deterministic_algorithms_enabled()",
        "",
    ),
    "threads": ("torch.set_num_threads(3)", "torch.get_num_threads()", ""),
    "precision": (
        "torch.set_float32_matmul_precision('medium')",
        "torch.get_float32_matmul_precision()",
        "precision",
    ),
    "filters": (
        "import warnings; warnings.simplefilter('ignore')",
        "len(__import__('warnings').filters)",
        "filters",
    ),
    "level": (
        "import logging; logging.getLogger().setLevel(50)",
        "__import__('logging').getLogger().level",
        "level",
    ),
    "handlers": (
        "import logging; logging.getLogger().addHandler(logging.NullHandler())",
        "len(__import__('logging').getLogger().handlers)",
        "handlers of logging",
    ),
    "hooks": (
        "torch.nn.modules.module.register_module_forward_hook(lambda *a: None)",
        "len(torch.nn.modules.module._global_forward_hooks)",
        "hooks",
    ),
    "resolvers": (
        "from omegaconf import OmegaConf; OmegaConf.register_new_resolver('left', lambda: 1)",
        "__import__('omegaconf').OmegaConf.has_resolver('left')",
        "resolvers",
    ),
    "signals": (
        "import signal; signal.signal(signal.SIGALRM, lambda *a: None)",
        "str(__import__('signal').getsignal(14))",
        "signal",
    ),
    "numpy": ("import numpy; numpy.seterr(all='ignore')", "__import__('numpy').geterr()", "numpy"),
    "collection": ("import gc; gc.disable()", "__import__('gc').isenabled()", "garbage"),
}


@pytest.mark.parametrize("what", LEFT)
def test_the_next_job_finds_what_the_first_has_found(project: Path, what: str) -> None:
    change, look, said = LEFT[what]
    tables = f"CHANGE, LOOK = {{{what!r}: {change!r}}}, {{{what!r}: {look!r}}}\n"
    (project / "mine.py").write_text(MINE + LEAKS + tables)
    leaves = ["module._target_=mine.Leaves", f"+module.what={what}", "seed=0,1", "trainer.max_epochs=1"]
    main(["train", "-m", *REGRESSION, *MAE, *leaves])
    first, second = (project / "found.txt").read_text().splitlines()
    assert first == second
    assert len([*project.glob("outputs/train/*/status.json")]) == 2
    logs = [path.read_text() for path in project.glob("outputs/train/*/job.log")]
    assert all(("put back" in text and said in text) for text in logs) if said else True


IMPORTED = """
import warnings
torch.set_float32_matmul_precision("high")
sys.path.append("/imported")
warnings.filterwarnings("ignore", message="one of mine")
os.environ["IMPORTED"] = "1"

class Sees(Regression):
    def on_fit_start(self):
        filters = [f for f in warnings.filters if f[1] and f[1].pattern == "one of mine"]
        seen = [torch.get_float32_matmul_precision(), "/imported" in sys.path, len(filters), os.environ["IMPORTED"]]
        with open("seen.txt", "a") as file:
            print(*seen, file=file)
"""


def test_what_a_module_sets_when_it_is_imported_holds_in_each_job_that_uses_it_and_in_no_other(
    project: Path,
) -> None:
    (project / "mine.py").write_text(MINE + LEAKS + IMPORTED)
    (project / "other.py").write_text(
        MINE + "import os\nclass Other(Regression):\n    def on_fit_start(self):\n"
        "        with open('other.txt', 'a') as file:\n"
        "            print(torch.get_float32_matmul_precision(), os.environ.get('IMPORTED'), file=file)\n"
    )
    modules = ["data._target_=other.Series", "module._target_=mine.Sees,other.Other", "seed=0,1"]
    assert main(["train", "-m", *REGRESSION, *MAE, *modules]) == 0
    assert (project / "seen.txt").read_text().splitlines() == ["high True 1 1"] * 2
    assert (project / "other.txt").read_text().splitlines() == ["highest None"] * 2
    assert torch.get_float32_matmul_precision() == "highest"
