"""The callbacks around norms, in real trainings: counted in optimizer steps, resumable, exact; and their functions."""

import copy
import inspect
import math
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import bnlight.conf
import pytest
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from pytorch_lightning.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from pytorch_lightning.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from bnlight.callbacks import ConstrainNorm, PenalizeNorm, RenormSchedule
from bnlight.norm import NORMS, BatchNorm, BatchRenorm, renorm_schedule
from bnlight.surgery import constrain_norm, norm_penalty

SHARES = {"warmup": 0.25, "r_max_at": 0.75, "d_max_at": 0.5}


class Module(pl.LightningModule):
    """Anybody's module: regression, with the bounds seen in each forward pass of training."""

    def __init__(self, norm: nn.Module | None = None, penalty: dict[str, float] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 4), norm or BatchRenorm(4), nn.Linear(4, 1))
        self.penalty = penalty
        self.seen: list[tuple[int, float, float]] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.record()
        loss = self.loss(batch)
        return loss if self.penalty is None else loss + norm_penalty(self, **self.penalty)

    def record(self) -> None:
        norm = self.model[1]
        if isinstance(norm, BatchRenorm):
            self.seen.append((self.trainer.global_step, norm.r_max.item(), norm.d_max.item()))

    def loss(self, batch: list[Tensor]) -> Tensor:
        x, y = batch
        return (self.model(x) - y).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Restless(Module):
    """Passes batches through the layers in training mode, without training."""

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.model.train()
        self.model(batch[0])
        self.model.eval()


class Alternating(Module):
    """Two optimizers, both stepped for each batch."""

    def __init__(self, norm: nn.Module | None = None) -> None:
        super().__init__(norm)
        self.automatic_optimization = False
        self.between: list[Tensor] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.record()
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()
            self.between.append(self.model[1].weight.detach().clone())

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [
            torch.optim.SGD(self.model[1].parameters(), lr=0.5),
            torch.optim.SGD([*self.model[0].parameters(), *self.model[2].parameters()], lr=0.5),
        ]


def loader(batches: int = 7) -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(batches * 8, 3, generator=generator), torch.randn(batches * 8, 1, generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=8)


def trainer(*callbacks: pl.Callback, **options) -> pl.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    store = {"enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks)}
    return pl.Trainer(**{"accelerator": "cpu", "callbacks": [*callbacks], **quiet, **store, **options})


def planned(step: int, total: int, **options: float) -> tuple[int, float, float]:
    layer = BatchRenorm(1)
    renorm_schedule(layer, step, total, **options)
    return step, layer.r_max.item(), layer.d_max.item()


def test_the_bounds_follow_the_optimizer_steps_not_the_forward_passes():
    """Accumulated gradients, a sanity check and validations in training mode come between."""
    module = Restless()
    run = trainer(
        RenormSchedule(**SHARES), max_epochs=4, accumulate_grad_batches=3, val_check_interval=2, num_sanity_val_steps=2
    )  # fmt: skip
    run.fit(module, loader(), loader(3))
    steps = [3 * epoch + batch // 3 for epoch in range(4) for batch in range(7)]
    assert run.global_step == 12
    assert module.seen == [planned(step, 12, **SHARES) for step in steps]
    assert {module.seen[0][1:], module.seen[-1][1:]} == {(1, 0), (3, 5)}
    assert len({seen[1:] for seen in module.seen}) > 5
    assert module.model[1].num_batches_tracked > 28
    assert module.model[1].warm_start


def test_max_steps_and_an_explicit_total_come_before_the_epochs():
    for schedule, options in (
        (RenormSchedule(**SHARES), {"max_steps": 5}),
        (RenormSchedule(5, **SHARES), {"max_epochs": 1}),
    ):
        module = Module()
        trainer(schedule, **options).fit(module, loader())
        assert module.seen[:5] == [planned(step, 5, **SHARES) for step in range(5)]


def test_a_resumed_run_equals_one_that_never_stopped(tmp_path):
    """Within an epoch Lightning restarts the data, so there the bounds alone are compared."""
    whole = Module()
    saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    options = {"max_epochs": 3, "accumulate_grad_batches": 2}
    trainer(RenormSchedule(**SHARES), saving, **options).fit(whole, loader())
    for step in (2, 4, 8, 11):
        resumed = Module()
        run = trainer(RenormSchedule(**SHARES), **options)
        run.fit(resumed, loader(), ckpt_path=tmp_path / f"step={step}.ckpt", weights_only=True)
        assert resumed.seen[0][0] == step
        assert {*resumed.seen} == {seen for seen in whole.seen if seen[0] >= step}
        if step % 4 == 0:
            assert resumed.seen == whole.seen[-len(resumed.seen) :]
            for name, value in whole.state_dict().items():
                assert torch.equal(resumed.state_dict()[name], value), name


class Endless(IterableDataset):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield torch.randn(3), torch.randn(1)


@pytest.mark.parametrize(
    ("module", "data", "callbacks", "options", "reason"),
    [
        (Module, loader(), [], {"max_epochs": -1}, "max_epochs=-1, max_steps=-1"),
        (Module, DataLoader(Endless(), 8), [], {"max_epochs": 2}, "inf batches in an epoch"),
        (Alternating, loader(), [], {"max_epochs": 2}, "all 2 optimizers"),
        (Module, loader(), [GradientAccumulationScheduler({0: 1, 1: 2})], {"max_epochs": 2}, "Accumulation"),
    ],
    ids=["no limit", "no length", "two optimizers", "changing accumulation"],
)
def test_without_a_known_number_of_steps_it_says_so_and_how_to_give_it(
    module, data, callbacks, options, reason
):
    with pytest.raises(
        ValueError, match=rf"(?s){reason}.*RenormSchedule\(total_steps=.*max_steps="
    ) as raised:
        trainer(RenormSchedule(), *callbacks, **options).fit(module(), data)
    assert "does not know its number of optimizer steps" in str(raised.value)
    limited = module()
    trainer(RenormSchedule(**SHARES), *callbacks, max_steps=4).fit(limited, data)
    assert limited.seen == [planned(seen[0], 4, **SHARES) for seen in limited.seen]
    assert limited.seen[-1][0] in (2, 3)


def test_with_several_optimizers_each_ones_step_counts():
    module = Alternating()
    trainer(RenormSchedule(14, **SHARES), max_epochs=1).fit(module, loader())
    assert module.seen == [planned(2 * batch, 14, **SHARES) for batch in range(7)]


@pytest.mark.parametrize(
    "options", [{"weight": 0.3, "bias": 0.2}, {"weight": 0.3, "target": 0.0, "power": 1.0}]
)
def test_penalized_training_is_training_with_the_penalty_in_the_loss(options):
    def trained(module: Module, *callbacks: pl.Callback) -> Module:
        run = {
            "max_epochs": 2,
            "accumulate_grad_batches": 2,
            "gradient_clip_val": 0.5,
            "precision": "64-true",
        }
        data = loader(6)
        data.dataset.tensors = tuple(t.double() for t in data.dataset.tensors)
        trainer(*callbacks, **run).fit(module, data)
        return module

    expected = trained(Module(BatchNorm(4), penalty=options))
    found = trained(Module(BatchNorm(4)), PenalizeNorm(**options))
    plain = trained(Module(BatchNorm(4)))
    assert not torch.allclose(plain.model[1].weight, found.model[1].weight, rtol=1e-3)
    for one, other in zip(expected.parameters(), found.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


class OnlyPenalty(Module):
    def __init__(self, fused: bool) -> None:
        super().__init__(BatchNorm(4))
        self.fused = fused
        nn.init.constant_(self.model[1].weight, 3.0)
        nn.init.constant_(self.model[1].bias, 2.0)

    def loss(self, batch: list[Tensor]) -> Tensor:
        return super().loss(batch) * 0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, fused=self.fused)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_the_penalty_is_not_changed_by_a_loss_scale(fused, scaled):
    module = OnlyPenalty(fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    plugins = [MixedPrecision("16-mixed", "cpu", scaler=scaler)] if scaled else []
    trainer(PenalizeNorm(weight=0.5, bias=0.25), plugins=plugins, max_steps=1).fit(module, loader(2))
    torch.testing.assert_close(module.model[1].weight, torch.full((4,), 3 - 0.1 * 0.5 * 2 * (3 - 1)))
    torch.testing.assert_close(module.model[1].bias, torch.full((4,), 2 - 0.1 * 0.25 * 2 * 2))


def test_each_optimizer_pulls_its_own_parameters():
    """The second optimizer has none of the norm's, and must not pull them again."""
    module = Alternating(BatchNorm(4))
    module.loss = lambda batch: Module.loss(module, batch) * 0
    nn.init.constant_(module.model[1].weight, 3.0)
    trainer(PenalizeNorm(weight=0.5), max_epochs=1).fit(module, loader(1))
    torch.testing.assert_close(module.model[1].weight, torch.full((4,), 3 - 0.5 * 0.5 * 2 * 2))


def test_bounds_hold_after_every_step_and_the_optimizers_are_given_back():
    module = Alternating(BatchNorm(4))
    run = trainer(ConstrainNorm(weight=[0.99, 1.01], bias=(None, 0.0)), max_epochs=1)
    run.fit(module, loader())
    assert len(module.between) == 14
    between = torch.stack(module.between)
    assert between.min() == torch.tensor(0.99)
    assert between.max() == torch.tensor(1.01)
    assert module.model[1].bias.max() <= 0
    assert not any(optimizer._optimizer_step_post_hooks for optimizer in run.optimizers)


def test_an_exception_gives_the_optimizers_back_too():
    module = Module()
    module.on_train_epoch_end = lambda: math.sqrt(-1)
    run = trainer(ConstrainNorm(weight=(0.0, None)), max_epochs=1)
    with pytest.raises(ValueError, match=r"math domain|nonnegative"):
        run.fit(module, loader())
    assert not any(optimizer._optimizer_step_post_hooks for optimizer in run.optimizers)


NORM_LAYERS = {
    **{name: kind(4, affine=True) for name, kind in NORMS.items()},
    "torch batch": nn.BatchNorm1d(4),
    "torch instance": nn.InstanceNorm1d(4, affine=True),
    "torch group": nn.GroupNorm(2, 4),
    "torch layer": nn.LayerNorm(4),
    "torch rms": nn.RMSNorm(4),
}


@pytest.mark.parametrize("layer", NORM_LAYERS.values(), ids=NORM_LAYERS)
def test_weight_and_bias_of_every_norm_are_penalized_and_clamped_and_nothing_else(layer):
    layer = copy.deepcopy(layer).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=3)
    model = nn.Sequential(nn.Linear(4, 4, dtype=torch.float64), layer)
    own = dict(layer.named_parameters(recurse=False))
    expected = 0.3 * (own["weight"] - 1).square().sum()
    if "bias" in own:
        expected = expected + 0.2 * own["bias"].square().sum()
    torch.testing.assert_close(norm_penalty(model, weight=0.3, bias=0.2), expected)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    constrain_norm(model, weight=(0.5, 1.5), bias=(-0.25, None))
    for name, parameter in model.named_parameters():
        limits = {"1.weight": (0.5, 1.5), "1.bias": (-0.25, None), "1.rho": (0.0, 1.0)}.get(name)
        assert torch.equal(parameter, before[name].clamp(*limits) if limits else before[name]), name


def test_the_penaltys_gradient_pulls_to_one_and_zero():
    layer = BatchNorm(2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([3.0, 1.0]))
        layer.bias.copy_(torch.tensor([-2.0, 0.0]))
    norm_penalty(layer, weight=0.5, bias=0.1).backward()
    assert torch.equal(layer.weight.grad, torch.tensor([2.0, 0.0]))
    torch.testing.assert_close(layer.bias.grad, torch.tensor([-0.4, 0.0]))
    layer.zero_grad()
    norm_penalty(layer, weight=0.5, bias=0.1, power=1).backward()
    assert torch.equal(layer.weight.grad, torch.tensor([0.5, 0.0]))
    torch.testing.assert_close(layer.bias.grad, torch.tensor([-0.1, 0.0]))


def test_shared_layers_and_parameters_count_once():
    shared, other = BatchNorm(4, weight_init=3.0), nn.LayerNorm(4)
    other.weight = shared.weight
    assert norm_penalty(nn.Sequential(shared, shared, other), weight=1.0) == 16


def test_half_precision_is_summed_in_float32():
    layer = BatchNorm(4096, dtype=torch.bfloat16, weight_init=1.125)
    penalty = norm_penalty(layer, weight=1.0)
    assert penalty.dtype == torch.float32
    assert penalty == 4096 / 64
    penalty.backward()
    assert layer.weight.grad.dtype == torch.bfloat16


def test_a_model_without_norms_has_no_penalty():
    assert norm_penalty(nn.Linear(2, 2)) == 0
    constrain_norm(nn.Linear(2, 2), weight=(0, 0))


def test_the_optimizers_hook_keeps_the_bounds_in_a_bare_loop():
    layer = BatchNorm(1, dtype=torch.float64)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.4)
    optimizer.register_step_post_hook(lambda *_: constrain_norm(layer, weight=(0, None)))
    weights = []
    for _ in range(4):
        optimizer.zero_grad()
        layer.weight.sum().backward()
        optimizer.step()
        weights.append(layer.weight.item())
    assert weights == [pytest.approx(0.6), pytest.approx(0.2), 0, 0]


def test_what_cannot_be_meant_is_refused():
    with pytest.raises(ValueError, match=r"power must be at least 1, got 0\.5"):
        norm_penalty(BatchNorm(2), power=0.5)
    with pytest.raises(ValueError, match=r"weight are \(2, 1\), low above high"):
        constrain_norm(BatchNorm(2), weight=(2, 1))


@pytest.mark.parametrize(
    ("norm", "expected"),
    [
        (BatchRenorm(4), []),
        (BatchNorm(4), ["RenormSchedule has nothing to do: the model has no bnlight.norm.BatchRenorm"]),
        (
            nn.Identity(),
            ["RenormSchedule has nothing", "PenalizeNorm has nothing to do: no norm in the model"],
        ),
    ],
    ids=["renorm", "batch", "none"],
)
def test_in_a_sweep_over_norms_a_callback_without_its_layers_warns_and_trains(norm, expected):
    module = Module(norm)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        callbacks = [RenormSchedule(), PenalizeNorm(), ConstrainNorm(weight=(0, None))]
        run = trainer(*callbacks, max_epochs=1)
        run.fit(module, loader())
    messages = [str(w.message) for w in caught if "has nothing to do" in str(w.message)]
    assert [m[: len(e)] for m, e in zip(messages, expected, strict=True)] == expected
    assert run.global_step == 7


@pytest.mark.parametrize("callback", [RenormSchedule, PenalizeNorm, ConstrainNorm])
def test_a_config_file_names_every_argument_with_its_default(callback):
    name = re.sub("(?<=.)([A-Z])", r"_\1", callback.__name__).lower()
    path = Path(bnlight.conf.__path__[0]) / "callbacks" / f"{name}.yaml"
    config = OmegaConf.to_container(OmegaConf.load(path)[name], resolve=True)
    assert config.pop("_target_") == f"bnlight.callbacks.{callback.__name__}"
    defaults = {key: p.default for key, p in inspect.signature(callback).parameters.items()}
    assert {key: tuple(v) if isinstance(v, list) else v for key, v in config.items()} == defaults


def test_the_schedules_defaults_are_those_of_its_function():
    callback, function = (inspect.signature(f).parameters for f in (RenormSchedule, renorm_schedule))
    shared = callback.keys() & function.keys() - {"total_steps"}
    assert len(shared) == 5
    assert all(callback[key].default == function[key].default for key in shared)
