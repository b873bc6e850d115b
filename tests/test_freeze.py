"""Frozen norms: what freezes them elsewhere lets them move, freeze_norm does not."""

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from norm_table import CHANNELS, ROWS
from ranks import Ranks, start
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from zoo import ZOO

from bnlight import freeze_norm, sync_norm, unfreeze_norm, unsync_norm
from bnlight.norm import BatchNorm, Norm, NormLSTM
from bnlight.surgery import TORCH_NORMS
from bnlight.surgery.freeze import Frozen


def net(*norms: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 4), *norms, nn.Linear(4, 2))


def step(model: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """A step of training, as everybody's: train(), zeroed gradients, momentum and weight decay."""
    model.train()
    optimizer.zero_grad(set_to_none=False)
    y = model(x)
    y = y[0] if isinstance(y, tuple) else y
    y.square().mean().backward()
    optimizer.step()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)


def state_of_norms(model: nn.Module) -> dict[str, Tensor]:
    paths = [path for path, module in model.named_modules() if isinstance(module, (Norm, *TORCH_NORMS))]
    return {
        key: value.clone()
        for key, value in model.state_dict().items()
        if any(key.startswith(f"{path}." if path else "") for path in paths)
    }


def assert_equal(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert mine.keys() == theirs.keys()
    for key, value in mine.items():
        assert torch.equal(value, theirs[key]), key


def test_requires_grad_alone_lets_the_averages_move_and_eval_lasts_until_the_next_train():
    model = net(nn.BatchNorm1d(4), nn.BatchNorm1d(4))
    model[1].requires_grad_(False)
    model[2].requires_grad_(False).eval()
    before = state_of_norms(model)
    step(model, torch.randn(8, 6), optimizer_of(model))
    after = state_of_norms(model)
    assert not torch.equal(before["1.running_mean"], after["1.running_mean"])
    assert not torch.equal(before["2.running_mean"], after["2.running_mean"])
    assert torch.equal(before["1.weight"], after["1.weight"])


def test_lightnings_finetuning_trains_the_norms_it_is_told_to_freeze_and_ours_stand_still(tmp_path):
    import pytorch_lightning as pl

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.head = net(nn.BatchNorm1d(4)), nn.Linear(2, 2)

        def training_step(self, batch: Any, _: int) -> Tensor:
            return self.head(self.backbone(batch)).square().mean()

        def validation_step(self, batch: Any, _: int) -> None:
            self.head(self.backbone(batch))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            trained = [p for p in self.parameters() if p.requires_grad]
            return torch.optim.SGD(trained, lr=0.1)

    def moved(module: pl.LightningModule, *callbacks: pl.Callback) -> bool:
        before = state_of_norms(module)
        quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_checkpointing"), False)
        trainer = pl.Trainer(
            accelerator="cpu", max_epochs=1, callbacks=[*callbacks], default_root_dir=tmp_path, **quiet
        )
        trainer.fit(module, *(DataLoader(torch.randn(24, 6), batch_size=8) for _ in range(2)))
        return any(not torch.equal(value, before[key]) for key, value in state_of_norms(module).items())

    theirs = pl.callbacks.BackboneFinetuning(unfreeze_backbone_at_epoch=9, train_bn=False)
    assert moved(Module(), theirs)
    module = Module()
    freeze_norm(module.backbone)
    assert not moved(module)
    unfreeze_norm(module)
    assert all(
        m.training for m in module.modules()
    )  # though Lightning has put the flags back that it had read


def test_flags_that_were_read_and_put_back_are_no_wish_of_the_owner():
    model = freeze_norm(net(nn.BatchNorm1d(4), BatchNorm(4)))
    for mode in (True, False):
        model.train(mode)
        read = {module: module.training for module in model.modules()}
        model.train(not mode)
        for module, training in read.items():
            module.training = training
        assert {type(m): m.training for m in freeze_norm(unfreeze_norm(model)).modules()}[nn.Linear] is mode
        assert {m.training for m in unfreeze_norm(copy.deepcopy(model)).modules()} == {mode}
    alone = freeze_norm(nn.BatchNorm1d(4))
    alone.training = True
    assert not alone.training
    assert unfreeze_norm(alone).training


LAYERS = {name: (row.make, (8, CHANNELS, 3)) for name, row in ROWS.items()} | {
    "torch BatchNorm1d": (lambda: nn.BatchNorm1d(4), (8, 4, 3)),
    "torch BatchNorm2d": (lambda: nn.BatchNorm2d(4), (8, 4, 2, 2)),
    "torch SyncBatchNorm": (lambda: nn.SyncBatchNorm(4), (8, 4, 3)),
    "torch InstanceNorm1d": (lambda: nn.InstanceNorm1d(4, affine=True, track_running_stats=True), (8, 4, 3)),
    "torch GroupNorm": (lambda: nn.GroupNorm(2, 4), (8, 4, 3)),
    "torch LayerNorm": (lambda: nn.LayerNorm(3), (8, 4, 3)),
    "torch RMSNorm": (lambda: nn.RMSNorm(3), (8, 4, 3)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_every_norm_stands_still_to_the_bit_and_moves_again(name):
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(4, 4, 1) if len(shape) == 3 else nn.Conv2d(4, 4, 1), make())
    kind = next(model[1].buffers(), torch.zeros(0)).dtype
    model = model.to(torch.float64 if kind == torch.float64 else torch.float32)
    dtype = model[0].weight.dtype
    optimizer = optimizer_of(model)
    step(model, torch.randn(shape, dtype=dtype), optimizer)  # momentum, and gradients that stay
    before, weight = state_of_norms(model), model[0].weight.detach().clone()
    with torch.no_grad():
        x = torch.randn(shape, dtype=dtype)
        evaluated = model.eval()(x)
        model.train()
    freeze_norm(model)
    freeze_norm(model)
    if not isinstance(model[1], nn.modules.batchnorm._BatchNorm) or model[1].track_running_stats:
        with torch.no_grad():
            assert torch.equal(model(x), evaluated)  # in training as in evaluation
    for _ in range(5):
        step(model, torch.randn(shape, dtype=dtype), optimizer)
    assert_equal(state_of_norms(model), before)
    assert not torch.equal(model[0].weight, weight)  # the rest trains
    unfreeze_norm(model)
    for _ in range(2):
        step(model, torch.randn(shape, dtype=dtype), optimizer)
    after = state_of_norms(model)
    assert all(not torch.equal(after[key], before[key]) for key in before if key.endswith(("mean", "weight")))


def flags(model: nn.Module) -> list[Any]:
    return [
        [(type(m), m.training, {*vars(m)}) for m in model.modules()],
        [(name, id(p), p.requires_grad) for name, p in model.named_parameters(remove_duplicate=False)],
    ]


@pytest.mark.parametrize("name", ZOO)
def test_a_zoo_of_models_is_frozen_and_given_back_as_it_was(name):
    model, x = ZOO[name]()
    before, keys = flags(model), list(model.state_dict())
    assert freeze_norm(model) is model
    assert list(model.state_dict()) == keys
    norms = [module for module in model.modules() if isinstance(module, (Norm, *TORCH_NORMS))]
    if any(isinstance(p, nn.UninitializedParameter) for p in model.parameters()):
        model(x)
        assert [type(m) for m in norms if not isinstance(m, Frozen)] == []
        assert type(unfreeze_norm(model)[1]) is nn.BatchNorm2d
        return
    state, optimizer = state_of_norms(model), optimizer_of(model)
    step(model, x, optimizer)
    step(model, x, optimizer)
    assert_equal(state_of_norms(model), state)
    frozen_before = [not module[1] for module in before[0]]
    unfreeze_norm(model)
    if any(frozen_before):  # train() reached those too, as it does without us
        assert [kind for kind, *_ in flags(model)[0]] == [kind for kind, *_ in before[0]]
    else:
        assert flags(model)[0] == before[0]
    assert flags(model)[1] == before[1]


def test_modes_and_gradients_come_back_as_they_were_or_would_be_by_now():
    model = net(nn.BatchNorm1d(4), BatchNorm(4), nn.BatchNorm1d(4))
    model[2].eval()
    model[3].weight.requires_grad_(False)
    before = flags(model)
    assert flags(unfreeze_norm(freeze_norm(model))) == before
    freeze_norm(model).eval()
    assert not any(m.training for m in unfreeze_norm(model).modules())
    freeze_norm(model).train()
    assert all(m.training for m in unfreeze_norm(model).modules())
    assert flags(model)[1] == before[1]


def test_a_weight_that_two_norms_share_trains_again_whatever_was_frozen_first():
    model = net(nn.BatchNorm1d(4), nn.BatchNorm1d(4))
    model[2].weight = model[1].weight
    freeze_norm(model, include="1")
    freeze_norm(model, include="2")
    unfreeze_norm(model)
    assert model[2].weight.requires_grad


def test_what_a_frozen_subclass_contains_follows_the_mode():
    class WithDropout(nn.BatchNorm1d):
        def __init__(self) -> None:
            super().__init__(4)
            self.drop = nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.drop(super().forward(x))

    layer = freeze_norm(WithDropout()).train()
    assert (layer.training, layer.drop.training) == (False, True)
    assert (layer.eval().training, layer.drop.training) == (False, False)


@pytest.mark.parametrize("how", ["deepcopied", "pickled", "synchronized", "unsynchronized", "saved"])
def test_it_stays_frozen(how):
    model = freeze_norm(net(nn.BatchNorm1d(4), BatchNorm(4), nn.SyncBatchNorm(4)))
    if how == "deepcopied":
        model = copy.deepcopy(model)
    elif how == "pickled":
        model = pickle.loads(pickle.dumps(model))
    elif how == "synchronized":
        sync_norm(model)
    elif how == "unsynchronized":
        unsync_norm(sync_norm(model))
    else:
        model.load_state_dict(copy.deepcopy(model.state_dict()))
    before = state_of_norms(model)
    step(model, torch.randn(8, 6), optimizer_of(model))
    assert_equal(state_of_norms(model), before)
    unfreeze_norm(model)
    unsync_norm(model)
    assert [type(module) for module in model[1:4]] == [nn.BatchNorm1d, BatchNorm, nn.SyncBatchNorm]
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_part_of_a_model_is_chosen_by_paths():
    model = nn.ModuleDict({"backbone": net(BatchNorm(4), nn.LayerNorm(4)), "head": net(nn.BatchNorm1d(4))})

    def frozen() -> list[str]:
        return [path for path, module in model.named_modules() if isinstance(module, Frozen)]

    freeze_norm(model, include="backbone.*", exclude=["*.2"])
    assert frozen() == ["backbone.1"]
    freeze_norm(model["head"])
    assert frozen() == ["backbone.1", "head.1"]
    unfreeze_norm(model["head"])
    assert frozen() == ["backbone.1"]
    with pytest.raises(ValueError, match=r"freeze_norm: 'neck.\*' matches none of the layers backbone.1, "):
        freeze_norm(model, include="neck.*")


def test_statistics_alone_can_be_frozen():
    model = freeze_norm(net(nn.BatchNorm1d(4)), affine=False)
    before = state_of_norms(model)
    step(model, torch.randn(8, 6), optimizer_of(model))
    after = state_of_norms(model)
    assert torch.equal(before["1.running_mean"], after["1.running_mean"])
    assert not torch.equal(before["1.weight"], after["1.weight"])


def test_an_lstms_norms_stand_still_at_every_step():
    model = NormLSTM(3, 4, norm="batch", max_length=5, batch_first=True)
    optimizer = optimizer_of(model)
    step(model, torch.randn(8, 2, 3), optimizer)  # steps 2, 3, 4 have never had a batch
    freeze_norm(model)
    before = state_of_norms(model)
    step(model, torch.randn(8, 4, 3), optimizer)
    assert_equal(state_of_norms(model), before)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's, of its own scripts
def test_scripted_norms_cannot_be_changed_and_a_warning_says_so():
    model = nn.Sequential(torch.jit.script(nn.Sequential(nn.BatchNorm1d(3))), nn.BatchNorm1d(3))
    for change, name in ((freeze_norm, "freeze_norm"), (sync_norm, "sync_norm")):
        with pytest.warns(UserWarning, match=rf"{name}: scripted norms cannot be changed, so '0\.0' stay"):
            change(model)
    assert isinstance(model[1], Frozen)
    freeze_norm(model, include="1")
    sync_norm(nn.Sequential(torch.jit.script(nn.LayerNorm(3))))


def test_a_model_without_norms_is_left_alone():
    model = nn.Sequential(nn.Linear(2, 2))
    before = flags(model)
    assert flags(unfreeze_norm(freeze_norm(model))) == before


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with start(2, tmp_path_factory.mktemp("two")) as two:
        yield two


def in_ddp(when: str) -> bool:
    torch.manual_seed(torch.distributed.get_rank())
    model = net(nn.BatchNorm1d(4), BatchNorm(4))
    if when == "before":
        freeze_norm(model)
    wrapped = DistributedDataParallel(model, find_unused_parameters=when == "unused")
    optimizer = optimizer_of(model)
    if when != "before":
        for _ in range(2):
            step(wrapped, torch.randn(8, 6), optimizer)
        freeze_norm(wrapped if when != "inside" else model, affine=when != "statistics")
    step(wrapped, torch.randn(8, 6), optimizer)  # DDP gives all ranks the averages of rank 0
    before = state_of_norms(model)
    for _ in range(3):
        step(wrapped, torch.randn(8, 6), optimizer)
    after = state_of_norms(model)
    return all(torch.equal(v, after[k]) for k, v in before.items() if when != "statistics" or "running" in k)


@pytest.mark.parametrize("when", ["before", "unused", "statistics"])
def test_norms_stand_still_under_ddp(ranks, when):
    assert ranks.run(in_ddp, when) == [True, True]


def test_ddp_that_counts_on_the_gradients_is_an_error_at_once(ranks):
    for error in ranks.run(in_ddp, "after"):
        assert isinstance(error, RuntimeError)
        assert "freeze before wrapping the model" in str(error)
    for error in ranks.run(in_ddp, "inside"):  # of which we cannot know, but torch says so
        assert isinstance(error, RuntimeError)
        assert "Expected to have finished reduction" in str(error)
