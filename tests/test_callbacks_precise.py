"""PreciseStatistics in real trainings: statistics that fit the weights, and a training that does not notice."""

import copy
import random
import warnings
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, update_bn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, WeightedRandomSampler

from bnlight import freeze_norm, precise_statistics
from bnlight.callbacks import FreezeNorm, PreciseStatistics
from bnlight.data import ShuffledBatches
from bnlight.lightning.training_data import training_batches
from bnlight.norm import BatchNorm, BatchRenorm

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*srun.*"),
    pytest.mark.filterwarnings("ignore:The value of the smallest subnormal"),
]
KINDS = [nn.BatchNorm1d, BatchNorm]


class Module(pl.LightningModule):
    """Anybody's module, with dropout, so that a random number more or less shows."""

    def __init__(self, norm: type[nn.Module] = nn.BatchNorm1d) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(3, 4), norm(4), nn.Dropout(0.2), nn.Linear(4, 4), norm(4), nn.Linear(4, 1)
        )
        self.at_validation: list[dict[str, Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return (self(batch[0]) - batch[1]).square().mean()

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        if index == 0 and not self.trainer.sanity_checking:
            self.at_validation.append(copy.deepcopy(self.state_dict()))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.03, momentum=0.9)


class Random(Dataset):
    """Augments by all three of the usual generators."""

    def __init__(self, number: int = 56) -> None:
        self.x = torch.randn(number, 3, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        noise = torch.randn(3) + random.random() + np.random.rand()
        return self.x[index] + 0.1 * noise, self.x[index].sum(0, keepdim=True)


def loader(**options: Any) -> DataLoader:
    return DataLoader(Random(), **{"batch_size": 8, "shuffle": True} | options)


def fit(
    module: Any, *callbacks: pl.Callback, data: Any = None, val: Any = None, **options: Any
) -> pl.Trainer:
    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
        "accelerator": "cpu",
    }
    store = {"enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks), "max_epochs": 3}
    path = options.pop("ckpt_path", None)
    trainer = pl.Trainer(**quiet | store | {"callbacks": [*callbacks]} | options)
    pl.seed_everything(5, verbose=False)
    val = DataLoader(TensorDataset(torch.randn(8, 3)), batch_size=4) if val is None else val
    trainer.fit(module, loader() if data is None else data, val, ckpt_path=path)
    return trainer


def weights(module: nn.Module) -> list[Tensor]:
    return [*module.parameters()]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def statistics(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if "running" in name}


def precise(module: nn.Module, state: dict[str, Tensor], batches: Any) -> dict[str, Tensor]:
    other = copy.deepcopy(module).eval()
    other.load_state_dict(state)
    return statistics(precise_statistics(other, batches).state_dict())


def assert_close(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    for name in b:
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def fixed() -> DataLoader:
    x = torch.randn(56, 3, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=8)


def ours() -> ShuffledBatches:
    x, y = fixed().dataset.tensors
    return ShuffledBatches(x, y, [slice(8 * step, 8 * step + 8) for step in range(7)], seed=2)


SOURCES = {
    "bnlight's": ours,
    "shuffled by the global generator": loader,
    "shuffled by its own": lambda: loader(generator=torch.Generator().manual_seed(3)),
    "weighted": lambda: loader(shuffle=False, sampler=WeightedRandomSampler(torch.arange(56.0), 56)),
    "workers that stay": lambda: loader(num_workers=1, persistent_workers=True),
    "no batches": lambda: DataLoader(
        Random(),
        batch_size=None,
        collate_fn=lambda s: (s[0].repeat(4, 1) + torch.randn(4, 3), s[1].repeat(4, 1)),
    ),
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_training_does_not_notice(kind, source):
    """Weights to the bit, with validations in the middle of epochs, shuffling, dropout and augmentation."""
    modules = []
    for callbacks in ([], [PreciseStatistics(3)]):
        module = Module(kind)
        fit(
            module,
            *callbacks,
            data=SOURCES[source](),
            val_check_interval=3,
            num_sanity_val_steps=1,
            max_epochs=2,
        )
        modules.append(module)
    assert equal(*map(weights, modules))
    assert not equal(*([*statistics(m.state_dict()).values()] for m in modules))


@pytest.mark.parametrize("kind", [*KINDS, BatchRenorm])
@pytest.mark.filterwarnings("default::bnlight.population.UnconvergedAverages")  # the trainings are short
def test_validation_and_its_checkpoint_have_the_statistics_of_their_weights(kind, tmp_path):
    for validate in (True, False):
        module, saving = (
            Module(kind),
            ModelCheckpoint(tmp_path / str(validate), filename="{epoch}", save_top_k=-1),
        )
        fit(module, PreciseStatistics(), saving, data=fixed(), limit_val_batches=1.0 if validate else 0)
        for epoch in range(3):
            path = tmp_path / str(validate) / f"epoch={epoch}.ckpt"
            state = torch.load(path, weights_only=True)["state_dict"]
            if validate:
                assert equal([*state.values()], [*module.at_validation[epoch].values()])
            if kind is not BatchRenorm:  # which a second pass brings closer
                assert_close(state, precise(module, state, fixed()))
        assert equal([*state.values()], [*module.state_dict().values()])


def test_stock_lightning_validates_by_statistics_of_older_weights():
    module = Module()
    fit(module, data=fixed())
    state = module.at_validation[-1]
    right = precise(module, state, fixed())
    assert max(float((state[n] / right[n] - 1).abs().max()) for n in right if "var" in n) > 0.1


@pytest.mark.parametrize("source", [fixed, ours])
@pytest.mark.parametrize("kind", [nn.BatchNorm1d, BatchRenorm])
@pytest.mark.filterwarnings("default::bnlight.population.UnconvergedAverages")  # the trainings are short
def test_a_resumed_run_equals_one_that_never_stopped(kind, source, tmp_path):
    """As without the callback, that needs an order which a checkpoint brings back."""
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    whole, resumed = Module(kind), Module(kind)
    for module in (whole, resumed):
        module.net[2].p = 0.0
    fit(whole, PreciseStatistics(4), saving, data=source())
    fit(resumed, PreciseStatistics(4), data=source(), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert equal([*whole.state_dict().values()], [*resumed.state_dict().values()])


def test_which_batches_come_depends_on_the_step_alone():
    found = []
    for epochs in (1, 1, 2):
        trainer = fit(module := Module(), data=(data := loader()), max_epochs=epochs)
        torch.manual_seed(len(found))
        trainer.fit_loop.setup_data()
        before = torch.get_rng_state()
        with training_batches(trainer, module, 3, None) as batches:
            found.append(torch.cat([x for x, _ in batches]))
        assert torch.equal(before, torch.get_rng_state())
        assert data.generator is None
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_only_every_nth_epoch_and_the_end():
    module = Module()
    fit(module, PreciseStatistics(every_n_epochs=2), data=fixed())
    off = [
        max(float((state[n] - right[n]).abs().max()) for n in right)
        for state in module.at_validation
        for right in [precise(module, state, fixed())]
    ]
    assert [value < 1e-4 for value in off] == [False, True, False]
    assert_close(module.state_dict(), precise(module, module.state_dict(), fixed()))


class HandFrozen(Module):
    """Keeps its first norm in evaluation mode, as fine-tuning does, and its second by freeze_norm."""

    def on_train_epoch_start(self) -> None:
        self.net[1].eval()


def test_frozen_norms_stay():
    module = HandFrozen()
    before = copy.deepcopy(module.net[1].state_dict())
    fit(module, PreciseStatistics(), data=fixed())
    assert torch.equal(module.net[1].running_mean, before["running_mean"])
    right = precise(module, module.state_dict(), fixed())
    assert not torch.allclose(right["net.1.running_mean"], before["running_mean"], atol=0.01)
    module = Module()
    freeze_norm(module)
    before = copy.deepcopy(statistics(module.state_dict()))
    fit(module, PreciseStatistics(), data=fixed())
    assert equal([*before.values()], [*statistics(module.state_dict()).values()])
    module = Module()
    fit(module, PreciseStatistics(), FreezeNorm(10), data=fixed())
    assert_close(module.at_validation[1], statistics(module.at_validation[2]))


class Words(IterableDataset):
    def __iter__(self) -> Any:
        yield from ((torch.randn(8, 3), torch.zeros(8, 1)) for _ in range(7))


def test_data_that_cannot_be_read_twice_need_a_loader_of_their_own():
    with pytest.raises(TypeError, match=r"a DataLoader of the Words .* dataloader=\.\.\."):
        fit(Module(), PreciseStatistics(), data=DataLoader(Words(), batch_size=None))
    with pytest.raises(TypeError, match="the training data are a list"):
        fit(Several(), PreciseStatistics(), data=[fixed(), fixed()])
    for own in (fixed(), fixed):
        module = Module()
        fit(
            module,
            PreciseStatistics(dataloader=own),
            data=DataLoader(Words(), batch_size=None),
            limit_train_batches=7,
        )
        assert_close(module.state_dict(), precise(module, module.state_dict(), fixed()))


class Several(Module):
    def training_step(self, batch: Any, index: int) -> Tensor:
        return super().training_step(batch[0], index)


class Wordless(Module):
    forward = pl.LightningModule.forward

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return (self.net(batch[0]) - batch[1]).square().mean()


def test_a_module_without_a_forward_says_so_before_it_trains_and_may_be_told():
    with pytest.raises(TypeError, match=r"Wordless.forward, which does not exist; .* forward=lambda"):
        fit(Wordless(), PreciseStatistics())
    module = Wordless()
    fit(module, PreciseStatistics(forward=lambda module, batch: module.net(batch[0])), data=fixed())
    x = [batch[0] for batch in fixed()]
    net = copy.deepcopy(module.net).eval()
    assert_close(module.net.state_dict(), statistics(precise_statistics(net, x).state_dict()))
    for wrong in ({"num_batches": 0}, {"every_n_epochs": 0}):
        with pytest.raises(ValueError, match="must be at least 1"):
            PreciseStatistics(**wrong)


def counters(model: nn.Module) -> list[int]:
    return [int(b) for name, b in model.named_buffers() if name.endswith("num_batches_tracked")]


def test_stock_weight_averaging_averages_counters_and_keeps_statistics_of_other_weights(tmp_path):
    """Lightning's default averages all buffers: the counters stand still, the statistics fit no weights."""
    module = Module()
    fit(module, EMAWeightAveraging(decay=0.9), data=fixed())
    state = module.at_validation[-1]
    assert int(state["net.1.num_batches_tracked"]) < 21
    right = precise(module, state, fixed())
    assert max(float((state[n] / right[n] - 1).abs().max()) for n in right if "var" in n) > 0.1


@pytest.mark.parametrize("buffers", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_an_averaged_model_gets_statistics_of_its_own_and_the_counters_of_the_current_one(
    kind, buffers, tmp_path
):
    module, saving = Module(kind), ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    averaging = EMAWeightAveraging(decay=0.9, use_buffers=buffers)
    fit(module, averaging, PreciseStatistics(), saving, data=fixed())
    for epoch, state in enumerate(module.at_validation):
        assert_close(state, precise(module, state, fixed()))
        assert int(state["net.1.num_batches_tracked"]) == 7 * (epoch + 1)
        saved = torch.load(tmp_path / f"epoch={epoch}.ckpt", weights_only=True)
        assert equal([*saved["state_dict"].values()], [*state.values()])
        assert not torch.equal(saved["current_model_state"]["net.0.weight"], state["net.0.weight"])
    assert_close(module.state_dict(), precise(module, module.state_dict(), fixed()))
    plain = Module(kind)
    fit(plain, EMAWeightAveraging(decay=0.9, use_buffers=buffers), data=fixed())
    assert equal(weights(plain), weights(module))


def swa() -> StochasticWeightAveraging:
    return StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1, annealing_epochs=1)


@pytest.mark.parametrize("kind", [BatchNorm, BatchRenorm])
@pytest.mark.filterwarnings("default::bnlight.population.UnconvergedAverages")  # the trainings are short
def test_stock_swa_does_not_see_our_layers_and_leaves_them_the_statistics_of_the_last_weights(kind):
    stock, ours = Module(kind), Module(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(stock, swa(), data=fixed())
        fit(ours, swa(), PreciseStatistics(), data=fixed())
    state = stock.state_dict()
    right = precise(stock, state, fixed())
    assert max(float((state[n] / right[n] - 1).abs().max()) for n in right if "var" in n) > 0.05
    if kind is BatchNorm:
        assert equal(weights(stock), weights(ours))
    state, (x, _) = ours.state_dict(), fixed().dataset.tensors
    again = ours.net[0](x)
    torch.testing.assert_close(state["net.1.running_mean"], again.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state["net.1.running_var"], again.var(0), rtol=1e-4, atol=1e-5)
    assert_close(
        state, {n: t for n, t in precise(ours, state, fixed()).items() if kind is BatchNorm or "net.1" in n}
    )
    assert counters(ours) == [21, 21]


def test_weight_averaging_must_stand_before():
    for averaging in (EMAWeightAveraging(), swa()):
        with pytest.raises(
            ValueError, match=r"stands before .*Averaging in the callbacks, .* move it behind"
        ):
            fit(Module(), PreciseStatistics(), averaging)


def test_torchs_update_bn_does_not_see_our_layers_and_precise_statistics_sees_both():
    data = [torch.randn(16, 3) * 3 + 5 for _ in range(4)]
    for kind in KINDS:
        averaged = AveragedModel(nn.Sequential(kind(3)), avg_fn=get_ema_avg_fn(0.9), use_buffers=True)
        update_bn(data, averaged)
        assert (averaged.module[0].running_mean.min() > 2) == (kind is nn.BatchNorm1d)
        precise_statistics(averaged, data)
        torch.testing.assert_close(averaged.module[0].running_mean, torch.cat(data).mean(0))
        torch.testing.assert_close(averaged.module[0].running_var, torch.cat(data).var(0))


@pytest.mark.parametrize("kind", KINDS)
def test_torchs_averaged_model_stands_its_counter_still(kind):
    net = kind(3)
    averaged = AveragedModel(net, avg_fn=get_ema_avg_fn(0.9), use_buffers=True)
    for _ in range(5):
        net(torch.randn(4, 3))
        averaged.update_parameters(net)
    assert (int(net.num_batches_tracked), int(averaged.module.num_batches_tracked)) == (5, 1)
