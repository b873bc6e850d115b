"""NormSync under every way to start ranks: several processes train as one with the joined batch."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import sync_job
import torch
import yaml
from conftest import SMALL
from four_jobs import inside  # noqa: F401
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from slurm import slurm  # noqa: F401
from torch import nn

from bnlight import NormSync
from bnlight.lightning import Classifier
from bnlight.lightning.build import instantiate
from bnlight.norm import BatchNorm
from bnlight.run import identity
from bnlight.run.application import VERSION_BASE

JOB = str(Path(sync_job.__file__))
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
PAIR = ["mlp_torch", "mlp_ours"]


def trained(
    folder: Path, how: str, cases: list[str], start: Sequence[str] = (), program: Sequence[str] = (JOB,)
) -> dict[str, Any]:
    """What each of `cases` comes to, trained as `how` (STRATEGY:DEVICES:NODES:SYNC) says in one start of ranks."""
    start_job(folder, [f"{how}:{case}" for case in cases], start, program)
    return read(folder, how)


def start_job(
    folder: Path, runs: list[str], start: Sequence[str] = (), program: Sequence[str] = (JOB,)
) -> None:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "LOCAL_", "MASTER_", "NODE_"))}
    done = subprocess.run(
        [*start, sys.executable, *program, str(folder), *runs],
        env=kept | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def read(folder: Path, how: str) -> dict[str, Any]:
    """By case: what came out, or the text of the error."""
    found = {path.stem.split(":")[-1]: torch.load(path) for path in folder.glob(f"{how}:*.pt")}
    errors = {path.stem.split(":")[-1]: path.read_text() for path in folder.glob(f"{how}:*.txt")}
    assert found or errors
    return found | errors


@pytest.fixture(scope="module")
def forked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where one process has left what came of its forked ranks, and of training alone with batches of 16."""
    folder = tmp_path_factory.mktemp("forked")
    runs = [f"ddp_fork:2:1:world:{case}" for case in sync_job.CASES]
    runs += [f"ddp_fork:{how}:{case}" for how in ("2:1:none", "4:1:2") for case in PAIR]
    runs += ["ddp_fork:2:1:stock:mlp_torch", "ddp_fork:4:1:3:mlp_torch"]
    start_job(folder, runs + [f"auto:1:1:world:{case}" for case in sync_job.CASES])
    return folder


@pytest.fixture
def alone(forked: Path) -> dict[str, Any]:
    """What one process computes with batches of 16."""
    return read(forked, "auto:1:1:world")


def difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    assert one["state"].keys() == other["state"].keys()
    return max(float((v.double() - other["state"][k].double()).abs().max()) for k, v in one["state"].items())


def check(results: dict[str, Any], alone: dict[str, Any], world: int = 2) -> None:
    for case, result in results.items():
        assert (result["world"], result["ranks"], result["steps"]) == (world, world, sync_job.STEPS)
        for mine, theirs in zip(result["means"], alone[case]["means"], strict=True):  # at every step
            torch.testing.assert_close(mine, theirs.expand_as(mine), rtol=1e-10, atol=1e-10)
        assert difference(result, alone[case]) < 1e-10


def test_local_statistics_train_something_else_and_lightnings_own_refuses_the_cpu(forked, alone):
    results = read(forked, "ddp_fork:2:1:none")
    for case in PAIR:
        assert results[case]["ranks"] == 1
        assert difference(results[case], alone[case]) > 1e-2
    refused = read(forked, "ddp_fork:2:1:stock")["mlp_torch"]
    assert "SyncBatchNorm layers only work with GPU modules" in refused


def whole(results: dict[str, Any], cases: Iterable[str], alone: dict[str, Any], world: int = 2) -> None:
    """Each of `cases` has trained as one process, and no buffers were sent besides."""
    assert {*results} == {*cases}
    check(results, alone, world)
    if hasattr(nn.parallel.DistributedDataParallel, "broadcast_buffers"):  # since torch 2.13
        assert not any(result["broadcast"] for result in results.values())


def test_two_forked_ranks_train_as_one_process_with_the_joined_batch(forked, alone):
    whole(read(forked, "ddp_fork:2:1:world"), sync_job.CASES, alone)


spawned = pytest.param("ddp_spawn", PAIR[:1], marks=pytest.mark.slow)  # each fit spawns processes anew


@pytest.mark.parametrize(("strategy", "cases"), [("ddp", PAIR), spawned])
def test_two_ranks_train_as_one_process_with_the_joined_batch(tmp_path, alone, strategy, cases):
    whole(trained(tmp_path, f"{strategy}:2:1:world", cases), cases, alone)


def test_under_torchrun(tmp_path, alone):
    whole(trained(tmp_path, "ddp:2:1:world", PAIR, program=[*TORCHRUN, JOB]), PAIR, alone)


def parts(results: dict[str, Any]) -> None:
    """Four ranks in two parts: each part agrees, and not with the other."""
    assert {*results} == {*PAIR}
    for result in results.values():
        assert (result["world"], result["ranks"]) == (4, 2)
        for first, second, third, fourth in result["means"]:
            assert torch.equal(first, second)
            assert torch.equal(third, fourth)
            assert not torch.equal(first, third)


def test_under_slurm_two_nodes_train_as_one_or_the_ranks_of_each_node_make_the_statistics(
    tmp_path, alone, slurm  # noqa: F811
):  # fmt: skip
    environment = ["env", *(f"{k}={v}" for k, v in slurm.items()), "MASTER_ADDR=127.0.0.1"]
    start = [*environment, "srun", "-J", "sync", "-N2", "--ntasks-per-node=2", "--export=ALL"]
    start_job(tmp_path, [f"ddp:2:2:{sync}:{case}" for sync in ("world", "node") for case in PAIR], start)
    whole(read(tmp_path, "ddp:2:2:world"), PAIR, alone, world=4)
    parts(read(tmp_path, "ddp:2:2:node"))


def test_consecutive_ranks_make_the_statistics(forked):
    results = read(forked, "ddp_fork:4:1:2")
    parts(results)
    assert all(result["broadcast"] is not False for result in results.values())  # all ranks evaluate alike
    refused = read(forked, "ddp_fork:4:1:3")["mlp_torch"]
    assert "ValueError: group=3 does not divide the 4 ranks; choose one of [1, 2, 4]" in refused


@pytest.mark.parametrize("group", ["nodes", 0, -1, True, 1.5, None])
def test_what_is_no_group_is_refused_in_words(group):
    with pytest.raises(ValueError, match=r'"world" \(all\), "node" .* or a number'):
        NormSync(group)


def test_the_plugin_is_two_functions_and_can_be_pickled():
    plugin = pickle.loads(pickle.dumps(NormSync("node")))
    assert plugin.group == "node"
    model = NormSync().apply(nn.Sequential(nn.BatchNorm1d(2), BatchNorm(2)))
    assert [layer.process_group for layer in model] == ["world", "world"]
    NormSync().revert(model)
    assert type(model[0]) is nn.BatchNorm1d
    assert model[1].process_group is None
    with pytest.raises(RuntimeError, match="group='node' needs ranks"):
        plugin.apply(model)


def test_on_one_device_nothing_changes(monkeypatch, tmp_path):
    called = []
    monkeypatch.setattr(NormSync, "apply", lambda *_: called.append(True))
    results = []
    for plugins in ([], [NormSync()]):
        torch.manual_seed(0)
        module = sync_job.Module("mlp_torch", tmp_path / "out.pt").double()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_checkpointing"), False)
            trainer = pl.Trainer(accelerator="cpu", max_steps=3, plugins=plugins, **quiet)
            trainer.fit(module)
        results.append((module.state_dict(), [str(warning.message) for warning in caught]))
    (without, before), (given, after) = results
    assert all(torch.equal(without[key], given[key]) for key in without)
    assert before == after
    assert not called


def test_a_job_with_sync_world_trains_and_validates_as_its_checkpoint_does(project, inside):  # noqa: F811
    done = inside("train", *SMALL, "trainer=ddp", "trainer.accelerator=cpu", "sync=world")
    assert done.returncode == 0, done.stderr
    (job,) = (path.parent for path in project.glob("outputs/train/*/result.json"))
    result = json.loads((job / "result.json").read_text())
    assert result["world_size"] == 2
    config = yaml.safe_load((job / "config.yaml").read_text())
    assert config["sync"] == {"_target_": "bnlight.lightning.NormSync", "group": "world"}
    assert config["job"]["choices"]["sync"] == "world"
    data = instantiate(config["data"])
    module = Classifier.load_from_checkpoint(job / "checkpoints" / "best.ckpt")
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False
    )
    (reloaded,) = trainer.validate(module, datamodule=data, verbose=False)
    for name, value in reloaded.items():
        assert result["metrics"][name] == pytest.approx(value, abs=1e-6), name


def test_a_number_of_ranks_is_a_group_in_the_config():
    identity.register()
    with initialize_config_module("bnlight.conf", **VERSION_BASE):
        config = compose("train", ["sync=world", "sync.group=4"])
    assert instantiate(OmegaConf.to_container(config.sync)).group == 4
