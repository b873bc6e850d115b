"""Callbacks for statistics in real trainings on two ranks: everyone's data count, and metrics belong to checkpoints."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from statistics_job import BATCH, Module, samples
from torch import Tensor, nn

from bnlight import precise_statistics
from bnlight.norm import BatchNorm, BatchRenorm

CASES = [
    "stock", "stock_within", "reduce", "reduce_ours", "reduce_renorm", "reduce_within", "reduce_within_weights",
    "reduce_ema", "precise", "precise_ours", "precise_ema", "freeze", "freeze_reduce", "pool",
    "stock_sync", "reduce_sync", "precise_sync", "pool_sync", "freeze_sync",
]  # fmt: skip
ALIKE = [
    "reduce", "reduce_ours", "reduce_renorm", "reduce_ema", "precise", "precise_ours", "precise_ema", "pool",
    "reduce_sync", "precise_sync", "pool_sync",
]  # fmt: skip
STEPS = 6  # of an epoch

pytestmark = pytest.mark.filterwarnings("ignore:.*srun.*")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    job = Path(__file__).with_name("statistics_job.py")
    command = [sys.executable, str(job), str(folder), *CASES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def seen(runs: Path, case: str) -> list[dict[str, Any]]:
    return [torch.load(runs / case / f"{rank}.pt") for rank in (0, 1)]


def saved(runs: Path, case: str, name: str = "epoch=1") -> dict[str, Tensor]:
    return torch.load(runs / case / f"{name}.ckpt", weights_only=True)["state_dict"]


def statistics(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t for name, t in state.items() if "running" in name or "batches" in name}


def differ(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


def mean_of(*ranks: int, steps: int = STEPS) -> Tensor:
    """Of the first layer, whose averages are plain ones of all batches."""
    x = samples(1).tensors[0]
    return torch.stack([x[rank::2][: steps * BATCH].mean(0) for rank in ranks]).mean(0)


def module_of(case: str) -> Module:
    return Module(BatchNorm if "ours" in case else BatchRenorm if "renorm" in case else nn.BatchNorm1d)


def test_stock_lightning_the_ranks_differ_and_rank_0s_data_alone_count(runs):
    first, second = seen(runs, "stock")
    assert "net.0.running_mean" in differ(first["step"][STEPS - 1], second["step"][STEPS - 1])
    mean = saved(runs, "stock")["net.0.running_mean"]
    torch.testing.assert_close(mean, mean_of(0))
    assert (mean - mean_of(0, 1)).abs().min() > 1
    assert differ(first["validation"][1], second["validation"][1]) != []


@pytest.mark.parametrize("case", ["reduce", "reduce_ours", "reduce_renorm"])
def test_everyones_data_count_once_and_alike(runs, case):
    mean = saved(runs, case)["net.0.running_mean"]
    torch.testing.assert_close(mean, mean_of(0, 1), rtol=1e-12, atol=0)
    assert saved(runs, case)["net.0.num_batches_tracked"] == 2 * STEPS


@pytest.mark.parametrize("case", ALIKE)
def test_ranks_validate_and_go_on_with_the_same_bits(runs, case):
    first, second = seen(runs, case)
    assert len(first["validation"]) == 3  # one before the training
    if "ema" not in case:
        for a, b in zip(first["validation"], second["validation"], strict=True):
            assert differ(a, b) == []
    assert differ(first["end"][0], second["end"][0]) == []


@pytest.mark.parametrize("case", ALIKE)
@pytest.mark.parametrize("epoch", [0, 1])
def test_the_metric_from_the_fit_is_that_of_the_checkpoint_in_one_process(runs, case, epoch):
    module = module_of(case).eval()
    module.load_state_dict(saved(runs, case, f"epoch={epoch}"))
    x, y = samples(2).tensors
    with torch.no_grad():
        loss = float((module(x) - y).square().mean())
    for rank in seen(runs, case):
        assert rank["loss"][epoch] == pytest.approx(loss, rel=1e-6)  # metrics are float32


@pytest.mark.parametrize("case", ["reduce_within", "reduce_within_weights"])
def test_checkpoints_within_an_epoch_are_of_everyones_data_unlike_the_stock_ones(runs, case):
    for step in (2, 4):
        mean = saved(runs, case, f"step={step}")["net.0.running_mean"]
        torch.testing.assert_close(mean, mean_of(0, 1, steps=step), rtol=1e-12, atol=0)
        stock = saved(runs, "stock_within", f"step={step}")["net.0.running_mean"]
        torch.testing.assert_close(stock, mean_of(0, steps=step))
    assert ("optimizer_states" in torch.load(runs / case / "step=2.ckpt")) == (case == "reduce_within")


@pytest.mark.parametrize("case", ["precise", "precise_ours", "precise_ema", "precise_sync"])
def test_precise_statistics_are_of_every_ranks_batches_and_of_the_saved_weights(runs, case):
    module = module_of(case)
    state = saved(runs, case)
    module.load_state_dict(state)
    x = samples(1).tensors[0]
    batches = [x[rank::2][step * BATCH :][:BATCH] for rank in (0, 1) for step in range(4)]
    precise_statistics(module, batches)
    for name, tensor in module.state_dict().items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-9, atol=1e-12, msg=name)
    assert state["net.0.num_batches_tracked"] == 2 * STEPS


@pytest.mark.parametrize("case", ["precise", "reduce"])
def test_the_weights_are_those_of_the_training_without_the_callback(runs, case):
    stock, mine = saved(runs, "stock"), saved(runs, case)
    assert {name for name in differ(stock, mine) if "running" not in name} == set()


@pytest.mark.parametrize(("case", "first"), [("freeze", 3), ("freeze_reduce", STEPS), ("freeze_sync", 3)])
def test_frozen_norms_stay_to_the_bit_on_both_ranks_while_the_rest_learns(runs, case, first):
    ranks = seen(runs, case)
    for rank in ranks:
        norms = [{n: t for n, t in s.items() if n.startswith(("net.0", "net.2"))} for s in rank["step"]]
        assert differ(norms[first - 2], norms[first - 1]) != []
        reference = norms[first]
        assert all(differ(reference, state) == [] for state in norms[first:])
        assert differ(rank["step"][first], rank["step"][-1]) == [
            "net.1.weight", "net.1.bias", "net.3.weight", "net.3.bias"
        ]  # fmt: skip
    assert differ(ranks[0]["end"][0], ranks[1]["end"][0]) == []
    if case == "freeze_reduce":
        torch.testing.assert_close(reference["net.0.running_mean"], mean_of(0, 1))


def test_the_module_keeps_nothing_of_it(runs):
    assert seen(runs, "reduce")[0]["attributes"] == seen(runs, "stock")[0]["attributes"]


def test_synchronized_layers_have_nothing_to_merge_and_stay_to_the_bit(runs):
    assert differ(saved(runs, "stock_sync"), saved(runs, "reduce_sync")) == []


def test_pooled_micro_batches_count_one_for_each_optimizer_step_the_short_last_one_too(runs):
    counts = [state["net.2.num_batches_tracked"].item() for state in seen(runs, "pool")[0]["step"]]
    assert counts == [0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3, 4]
    x = samples(1).tensors[0]
    parts = [x[rank::2][start : start + 16] for rank in (0, 1) for start in (0, 16)]  # 4 batches, then 2
    expected = torch.stack([part.mean(0) for part in parts]).mean(0)
    torch.testing.assert_close(saved(runs, "pool", "epoch=0")["net.0.running_mean"], expected)
