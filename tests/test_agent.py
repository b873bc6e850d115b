"""W&B's sweep agent, its own code without a network: what it sends is what `bnlight train` reads."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import bnlight.sweeps
import pytest
import yaml
from conftest import SMALL
from hydra.core.override_parser.overrides_parser import OverridesParser
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args
from wandb.wandb_agent import Agent
from wandb_file import read_run

from bnlight.run.application import compose_job
from bnlight.run.tracking.agent import overrides

SWEEPS = sorted(Path(bnlight.sweeps.__path__[0], "wandb").glob("*.yaml"))


def sent(parameters: dict[str, Any], form: str = "args_no_hyphens") -> list[str]:
    """The arguments that the agent makes of a sweep's parameters."""
    arguments = create_sweep_command_args(
        {"args": {key: {"value": value} for key, value in parameters.items()}}
    )
    return list(arguments[form])


def read(arguments: list[str]) -> dict[str, Any]:
    """What Hydra makes of the overrides."""
    return {o.key_or_group: o.value() for o in OverridesParser.create().parse_overrides(overrides(arguments))}


VALUES = {
    "a.integer": 3,
    "a.float": 1e-05,
    "a.large": 1e20,
    "a.flag": True,
    "a.off": False,
    "a.nothing": None,
    "a.list": [16, 32],
    "a.words": ["b c", "d,e", "it's", 'say "so"', "back\\slash", "null", ""],
    "a.nested": [[1, 2], [None, True]],
    "a.word": "batch",
    "a.path": "/data/my files/x=1.pt",
    "a.spaces": "two words",
    "a.comma": "a,b",
    "a.quote": "it's",
    "a.call": "choice(a,b)",
    "a.space_at_the_end": "x ",
    "a.empty": "",
    "a.braces": "{not a dict",
}


@pytest.mark.parametrize("form", ["args", "args_no_hyphens"])
@pytest.mark.parametrize("key", VALUES)
def test_a_parameters_value_arrives_as_it_was_meant(key: str, form: str) -> None:
    (value,) = read(sent({key: VALUES[key]}, form)).values()
    assert value == VALUES[key]
    assert type(value) is type(VALUES[key])


def test_hydra_alone_does_not_read_what_the_agent_sends() -> None:
    parser = OverridesParser.create()
    (nothing,) = parser.parse_overrides(sent({"a": None}))
    assert nothing.value() == "None"
    (sweep,) = parser.parse_overrides(sent({"a": "a,b"}))
    assert sweep.is_sweep_override()
    with pytest.raises(Exception, match="no viable alternative"):
        parser.parse_overrides(sent({"a": {"b": 1}}))


def test_nested_parameters_and_what_is_not_for_the_job() -> None:
    nested = {
        "optimizer": {"lr": 0.123, "weight_decay": compose_job([])["optimizer"]["weight_decay"]},
        "_wandb": {"t": [1]},
        "norm": "group",
        "+model.x": 1,
    }
    assert sorted(overrides([*sent(nested), "--retry-failed", "--config-name=mine"])) == sorted(
        ["--retry-failed", "--config-name=mine", "norm=group", "+model.x=1", "optimizer.lr=0.123"]
    )


def test_a_whole_resolved_config_is_the_job_that_it_came_from() -> None:
    typed = [
        "norm=renorm",
        "norm.r_max=2.5",
        "model=mlp",
        "+trainer.limit_train_batches=3",
        "optimizer=adamw",
    ]
    typed += ["optimizer.lr=1e-05", "weight=weight_norm", "trainer=cpu", "seed=4", "scheduler=none"]
    config = compose_job(typed)
    config["norm"]["name"] = "renorm"
    everything = sent({**config, "_wandb": {"cli_version": "0.31"}})
    again = compose_job(overrides(everything))
    assert again == compose_job(typed)
    config["job"] = {"name": "x", "identity": "y", "overrides": typed, "choices": {}}
    assert compose_job(overrides(sent(config))) == compose_job(typed)
    config["seed"] = 5  # what is sent wins over what was typed then
    assert compose_job(overrides(sent(config)))["seed"] == 5


def test_a_norm_of_ones_own_comes_back_as_custom(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (project / "mine.py").write_text("from bnlight.norm import BatchNorm as Norm")
    monkeypatch.syspath_prepend(project)
    typed = ["norm=custom", "norm._target_=mine.Norm", "+norm.eps=0.1"]
    assert compose_job(overrides(sent(compose_job(typed)))) == compose_job(typed)


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_each_shipped_sweep_says_what_it_asks_and_its_parameters_are_keys(path: Path) -> None:
    text = path.read_text()
    assert "?" in text.splitlines()[0]
    sweep = yaml.safe_load(text)
    assert "${args_no_hyphens}" in sweep["command"]
    assert {"method", "metric", "parameters", "program"} <= sweep.keys()
    first = {
        key: spec.get("value", spec.get("values", [spec.get("min")])[0] if "value" not in spec else None)
        for key, spec in sweep["parameters"].items()
    }
    config = compose_job(overrides(sent(first)))
    assert config["model"]["widths"] == [16, 32]
    assert sweep["metric"]["name"] == config["monitor"]["metric"]


def agent(project: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]) -> Agent:
    """W&B's own agent, as `wandb agent` makes it, without the server's queue."""
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc123")
    monkeypatch.setenv("WANDB_DIR", str(project))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    for name in ("WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH"):
        monkeypatch.setenv(name, "")  # the agent sets them, and they are to be gone after the test
    made = Agent(api=None, queue=None, sweep_id="abc123")
    made._sweep_command = command
    return made


def ask(of: Agent, run: str, parameters: dict[str, Any], kind: str = "run") -> int:
    arguments = {key: {"value": value} for key, value in parameters.items()}
    response = of._process_command({"type": kind, "run_id": run, "program": "bnlight", "args": arguments})
    assert "exception" not in response, response
    return int(of._run_processes[run].wait(timeout=180))


def test_the_agents_run_is_the_jobs_and_resumes_with_the_whole_config(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project / "mine.py").write_text(
        "import pathlib\nfrom bnlight.data import Digits\n\nclass Data(Digits):\n    def setup(self, stage):\n"
        "        super().setup(stage)\n        if pathlib.Path('stop').exists():\n"
        "            pathlib.Path('stop').unlink()\n            raise KeyboardInterrupt\n"
    )
    (project / "stop").touch()
    command = yaml.safe_load(SWEEPS[0].read_text())["command"]
    fixed = [text for text in SMALL if not text.startswith("logger")]
    wandb_agent = agent(project, monkeypatch, [*command, *fixed, "data=custom", "data._target_=mine.Data"])
    wanted = {"norm": "group", "optimizer.lr": 1e-05, "model": {"width": 8}}
    assert ask(wandb_agent, "run1", wanted) == 130
    (job,) = project.glob("outputs/train/*/status.json")
    config = yaml.safe_load((job.parent / "config.yaml").read_text())
    assert config["optimizer"]["lr"] == 1e-05
    assert config["model"]["width"] == 8
    assert json.loads(job.read_text())["wandb_id"] == "run1"

    whole = config | {"norm": config["norm"] | {"name": "group"}, "_wandb": {}, "optimizer.lr": 1e-05}
    assert ask(wandb_agent, "run1", whole, kind="resume") == 0
    assert list(project.glob("outputs/train/*/status.json")) == [job]
    status = json.loads(job.read_text())
    assert (status["state"], status["attempt"], status["wandb_id"]) == ("done", 2, "run1")
    pieces = [read_run(piece) for piece in sorted(job.parent.glob("wandb/offline-run-*"))]
    assert {piece["id"] for piece in pieces} == {"run1"}
    run = pieces[-1]
    assert (run["id"], run["exit_code"], run["name"]) == ("run1", 0, job.parent.name)
    assert run["config"]["optimizer"]["lr"] == 1e-05
    assert "val/accuracy" in run["metrics"]

    assert ask(wandb_agent, "run2", {"norm": "grup"}) == 2
