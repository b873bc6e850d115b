"""What a config may say: groups that are null, experiments, keys of one's own, and sweeps that have no jobs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import SMALL
from omegaconf import OmegaConf

from bnlight.cli import main
from bnlight.run.application import compose_job
from bnlight.run.identity import identity

QUICK = [*SMALL, "progress=off", "+trainer.limit_train_batches=2"]


def configs(project: Path) -> list[dict[str, Any]]:
    return [yaml.safe_load(path.read_text()) for path in sorted(project.glob("outputs/*/*/config.yaml"))]


@pytest.fixture
def experiments(project: Path) -> Path:
    """A project as lightning-hydra-template has them: experiments that choose from the groups."""
    (project / "conf" / "experiment").mkdir(parents=True)
    for name, norm, width in (("small", "group", 8), ("large", "layer", 24)):
        text = f"# @package _global_\ndefaults:\n  - override /norm: {norm}\nseed: 3\nmodel: {{width: {width}}}\n"
        (project / "conf" / "experiment" / f"{name}.yaml").write_text(text)
    (project / "conf" / "experiment" / "below.yaml").write_text("seed: 3\n")
    return project


@pytest.mark.parametrize(
    ("group", "option"),
    [
        ("norm", "none"),
        ("weight", "none"),
        ("sync", "none"),
        ("scheduler", "none"),
        ("callbacks", "none"),
        ("logger", "csv"),
    ],
)
def test_null_is_the_option_that_does_nothing(project: Path, group: str, option: str) -> None:
    assert main(["train", *QUICK, f"{group}=null"]) == 0
    (config,) = configs(project)
    assert config["job"]["choices"][group] == option
    assert main(["train", *QUICK, f"{group}={option}"]) == 0
    assert len(configs(project)) == 1, "it is the same job"
    assert configs(project)[0][group] == config[group]


@pytest.mark.parametrize("group", ["model", "module", "data", "optimizer", "trainer"])
@pytest.mark.parametrize("value", ["null", "1", "true"])
def test_a_group_that_a_job_needs_lists_its_options(
    project: Path, capsys: pytest.CaptureFixture[str], group: str, value: str
) -> None:
    assert main(["train", f"{group}={value}"]) == 2
    said = capsys.readouterr().err
    assert f"Could not find '{group}/{value}'" in said
    assert f"Available options in '{group}'" in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("optimizer: null", "optimizer is None: expected one of its options (adam, adamw, rmsprop, sgd)"),
        ("model: 3", "model is 3: expected one of its options (cnn, custom, mlp, resnet)"),
        ("norm: {_target_: null}", "norm names no _target_: expected one of its options (batch,"),
        ("callbacks: [1]", "is a block of names and values, not a list"),
        ("callbacks: {mine: 3}", "callbacks.mine=3: expected what builds a callback"),
        ("widht: 3", "the config has a key 'widht' that nothing reads.\nDid you mean 'weight'?"),
    ],
)
def test_a_sweep_file_with_a_group_of_the_wrong_kind_is_an_error(
    project: Path, capsys: pytest.CaptureFixture[str], text: str, said: str
) -> None:
    (project / "sweeps").mkdir()
    params = "hydra: {mode: MULTIRUN, sweeper: {params: {seed: '0,1'}}}"
    (project / "sweeps" / "mine.yaml").write_text(f"defaults: [train, _self_]\n{text}\n{params}\n")
    assert main(["sweep", "mine"]) == 2
    assert said in capsys.readouterr().err
    assert not list(project.glob("outputs/*/*/"))


def test_null_in_a_sweep_file_and_in_a_list_of_jobs(project: Path) -> None:
    (project / "sweeps").mkdir()
    base = "defaults: [train, {override model: mlp}, _self_]\nscheduler: null\nlogger: null\ntrainer: {max_epochs: 1}\n"
    grid = "hydra: {mode: MULTIRUN, sweeper: {params: {norm: 'batch,null', +trainer.limit_train_batches: 2}}}"
    (project / "sweeps" / "mine.yaml").write_text(base + grid)
    assert main(["sweep", "mine"]) == 0
    assert {c["job"]["choices"]["norm"] for c in configs(project)} == {"batch", "none"}
    assert all(c["scheduler"] == {"_target_": None} for c in configs(project))
    assert all(c["job"]["choices"]["scheduler"] == "none" for c in configs(project))
    jobs = [
        "-m",
        "hydra/sweeper=list",
        'hydra.sweeper.jobs=["norm=null seed=1","norm=glob(inst*) model=cnn"]',
    ]
    assert main(["train", *jobs, "--dry-run"]) == 0


def test_an_experiment_chooses_the_norm_of_its_job(
    experiments: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    several = ["-m", "+experiment=small,large", "--config-dir", "conf"]
    assert main(["train", *QUICK, *several]) == 0
    found = {c["job"]["choices"]["experiment"]: c for c in configs(experiments)}
    assert {name: c["job"]["choices"]["norm"] for name, c in found.items()} == {
        "small": "group",
        "large": "layer",
    }
    assert {c["norm"]["_target_"] for c in found.values()} == {
        "bnlight.norm.GroupNorm",
        "bnlight.norm.LayerNorm",
    }
    assert found["large"]["seed"] == 3
    assert found["small"]["job"]["name"].startswith("group-mlp-digits-s3-")
    path = ["hydra.searchpath=[file://conf]", "+experiment=small"]
    assert main(["train", *QUICK, *path, "model.width=8"]) == 0
    capsys.readouterr()
    assert main(["train", "+experiment=small"]) == 2
    assert "--config-dir=FOLDER" in capsys.readouterr().err
    assert main(["train", "+experiment=below", "--config-dir=conf"]) == 2
    assert "begins with '# @package _global_'" in capsys.readouterr().err
    assert main(["train", "+experiment=tiny", "--config-dir=conf"]) == 2
    assert "large\n\tsmall" in capsys.readouterr().err


def test_an_experiment_in_a_sweep_file(experiments: Path) -> None:
    (experiments / "sweeps").mkdir()
    text = "defaults: [train, {override model: mlp}, _self_]\ntrainer: {max_epochs: 1}\nlogger: null\n"
    params = "params: {+experiment: 'small,large', +trainer.limit_train_batches: 2}"
    (experiments / "sweeps" / "mine.yaml").write_text(
        f"{text}hydra: {{mode: MULTIRUN, sweeper: {{{params}}}}}"
    )
    assert main(["sweep", "mine", "--config-dir=conf"]) == 0
    assert {c["job"]["choices"]["norm"] for c in configs(experiments)} == {"group", "layer"}


def test_a_key_of_ones_own_that_an_interpolation_uses(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *QUICK, "-m", "+wide=8,12", "model.width=${wide}"]) == 0
    assert {c["model"]["width"] for c in configs(project)} == {8, 12}
    assert main(["train", *QUICK, "model.width=8"]) == 0
    assert len(configs(project)) == 2, "the key itself makes no other job"
    assert main(["train", "+wide=8"]) == 2
    said = capsys.readouterr().err
    assert "'+wide=8' adds a key that nothing reads" in said
    assert "model.width='${wide}'" in said
    (project / "sweeps").mkdir()
    text = "defaults: [train, _self_]\nwide: 8\nmodel: {widths: ['${wide}']}\nhydra: {mode: MULTIRUN}\n"
    (project / "sweeps" / "mine.yaml").write_text(text)
    assert main(["sweep", "mine", "wide=4,6", "--dry-run"]) == 0
    assert "2 jobs: 2 runs" in capsys.readouterr().out


def test_a_key_that_only_some_options_have_names_the_job_and_the_way_out(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "-m", "norm=batch,layer", "norm.virtual_batch_size=2,8"]) == 2
    said = capsys.readouterr().err
    assert "Job 3 of 4 (norm=layer norm.virtual_batch_size=2)" in said
    assert "no key 'virtual_batch_size' in norm=layer; norm=batch has it" in said
    way = said.rsplit("hydra.sweeper.jobs=", 1)[1].strip().rstrip("'")
    assert way == '["norm=batch norm.virtual_batch_size=2,8","norm=layer"]'
    assert main(["train", "-m", "hydra/sweeper=list", f"hydra.sweeper.jobs={way}", "--dry-run"]) == 0
    assert "3 jobs: 3 runs" in capsys.readouterr().out
    assert main(["train", "norm=layer", "norm.virtual_batch_size=2"]) == 2
    assert "no key 'virtual_batch_size' in 'norm', but in norm=batch" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("norm=glob(nothing*)", "the sweep has no jobs: norm=glob(nothing*) matches nothing"),
        ("seed=range(0)", "the sweep has no jobs: seed=range(0) matches nothing"),
        ("seed=choice()", "empty choice is not legal"),
    ],
)
def test_a_sweep_without_jobs_says_what_is_empty(
    project: Path, capsys: pytest.CaptureFixture[str], text: str, said: str
) -> None:
    assert main(["train", "-m", text]) == 2
    assert said in capsys.readouterr().err


def test_a_glob_is_counted(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "-m", "norm=glob(batch*)", "--dry-run"]) == 0
    assert "[1/3] batch-cnn-digits" in capsys.readouterr().out


def test_keys_of_several_kinds_have_an_identity() -> None:
    def of(keys: dict[Any, Any]) -> str:
        return identity(OmegaConf.create({"seed": 0, "callbacks": {"mine": {"at": keys}}}))

    assert of({1: "a", "b": 2, False: 3}) == of({"b": 2, False: 3, 1: "a"})
    assert of({1: "a", "2": "b"}) == of({"2": "b", 1: "a"})
    assert len({of({1: "a", "2": "b"}), of({"1": "a", 2: "b"}), of({"1": "a", "2": "b"})}) == 3
    assert of({30: 1, 4: 2}) == of({4: 2, 30: 1})


def test_a_config_has_no_null_where_a_group_is(project: Path) -> None:
    config = compose_job(["scheduler=null", "callbacks=[]"])
    assert config["scheduler"] == {"_target_": None}
    assert config["callbacks"] == {}
    assert json.dumps(config)


def test_a_list_of_callbacks_is_called_by_its_names(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (["callbacks=[default, norm_monitor]"], ["callbacks=[]"], []):
        assert main(["train", *QUICK, *words]) == 0
    names = {c["job"]["choices"]["callbacks"] for c in configs(project)}
    assert names == {"default+norm_monitor", "none", "default"}
    capsys.readouterr()
    assert main(["compare", "outputs/train"]) == 0
    assert "default+norm_monitor" in capsys.readouterr().out
    assert main(["compare", "outputs/train", "--where", "callbacks=default+norm_monitor"]) == 0
