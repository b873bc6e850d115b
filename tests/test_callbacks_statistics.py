"""FreezeNorm, NormMonitor and PoolStatistics in real trainings on one device, and all callbacks' configs."""

import copy
import csv
import inspect
import math
import re
from pathlib import Path
from typing import Any

import bnlight.conf
import pytest
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from pytorch_lightning.callbacks import BackboneFinetuning, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, WandbLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from wandb import teardown
from wandb_file import read_run

from bnlight import freeze_norm, pool_statistics
from bnlight.callbacks import FreezeNorm, NormMonitor, PoolStatistics, PreciseStatistics, ReduceStatistics
from bnlight.norm import BatchNorm, BatchRenorm, GroupNorm
from bnlight.surgery.freeze import Frozen

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*srun.*"),
    pytest.mark.filterwarnings("ignore:The value of the smallest subnormal"),
]
STEPS = 7


class Module(pl.LightningModule):
    def __init__(self, norm: Any = nn.BatchNorm1d, lr: float = 0.03, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 4), norm(4, **options), nn.Linear(4, 1))
        self.lr = lr
        self.states: list[dict[str, Tensor]] = []  # after each batch

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return (self(batch[0]) - batch[1]).square().mean()

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self(batch[0])

    def on_train_batch_end(self, *_: Any) -> None:
        self.states.append(copy.deepcopy(self.state_dict()))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9, weight_decay=0.1)


def loader(size: int = 8) -> DataLoader:
    x = torch.randn(STEPS * size, 3, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=size)


def fit(module: Any, *callbacks: pl.Callback, size: int = 8, path: Any = None, **options: Any) -> pl.Trainer:
    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
        "accelerator": "cpu",
    }
    store = {"enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks), "max_epochs": 2}
    trainer = pl.Trainer(**quiet | store | {"callbacks": [*callbacks]} | options)
    trainer.fit(module, loader(size), loader(size), ckpt_path=path)
    return trainer


def norm_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name.startswith("net.1")}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# FreezeNorm


def test_stock_ways_to_freeze_do_not():
    """requires_grad_(False) lets the averages move; Lightning's BackboneFinetuning.freeze too."""
    module = Module()
    for parameter in module.net[1].parameters():
        parameter.requires_grad_(False)
    fit(module)
    assert not same(norm_state(module.states[0]), norm_state(module.states[-1]))
    module = Module()
    BackboneFinetuning.freeze(module.net[1], train_bn=True)
    fit(module)
    assert not same(norm_state(module.states[0]), norm_state(module.states[-1]))


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, BatchNorm, BatchRenorm, GroupNorm])
@pytest.mark.parametrize(("at", "first"), [(0, 0), (5, 5), (0.5, 7), (1.0, 14)])
def test_from_a_step_or_a_fraction_on_norms_stay_to_the_bit(norm, at, first):
    module = Module(norm)
    before = [copy.deepcopy(module.state_dict())]
    fit(module, FreezeNorm(at))
    states = [*before, *module.states]
    for step in range(1, first):
        assert not same(norm_state(states[step - 1]), norm_state(states[step])), step
    assert all(same(norm_state(states[first]), norm_state(state)) for state in states[first:])
    for step in range(1, len(states)):
        assert not torch.equal(states[step - 1]["net.0.weight"], states[step]["net.0.weight"])


def test_the_model_is_given_back_and_what_the_user_froze_stays_frozen():
    module = Module()
    module.net.append(freeze_norm(nn.BatchNorm1d(1)))
    fit(module, FreezeNorm(2))
    assert type(module.net[1]) is nn.BatchNorm1d
    assert module.net[1].training
    assert all(parameter.requires_grad for parameter in module.net[1].parameters())
    assert isinstance(module.net[3], Frozen)
    assert not any(parameter.requires_grad for parameter in module.net[3].parameters())

    class Failing(Module):
        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            if index == 3:
                raise OSError("disk")
            return super().training_step(batch, index)

    module = Failing()
    with pytest.raises(OSError, match="disk"):
        fit(module, FreezeNorm(2))
    assert type(module.net[1]) is nn.BatchNorm1d


def test_a_run_resumed_after_the_step_is_frozen_from_its_first(tmp_path):
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    whole, resumed = Module(), Module()
    fit(whole, FreezeNorm(0.25), saving, max_epochs=3)
    fit(resumed, FreezeNorm(0.25), max_epochs=3, path=tmp_path / "epoch=0.ckpt")
    assert same(whole.state_dict(), resumed.state_dict())
    assert same(norm_state(resumed.states[0]), norm_state(whole.states[5]))


def test_statistics_alone_or_some_norms_only():
    module = Module()
    fit(module, FreezeNorm(4, affine=False))
    first, last = module.states[4], module.states[-1]
    assert torch.equal(first["net.1.running_mean"], last["net.1.running_mean"])
    assert not torch.equal(first["net.1.weight"], last["net.1.weight"])
    module = Module()
    module.net.append(nn.BatchNorm1d(1))
    fit(module, FreezeNorm(4, include="net.1"))
    first, last = module.states[4], module.states[-1]
    assert torch.equal(first["net.1.running_mean"], last["net.1.running_mean"])
    assert not torch.equal(first["net.3.running_mean"], last["net.3.running_mean"])
    for wrong in (-1, -0.5, 1.5):
        with pytest.raises(ValueError, match=r"from 0.0 to 1.0, got"):
            FreezeNorm(wrong)
    with pytest.raises(ValueError, match=r"FreezeNorm: 'net.7' matches none of the layers net.1"):
        fit(Module(), FreezeNorm(1, include="net.7"))
    with pytest.raises(
        ValueError, match="FreezeNorm: the Trainer does not know its number of optimizer steps"
    ):
        fit(Module(), FreezeNorm(0.5), max_epochs=-1, max_steps=-1)


# NormMonitor


def rows(logger: CSVLogger) -> list[dict[str, float]]:
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        read = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
    return [row for row in read if any(key.startswith("norm/") for key in row)]


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, BatchNorm])
def test_the_monitor_logs_every_n_steps_and_after_validations(norm, tmp_path):
    logger, module = CSVLogger(tmp_path), Module(norm)
    fit(module, NormMonitor(3, num_batches=2), logger=logger, max_epochs=1)
    found = rows(logger)
    assert [row["step"] for row in found] == [3, 6, 7]
    assert {key for row in found for key in row if key.startswith("norm/")} == {
        "norm/max_train_eval_gap",
        *(
            f"norm/net.1/{name}"
            for name in ("train_eval_gap", "running_mean", "running_std", "weight_norm", "bias_norm")
        ),
    }
    for row in found:
        state = module.states[int(row["step"]) - 1]
        assert row["norm/net.1/weight_norm"] == pytest.approx(float(state["net.1.weight"].norm()))
        assert row["norm/net.1/running_std"] == pytest.approx(float(state["net.1.running_var"].sqrt().mean()))
    assert not module.net[1]._forward_hooks


def test_the_gap_is_how_far_evaluation_is_from_training(tmp_path):
    """Of one batch, by its definition: the difference of the outputs."""
    logger, module = CSVLogger(tmp_path), Module(lr=0.0, affine=False)
    fit(module, NormMonitor(1, num_batches=1), logger=logger, max_steps=1, size=4096)
    x = module.net[0](loader(4096).dataset.tensors[0][:4096])
    training = copy.deepcopy(module.net[1]).train()(x)
    evaluation = module.net[1].eval()(x)
    gap = (training - evaluation).square().mean().sqrt().item()
    assert rows(logger)[0]["norm/net.1/train_eval_gap"] == pytest.approx(gap, rel=1e-3)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, BatchNorm])
def test_the_gap_is_large_on_a_drift_and_about_0_after_precise_statistics(norm, tmp_path):
    gaps = []
    for index, callbacks in enumerate(([], [PreciseStatistics()])):
        logger, module = CSVLogger(tmp_path / str(index)), Module(norm, lr=0.001, momentum=0.01)
        fit(module, *callbacks, NormMonitor(STEPS, num_batches=STEPS), logger=logger, max_epochs=6)
        gaps.append(rows(logger)[-1]["norm/net.1/train_eval_gap"])
    assert gaps[0] > 0.2
    assert gaps[1] < 0.05


def test_layers_in_other_layouts_and_with_masks_are_seen_right(tmp_path):
    class Masked(Module):
        def forward(self, x: Tensor) -> Tensor:
            x = x[:, None].expand(-1, 2, -1)  # (N, positions, channels)
            mask = torch.tensor([True, False]).expand(len(x), 2)
            self.net[1].momentum = 1.0
            x = torch.where(mask[..., None], self.net[0](x), 1e6)
            return self.net[2](self.net[1](x, mask)).mean(1)

    logger, module = CSVLogger(tmp_path), Masked(BatchNorm, channel_dim=-1)
    fit(module, NormMonitor(1, num_batches=1), logger=logger, max_steps=2)
    assert rows(logger)[0]["norm/net.1/train_eval_gap"] < 1e-5


def test_without_running_averages_there_is_no_gap_but_lengths(tmp_path):
    logger = CSVLogger(tmp_path)
    fit(Module(GroupNorm), NormMonitor(5), logger=logger, max_epochs=1)
    assert {key for key in rows(logger)[0] if "norm/" in key} == {
        "norm/net.1/weight_norm",
        "norm/net.1/bias_norm",
    }


def test_the_monitor_does_not_change_the_training(tmp_path):
    states = []
    for callbacks in ([], [NormMonitor(2)]):
        module = Module(BatchRenorm)
        fit(module, *callbacks, logger=CSVLogger(tmp_path))
        states.append(module.state_dict())
    assert same(*states)


def test_steps_without_logging_have_no_hooks(tmp_path):
    hooked: list[bool] = []

    class Watching(Module):
        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            hooked.append(bool(self.net[1]._forward_hooks))
            return super().training_step(batch, index)

    fit(Watching(), NormMonitor(4, num_batches=1), logger=CSVLogger(tmp_path), accumulate_grad_batches=2)
    # Steps 4 and 8 end with batches 8 and 15, epochs with batches 7 and 14.
    assert [index + 1 for index, on in enumerate(hooked) if on] == [7, 14]
    hooked.clear()
    fit(Watching(), NormMonitor(3, num_batches=1), logger=CSVLogger(tmp_path), max_epochs=1)
    assert [index + 1 for index, on in enumerate(hooked) if on] == [3, 6, 7]


def test_histograms_go_to_wandb_alone(project, tmp_path):
    wandb = WandbLogger(offline=True, save_dir=tmp_path, project="p")
    fit(Module(), NormMonitor(4, histograms=True), logger=[wandb, CSVLogger(tmp_path)], max_epochs=1)
    wandb.experiment.finish()
    teardown()  # W&B's process writes the file's end after `finish` has returned
    (run,) = tmp_path.glob("wandb/offline-run-*")
    metrics = read_run(run)["metrics"]
    assert {"norm/net.1/train_eval_gap", "norm/net.1/weight_norm"} <= metrics
    assert any(key.startswith("norm/net.1/weight_histogram") for key in metrics)


# PoolStatistics


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, BatchNorm])
def test_accumulated_batches_move_the_averages_once_for_each_step(norm):
    stock, module = Module(norm), Module(norm)
    fit(stock, accumulate_grad_batches=3, max_epochs=1)
    fit(module, PoolStatistics(), accumulate_grad_batches=3, max_epochs=1)
    assert [int(state["net.1.num_batches_tracked"]) for state in stock.states] == [1, 2, 3, 4, 5, 6, 7]
    assert [int(state["net.1.num_batches_tracked"]) for state in module.states] == [0, 0, 1, 1, 1, 2, 3]
    torch.testing.assert_close(stock.net[0].weight, module.net[0].weight)
    by_hand = Module(norm)
    batches = [x for x, _ in loader()]
    for start in (0, 3, 6):
        weights = module.states[start - 1] if start else Module(norm).state_dict()
        by_hand.net[0].load_state_dict({key: weights[f"net.0.{key}"] for key in ("weight", "bias")})
        by_hand.net[1](torch.cat([by_hand.net[0](x) for x in batches[start : start + 3]]))
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(
            getattr(module.net[1], name), getattr(by_hand.net[1], name), rtol=1e-5, atol=1e-6
        )


class ByHand(Module):
    """Manual optimization, which steps every second batch and leaves the last batch of an epoch over."""

    def __init__(self, norm: Any) -> None:
        super().__init__(norm)
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], index: int) -> None:
        self.manual_backward((self(batch[0]) - batch[1]).square().mean())
        if index % 2:
            self.optimizers().step()
            self.optimizers().zero_grad()


def test_manual_steps_count_and_what_is_left_over_at_the_end_of_an_epoch():
    module = ByHand(BatchNorm)
    fit(module, PoolStatistics(), max_epochs=1)
    assert [int(state["net.1.num_batches_tracked"]) for state in module.states] == [0, 1, 1, 2, 2, 3, 3]
    assert int(module.net[1].num_batches_tracked) == 4
    assert module.net[1].observer is None


def test_an_interrupted_training_gives_the_layers_back():
    class Failing(Module):
        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            if index == 4:
                raise OSError("disk")
            return super().training_step(batch, index)

    module = Failing()
    with pytest.raises(OSError, match="disk"):
        fit(module, PoolStatistics(), accumulate_grad_batches=3)
    assert module.net[1].track_running_stats
    assert not module.net[1]._forward_hooks
    assert int(module.net[1].num_batches_tracked) == 1


def test_all_of_them_together_and_the_last_window_is_not_lost():
    module = Module(BatchNorm)
    callbacks = [PoolStatistics(), PreciseStatistics(), ReduceStatistics(), FreezeNorm(4), NormMonitor(2)]
    fit(module, *callbacks, accumulate_grad_batches=2, val_check_interval=3, max_epochs=2)
    assert int(module.net[1].num_batches_tracked) == 4
    with pool_statistics(module):
        module(torch.randn(4, 3))
    assert int(module.net[1].num_batches_tracked) == 5


@pytest.mark.parametrize(
    "callback", [FreezeNorm, NormMonitor, PoolStatistics, PreciseStatistics, ReduceStatistics]
)
def test_a_config_file_names_every_argument_with_its_default(callback):
    name = re.sub("(?<=.)([A-Z])", r"_\1", callback.__name__).lower()
    path = Path(bnlight.conf.__path__[0]) / "callbacks" / f"{name}.yaml"
    config = OmegaConf.to_container(OmegaConf.load(path)[name])
    assert config.pop("_target_") == f"bnlight.callbacks.{callback.__name__}"
    defaults = {key: p.default for key, p in inspect.signature(callback).parameters.items()}
    assert config == defaults
    assert all(type(config[key]) is type(defaults[key]) for key in config)
    assert not any(isinstance(value, float) and math.isnan(value) for value in config.values())
