"""torch's batch norm layers over all ranks: what torch's converter does to a model, and what sync_norm does."""

import copy
import itertools
import pickle
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks, start
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from zoo import ZOO, BatchNormReLU

from bnlight import freeze_norm, precise_statistics, sync_norm, unsync_norm
from bnlight.norm import BatchNorm
from bnlight.norm.batch import BatchStatistics
from bnlight.surgery.synchronized import Synchronized

stock = nn.SyncBatchNorm.convert_sync_batchnorm


class DirectBatchNorm(nn.BatchNorm2d):
    """As timm's BatchNormAct2d: the formula written out again, with torch's function, and more behind it."""

    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        self.num_batches_tracked.add_(1)
        y = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps
        )
        return F.leaky_relu(y, 0.1)


class SyncBatchNormReLU(nn.SyncBatchNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class BatchNormReLU1d(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class ByHand(nn.BatchNorm2d):
    """Statistics that nobody can see from outside."""

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with start(2, tmp_path_factory.mktemp("two")) as two:
        yield two


# What torch's converter and Lightning's revert do, and ours beside it.


def test_torch_drops_hooks_and_ours_keeps_them():
    called = []

    def hooked() -> nn.Sequential:
        model = nn.Sequential(nn.BatchNorm1d(3))
        model[0].register_forward_hook(lambda *_: called.append(True))
        return model

    stock(hooked()).eval()(torch.randn(4, 3))
    assert not called
    sync_norm(hooked()).eval()(torch.randn(4, 3))
    assert called


def test_torch_loses_what_a_subclass_does_and_ours_keeps_it():
    x = torch.randn(4, 3, 2, 2)
    assert (stock(BatchNormReLU(3)).eval()(x) < 0).any()
    layer = sync_norm(BatchNormReLU(3))
    assert isinstance(layer, BatchNormReLU)
    assert (layer.eval()(x) >= 0).all()


def test_torch_converts_one_of_two_names_and_makes_two_of_one_shared_layer():
    def shared() -> nn.Module:
        layer = nn.BatchNorm1d(3)
        model = nn.Module()
        model.a = model.b = layer
        model.elsewhere = nn.Sequential(layer)
        return model

    theirs = stock(shared())
    assert isinstance(theirs.a, nn.SyncBatchNorm)
    assert not isinstance(theirs.b, nn.SyncBatchNorm)
    assert theirs.a is not theirs.elsewhere[0]
    mine = sync_norm(shared())
    assert mine.a is mine.b
    assert mine.a is mine.elsewhere[0]
    assert isinstance(mine.a, Synchronized)


def test_torch_makes_lazy_layers_of_no_channels_and_ours_become_what_they_would():
    x = torch.randn(4, 3)
    theirs = stock(nn.Sequential(nn.LazyBatchNorm1d()))
    assert theirs[0].num_features == 0
    mine = sync_norm(nn.Sequential(nn.LazyBatchNorm1d()))
    mine(x)
    assert isinstance(mine[0], nn.BatchNorm1d)
    assert isinstance(mine[0], Synchronized)
    assert mine[0].num_features == 3
    assert type(unsync_norm(mine)[0]) is nn.BatchNorm1d


def test_lightning_gives_back_another_class_in_training_mode_and_ours_the_layer_as_it_was():
    from pytorch_lightning.plugins.layer_sync import (
        TorchSyncBatchNorm,
        _BatchNormXd,
    )  # slow: not in each rank

    def model() -> nn.Sequential:
        return nn.Sequential(nn.BatchNorm2d(3).eval(), nn.BatchNorm2d(3))

    plugin = TorchSyncBatchNorm()
    theirs = plugin.revert(plugin.apply(model()))
    assert [type(layer) for layer in theirs] == [_BatchNormXd, _BatchNormXd]
    assert theirs[0].training  # it was frozen
    theirs(torch.randn(4, 3))  # and images are no longer checked
    mine = unsync_norm(sync_norm(model()))
    assert [type(layer) for layer in mine] == [nn.BatchNorm2d, nn.BatchNorm2d]
    assert not mine[0].training
    with pytest.raises(ValueError, match="expected 4D input"):
        mine(torch.randn(4, 3))


def of_a_process_group() -> list[Any]:
    group = dist.new_group([0, 1])
    theirs = stock(nn.Sequential(nn.BatchNorm1d(3)), group)
    before = theirs[0].process_group is group
    theirs = stock(theirs)
    mine = sync_norm(
        nn.Sequential(nn.BatchNorm1d(3), BatchNorm(3), nn.SyncBatchNorm(3, process_group=group)), group
    )
    mine = sync_norm(mine, timeout=5)
    kept = [layer.process_group is group for layer in mine]
    timeouts = [layer.meeting.timeout for layer in sync_norm(mine)]
    again = [layer.process_group for layer in sync_norm(unsync_norm(mine))]
    return [before, theirs[0].process_group, kept, timeouts, again[:2], again[2] is group]


def test_torch_forgets_the_process_group_at_a_second_conversion_and_ours_keeps_it(ranks):
    for seen in ranks.run(of_a_process_group):
        assert seen == [True, None, [True] * 3, [5] * 3, ["world", "world"], True]


def on_cpu() -> list[str]:
    x, errors = torch.randn(4, 3), []
    for make in (lambda: stock(nn.BatchNorm1d(3)), lambda: DistributedDataParallel(nn.SyncBatchNorm(3))):
        try:
            make()(x)
        except ValueError as error:
            errors.append(str(error))
    for layer in (nn.BatchNorm1d(3), nn.SyncBatchNorm(3)):
        y = DistributedDataParallel(sync_norm(layer))(x)
        errors.append(round(float(y.detach().double().mean()), 6))
    return errors


def test_torch_refuses_the_cpu_and_ours_runs_there_in_ddp(ranks):
    first, second, *means = ranks.run(on_cpu)[0]
    assert "expected input tensor to be on GPU" in first
    assert "SyncBatchNorm layers only work with GPU modules" in second
    assert len(means) == 2


# A zoo of models.


def nature(model: nn.Module) -> dict[str, Any]:
    """All that surgery must give back: objects, classes, flags, hooks, attributes."""
    found = {}
    for path, module in model.named_modules(remove_duplicate=False):
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        found[path] = (
            id(module),
            type(module),
            module.training,
            [(name, id(tensor), tensor.requires_grad) for name, tensor in tensors],
            {name for name in vars(module) if name not in ("_is_full_backward_hook",)},
            {name: list(hooks.items()) for name, hooks in vars(module).items() if "hooks" in name},
        )
    return found


def train_once(model: nn.Module, x: Tensor) -> list[Tensor]:
    torch.manual_seed(1)
    y = model(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
    return [y.detach(), *(p.grad for p in model.parameters() if p.grad is not None), *model.buffers()]


@pytest.mark.parametrize("name", ZOO)
def test_conversion_changes_nothing_that_can_be_seen_and_is_undone_without_a_trace(name):
    (model, x), (twin, _) = ZOO[name](), ZOO[name]()
    lazy = any(isinstance(p, nn.UninitializedParameter) for p in model.parameters())
    before, keys = nature(model), list(model.state_dict())
    assert sync_norm(model) is model
    once = nature(model)
    layers = [m for m in model.modules() if isinstance(m, BatchStatistics | _BatchNorm)]
    assert all(layer.process_group == "world" for layer in layers)
    assert [layer.meeting.layer for layer in layers] == [*range(len(layers))]
    sync_norm(model)
    assert nature(model) == once
    assert list(model.state_dict()) == keys
    if not lazy:
        modes = [module.training for module in model.modules()]
        for mine, theirs in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
            assert torch.equal(mine, theirs)
        with torch.no_grad():
            assert torch.equal(model.eval()(x), twin.eval()(x))
        for net in (model, twin):
            for module, mode in zip(net.modules(), modes, strict=True):
                module.training = mode
    for mine, theirs in zip(train_once(model, x), train_once(twin, x), strict=True):
        assert torch.equal(mine, theirs)  # one process: bit for bit
    unsync_norm(model)
    if not lazy:
        assert nature(model) == before
    else:
        assert [type(m) for m in model.modules()] == [type(m) for m in twin.modules()]
    assert all(getattr(layer, "process_group", None) is None for layer in layers)


def of_the_zoo(name: str) -> list[Tensor] | None:
    """What two ranks with parts of a batch compute, less what one process does with the whole."""
    model, x = ZOO[name]()
    if any(isinstance(p, nn.UninitializedParameter) for p in model.parameters()):
        model(x)
    model, x = model.double(), torch.cat([x, x.flip(-1) * 1.5 + 0.3])[: 2 * len(x) - 1].double()
    alone = copy.deepcopy(model)
    sync_norm(model)
    weights = torch.randn(x.shape[:1], dtype=x.dtype, generator=torch.Generator().manual_seed(0))
    sizes = [2, len(x) - 2]
    outputs = []
    for net, batch, weight in (
        (model, *(t.split(sizes)[dist.get_rank()] for t in (x, weights))),
        (alone, x, weights),
    ):
        batch = batch.clone().requires_grad_()
        y = net(batch)
        (y.square().flatten(1).sum(1) * weight).sum().backward()
        outputs.append((y.detach(), batch.grad))
    for mine, whole in zip(*outputs, strict=True):
        torch.testing.assert_close(mine, whole.split(sizes)[dist.get_rank()], rtol=1e-8, atol=1e-8)
    for (key, mine), theirs in zip(model.named_parameters(), alone.parameters(), strict=True):
        if mine.grad is not None:
            total = mine.grad.clone()
            dist.all_reduce(total)
            torch.testing.assert_close(total, theirs.grad, rtol=1e-7, atol=1e-7, msg=key)
    for (key, mine), theirs in zip(model.named_buffers(), alone.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10, msg=key)
    return [buffer.clone() for buffer in model.buffers()]


@pytest.mark.parametrize("name", ZOO)
def test_two_ranks_compute_what_one_process_does_with_the_joined_batch(ranks, name):
    first, second = ranks.run(of_the_zoo, name)
    for result in (first, second):
        assert isinstance(result, list), str(result) + str(getattr(result, "__notes__", ""))
    assert all(map(torch.equal, first, second))


# Layers one by one.

LAYERS = {
    "plain": lambda: nn.BatchNorm2d(4),
    "momentum None": lambda: nn.BatchNorm2d(4, momentum=None),
    "momentum 0": lambda: nn.BatchNorm2d(4, momentum=0.0),
    "no averages": lambda: nn.BatchNorm2d(4, track_running_stats=False),
    "not affine": lambda: nn.BatchNorm2d(4, affine=False),
    "subclass": lambda: BatchNormReLU(4),
    "direct call": lambda: DirectBatchNorm(4),
    "sync": lambda: nn.SyncBatchNorm(4),
    "sync subclass": lambda: SyncBatchNormReLU(4),
}
try:
    nn.BatchNorm2d(4, bias=False)
    LAYERS["no bias"] = lambda: nn.BatchNorm2d(4, bias=False)
except TypeError:  # before torch 2.13
    pass


def reference(name: str) -> nn.Module:
    """The layer in one process; torch's SyncBatchNorm would refuse the CPU."""
    if name.startswith("sync"):
        return nn.BatchNorm2d(4) if name == "sync" else BatchNormReLU(4)
    return LAYERS[name]()


def joined(step: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return (torch.randn(7, 4, 3, 2, generator=generator, dtype=torch.float64) * 2 + 3).to(dtype)


def in_parts(name: str, sizes: list[int], how: str) -> str:
    torch.manual_seed(0)
    layer, alone = LAYERS[name]().double(), reference(name).double()
    sync_norm(layer)
    if how in ("deepcopied", "pickled"):
        layer = copy.deepcopy(layer) if how == "deepcopied" else pickle.loads(pickle.dumps(layer))
    run = layer
    if how == "compiled":
        full = name != "momentum None"  # whose weight torch reads from a tensor
        run = torch.compile(layer, fullgraph=full, backend="aot_eager")
    elif how in ("reentrant", "not reentrant"):
        run = lambda x: checkpoint(layer, x, use_reentrant=how == "reentrant")  # noqa: E731
    for step in range(3):
        x = joined(step)
        if how == "channels last":
            x = x.contiguous(memory_format=torch.channels_last)
        part = x.split(sizes)[dist.get_rank()].clone().requires_grad_()
        whole = x.clone().requires_grad_()
        y, z = run(part), alone(whole)
        for out in (y, z):
            out.pow(3).sum().backward()
        torch.testing.assert_close(y, z.split(sizes)[dist.get_rank()], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(part.grad, whole.grad.split(sizes)[dist.get_rank()], rtol=1e-8, atol=1e-8)
        if how == "channels last" and len(part) > 1:
            assert y.is_contiguous(memory_format=torch.channels_last)
    for mine, theirs in zip(layer.parameters(), alone.parameters(), strict=True):
        total = mine.grad.clone()
        dist.all_reduce(total)
        torch.testing.assert_close(total, theirs.grad, rtol=1e-8, atol=1e-8)
    for mine, theirs in zip(layer.buffers(), alone.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
    return "equal"


def check(results: list[Any], expected: Any) -> None:
    for result in results:
        assert result == expected, str(result) + str(getattr(result, "__notes__", ""))


@pytest.mark.parametrize("sizes", [[4, 3], [7, 0], [1, 6]], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_each_layer_computes_what_it_would_with_the_joined_batch(ranks, name, sizes):
    check(ranks.run(in_parts, name, sizes, "plain"), "equal")


@pytest.mark.parametrize(
    ("how", "name"),
    [
        *itertools.product(
            ["reentrant", "not reentrant", "deepcopied", "pickled", "channels last"],
            ["plain", "momentum None", "subclass", "direct call", "sync", "sync subclass"],
        ),
        *itertools.product(["compiled"], ["plain", "momentum None", "subclass", "sync"]),
    ],
)
def test_however_it_is_called(ranks, how, name):
    check(ranks.run(in_parts, name, [4, 3], how), "equal")


def in_low_precision(how: str) -> str:
    x = joined(0, torch.float32)
    part = x.split([4, 3])[dist.get_rank()]
    layer, alone = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
    kind = torch.float16 if how == "half" else torch.bfloat16
    if how in ("half", "bfloat16"):
        layer, alone = layer.to(kind), alone.to(kind)
    part, x = part.to(kind), x.to(kind)
    sync_norm(layer)
    with torch.autocast("cpu", dtype=torch.bfloat16) if how == "autocast" else nullcontext():
        y, z = layer(part), alone(x)
    y.float().square().sum().backward()
    assert y.dtype == z.dtype
    torch.testing.assert_close(y, z.split([4, 3])[dist.get_rank()], rtol=2e-2, atol=2e-2)
    for mine, theirs in zip(layer.buffers(), alone.buffers(), strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-2)
    assert layer.weight.grad.dtype == layer.weight.dtype
    return "close"


@pytest.mark.parametrize("how", ["half", "bfloat16", "autocast"])
def test_low_precision_is_as_torchs(ranks, how):
    check(ranks.run(in_low_precision, how), "close")


def errors_of(x: Tensor, layer: nn.Module) -> str:
    try:
        sync_norm(nn.Sequential(nn.ModuleDict({"norm": layer}))[0])["norm"](x)
    except (ValueError, TypeError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def one_value() -> list[str]:
    rank = dist.get_rank()
    return [
        errors_of(torch.randn(rank, 3), nn.BatchNorm1d(3)),
        errors_of(torch.randn(1, 3), nn.BatchNorm1d(3)),
        errors_of(torch.randn(0, 3), nn.BatchNorm1d(3)),
    ]


def test_one_value_in_all_is_an_error_on_each_rank_and_one_on_each_is_none(ranks):
    for alone, each, none in ranks.run(one_value):
        assert "ValueError: synchronized layer 0 'norm': expected more than one value per channel" in alone
        assert each == none == "no error"


def no_values() -> list[bool]:
    layer = sync_norm(nn.BatchNorm1d(3))
    y = layer(torch.randn(0, 3, requires_grad=True))
    y.sum().backward()
    return [torch.equal(layer.running_mean, torch.zeros(3)), torch.equal(layer.running_var, torch.ones(3))]


def test_no_values_at_all_leave_the_averages(ranks):
    assert ranks.run(no_values) == [[True, True]] * 2


def by_hand() -> list[str]:
    x = torch.randn(4, 3, 2, 2)
    evaluated = sync_norm(ByHand(3)).eval()
    evaluated(x)
    return [errors_of(x, ByHand(3))]


def test_a_subclass_with_statistics_of_its_own_is_an_error_that_names_it(ranks):
    for (error,) in ranks.run(by_hand):
        assert "synchronized layer 0 'norm' is a ByHand, whose forward did not call" in error
        assert "bnlight.norm.BatchNorm" in error


def mixed_model() -> nn.Sequential:
    return sync_norm(nn.Sequential(nn.BatchNorm1d(3), BatchNorm(3), nn.BatchNorm1d(3)), timeout=5)


def in_other_layers() -> None:
    mixed_model()[dist.get_rank() + 1](torch.randn(4, 3))


def test_torchs_and_bnlights_layers_are_numbered_together_so_that_ranks_out_of_step_fail(ranks):
    for error in ranks.run(in_other_layers):
        assert isinstance(error, RuntimeError)
        assert "rank 0 is in forward call 1 of layer 1; rank 1 is in forward call 1 of layer 2" in str(error)


def counted(synchronized: bool) -> int:
    layer = nn.BatchNorm1d(3)
    if synchronized:
        sync_norm(layer)
    checkpoint(layer, torch.randn(4, 3, requires_grad=True), use_reentrant=False).sum().backward()
    return int(layer.num_batches_tracked)


def test_torch_counts_a_recomputed_batch_twice_and_ours_once(ranks):
    assert ranks.run(counted, False) == [2, 2]
    assert ranks.run(counted, True) == [1, 1]


def estimated() -> list[Tensor]:
    model = sync_norm(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), BatchNormReLU1d(3)))
    torch.manual_seed(dist.get_rank())
    precise_statistics(model, [torch.randn(8, 2) for _ in range(1 + dist.get_rank())])  # as many as each has
    assert isinstance(model[2], Synchronized)
    return [model[1].running_mean, model[2].running_var]


def test_statistics_are_estimated_with_synchronized_layers_too(ranks):
    torch.manual_seed(0)
    first, second = ranks.run(estimated)
    for mine, theirs in zip(first, second, strict=True):
        assert torch.equal(mine, theirs)
        assert not torch.equal(mine, torch.zeros(3))


def frozen_layers() -> list[Any]:
    model = sync_norm(
        nn.Sequential(nn.BatchNorm1d(3).eval(), freeze_norm(nn.BatchNorm1d(3)), nn.BatchNorm1d(3))
    )
    before = copy.deepcopy(model.state_dict())
    if dist.get_rank() == 0:  # no meeting: frozen layers ask nobody
        model[:2](torch.randn(4, 3))
    model(torch.randn(4, 3))
    return [all(torch.equal(before[k], v) for k, v in model[:2].state_dict().items())]


def test_layers_in_evaluation_mode_stay_frozen_and_meet_nobody(ranks):
    assert ranks.run(frozen_layers) == [[True]] * 2


def test_torchs_converter_after_ours_replaces_the_layers_as_it_always_does_and_ours_takes_them_back():
    model = sync_norm(nn.Sequential(nn.BatchNorm1d(3), BatchNorm(3)))
    stock(model)
    assert [type(layer) for layer in model] == [nn.SyncBatchNorm, BatchNorm]
    sync_norm(model)
    assert isinstance(model[0], Synchronized)
    assert type(unsync_norm(model)[0]) is nn.SyncBatchNorm


def test_what_sync_norm_takes_for_a_group():
    with pytest.raises(TypeError, match='must be "world" or a ProcessGroup, got None'):
        sync_norm(nn.BatchNorm1d(3), None)
    with pytest.raises(TypeError, match="or a ProcessGroup, got 3"):
        sync_norm(nn.BatchNorm1d(3), 3)


def test_a_class_put_over_a_synchronized_layer_is_an_error_when_it_is_taken_off():
    layer = sync_norm(nn.BatchNorm1d(3))
    nn.utils.parametrize.register_parametrization(layer, "weight", nn.Softplus())
    with pytest.raises(RuntimeError, match="parametrize before"):
        unsync_norm(layer)
