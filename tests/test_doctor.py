"""Each check of the doctor fires on a guilty model and is silent on an innocent one."""

import doctest
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from zoo import ZOO

import bnlight
from bnlight import diagnose, doctor
from bnlight.data import Digits
from bnlight.doctor import Finding
from bnlight.doctor.training import distinct_by_chance
from bnlight.models import CNN, MLP, ResNet
from bnlight.norm import (
    NORMS,
    BatchNorm,
    BatchRenorm,
    FullNorm,
    GroupNorm,
    InstanceNorm,
    LayerNorm,
    MeanOnlyBatchNorm,
    RMSNorm,
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def found(model: nn.Module, *args: Any, **options: Any) -> dict[str, Finding]:
    findings = diagnose(model, *args, **options)
    assert len({finding.check for finding in findings}) == len(findings)  # a line each
    return {finding.check: finding for finding in findings}


def conv(norm: Callable[[int], nn.Module], channels: int = 4, **options: Any) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1, bias=False), norm(channels), nn.ReLU(), **options
    )


def images(number: int, size: int = 8) -> Tensor:
    return torch.randn(number, 3, size, size)


def data(number: int, classes: int = 10) -> TensorDataset:
    return TensorDataset(images(number, 4), torch.arange(number) % classes)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, BatchNorm, nn.SyncBatchNorm, MeanOnlyBatchNorm])
def test_few_samples(norm: Any) -> None:
    finding = found(conv(norm), images(4))["few_values"]
    assert finding.severity == "warning"
    assert finding.layers == ("1",)
    assert "4 samples, 256 values per channel" in finding.problem
    assert "few_values" not in found(conv(norm), images(8))


def test_few_values_of_many_samples_and_of_virtual_batches() -> None:
    rows = nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4))
    assert "12 samples, 12 values" in found(rows, torch.randn(12, 3))["few_values"].problem
    assert found(rows, torch.randn(16, 3)) == {}
    ghost = conv(lambda c: BatchNorm(c, virtual_batch_size=4))
    assert "4 samples, 256 values" in found(ghost, images(32))["few_values"].problem
    assert "few_values" not in found(conv(lambda c: BatchNorm(c, virtual_batch_size=16)), images(32))


def test_synchronized_ranks_count_together_and_local_ones_do_not() -> None:
    local = found(conv(nn.BatchNorm2d), images(4), devices=4)
    assert "sync=world" in local["few_values"].remedy
    assert local["local_statistics"].severity == "note"
    assert "sync=world" in local["local_statistics"].remedy
    for model in (
        conv(nn.SyncBatchNorm),
        bnlight.sync_norm(conv(nn.BatchNorm2d)),
        bnlight.sync_norm(conv(BatchNorm)),
    ):
        assert found(model, images(4), devices=4) == {}
    assert found(conv(GroupNorm), images(4), devices=4) == {}
    assert "local_statistics" not in found(conv(nn.BatchNorm2d), images(8))


@pytest.mark.parametrize("norm", [BatchRenorm, FullNorm, GroupNorm, LayerNorm, NORMS["batch_layer"]])
def test_norms_made_for_small_batches_are_left_in_peace(norm: Any) -> None:
    assert found(conv(norm), images(2), accumulate=4) == {}


def test_a_frozen_norm_needs_no_batch() -> None:
    model = conv(nn.BatchNorm2d)
    model[1].eval()
    assert found(model, images(1), accumulate=4, devices=2) == {}
    assert "few_values" in found(model.eval(), images(2))  # which is not frozen: everything is in evaluation


def test_accumulation() -> None:
    finding = found(conv(nn.BatchNorm2d), images(16), accumulate=4)["accumulation"]
    assert "4 batches" in finding.problem
    assert "16 samples, not by 64" in finding.problem
    assert found(conv(nn.BatchNorm2d), images(16)) == {}
    assert found(conv(nn.BatchNorm2d), images(32), accumulate=4) == {}
    assert found(conv(GroupNorm), images(16), accumulate=4) == {}


class SharedNorm(nn.Module):
    def __init__(self, second: nn.Module) -> None:
        super().__init__()
        self.norm, self.second = nn.BatchNorm2d(3), second

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.second(self.norm(x)))


class Siamese(nn.Module):
    """The same network for two inputs: its norms see data of one kind twice."""

    def __init__(self) -> None:
        super().__init__()
        self.net = conv(nn.BatchNorm2d)

    def forward(self, x: Tensor) -> Tensor:
        one, other = x.chunk(2)
        return self.net(one) - self.net(other)


def test_one_layer_for_different_data() -> None:
    finding = found(SharedNorm(nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU())), images(16))["shared_layer"]
    assert finding.layers == ("norm",)
    assert "shared_layer" not in found(Siamese(), images(32))
    net = conv(nn.BatchNorm2d)
    twice = lambda model, batch: (model(batch), model(batch * 5))  # two forwards, not one # noqa: E731
    assert "shared_layer" not in found(net, images(16), forward=twice)


class Checkpointed(nn.Module):
    def __init__(self, norm: Any, reentrant: bool, use: bool = True) -> None:
        super().__init__()
        self.body, self.reentrant, self.use = conv(norm), reentrant, use

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, x, use_reentrant=self.reentrant) if self.use else self.body(x)


@pytest.mark.parametrize("reentrant", [True, False])
def test_torchs_norms_count_a_checkpointed_batch_twice_and_the_doctor_says_so(reentrant: bool) -> None:
    x = images(16).requires_grad_()
    for norm, times in ((nn.BatchNorm2d, 2), (BatchNorm, 1)):
        model = Checkpointed(norm, reentrant)
        model(x).sum().backward()
        assert model.body[1].num_batches_tracked == times
        assert ("checkpointed" in found(Checkpointed(norm, reentrant), images(16))) == (times == 2)
    assert found(Checkpointed(nn.BatchNorm2d, reentrant, use=False), images(16)) == {}
    sequence = lambda model, batch: checkpoint_sequential(model, 3, batch, use_reentrant=False)  # noqa: E731
    assert "checkpointed" in found(conv(nn.BatchNorm2d), images(16), forward=sequence)


def test_frozen_parameters_with_moving_averages() -> None:
    model = nn.Sequential(conv(nn.BatchNorm2d), nn.Flatten(), nn.Linear(256, 2))
    model[0].requires_grad_(False)
    before = model[0][1].running_mean.clone()
    model(images(16))
    assert not torch.equal(model[0][1].running_mean, before)  # what torch does
    finding = found(model, images(16))["frozen_moves"]
    assert finding.layers == ("0.1",)
    assert "freeze_norm" in finding.remedy
    bnlight.freeze_norm(model[0])
    assert found(model, images(16)) == {}


def test_trained_layers_around_a_fixed_affine_are_not_frozen() -> None:
    model = conv(nn.BatchNorm2d)
    model[1].requires_grad_(False)
    assert found(model, images(16)) == {}
    assert "frozen_moves" not in found(
        conv(nn.BatchNorm2d).requires_grad_(False), images(16)
    )  # nothing trains


def test_dropout_before_a_batch_norm() -> None:
    torch.manual_seed(0)
    direct = nn.Sequential(
        nn.Linear(3, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 8), nn.ReLU(), nn.BatchNorm1d(8)
    )
    x = torch.randn(512, 3)
    for _ in range(200):
        direct(x)
    hidden = direct[:5].eval()(
        x
    )  # the variance of evaluation is smaller than that of training: the shift is real
    assert (hidden.var(0) / direct[5].running_var)[direct[5].running_var > 1e-3].mean() < 0.95
    finding = found(direct.train(), x)["dropout_before"]
    assert finding.layers == ("5",)
    assert "(2, p=0.5)" in finding.problem


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(3, 8, bias=False), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2)),
        nn.Sequential(nn.Dropout(0.05), nn.Linear(3, 8, bias=False), nn.BatchNorm1d(8)),
        nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 8), nn.LayerNorm(8)),
        nn.Sequential(nn.Dropout(0.5).eval(), nn.Linear(3, 8, bias=False), nn.BatchNorm1d(8)),
        nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 8, bias=False), BatchNorm(8).eval()),
    ],
    ids=["behind", "small", "layer norm", "off", "frozen"],
)
def test_dropout_that_shifts_no_variance(model: nn.Module) -> None:
    assert found(model, torch.randn(64, 3)) == {}


class Branches(nn.Module):
    """Dropout in one branch and a norm in another: neither gets what the other returns."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5))
        self.right = nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) + self.right(x)


def test_dropout_in_another_branch_and_behind_another_norm() -> None:
    assert found(Branches(), torch.randn(32, 3)) == {}
    chain = CNN((3, 8, 8), 5, nn.BatchNorm2d, dropout=0.2, widths=(4, 8))
    assert found(chain, images(16))["dropout_before"].layers == (
        "features.9",
    )  # only the first one behind it


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.GroupNorm(4, 4), (8, 4)),
        (GroupNorm(4, num_groups=4), (8, 4, 1, 1)),
        (nn.InstanceNorm2d(4), (8, 4, 1, 1)),
        (InstanceNorm(4), (8, 4, 1)),
        (nn.LayerNorm(1), (8, 4, 1)),
        (LayerNorm(1, over="channels"), (8, 1, 5)),
        (nn.RMSNorm(1), (8, 1)),
        (RMSNorm(1), (8, 1, 3)),
    ],
    ids=lambda value: str(value),
)
@pytest.mark.filterwarnings("ignore:.*each group has one value")
def test_groups_of_one_value(norm: nn.Module, shape: tuple[int, ...]) -> None:
    finding = found(nn.Sequential(nn.Identity(), norm), torch.randn(shape))["one_value_groups"]
    assert finding.layers == ("1",)
    wide = tuple(2 * size if axis > 1 else size for axis, size in enumerate(shape))
    if len(shape) > 2 and not isinstance(norm, nn.LayerNorm) and getattr(norm, "over", "") != "channels":
        assert found(nn.Sequential(nn.Identity(), norm), torch.randn(wide)) == {}


def test_a_bias_that_a_norm_subtracts() -> None:
    for norm in (nn.BatchNorm2d, nn.InstanceNorm2d, BatchNorm, InstanceNorm, BatchRenorm):
        model = nn.Sequential(nn.Conv2d(3, 4, 1), norm(4))
        finding = found(model, images(16))["redundant_bias"]
        assert (finding.layers, finding.severity) == (("0",), "note")
    for norm in (nn.GroupNorm(2, 4), FullNorm(4), LayerNorm(4)):
        assert found(nn.Sequential(nn.Conv2d(3, 4, 1), norm), images(16)) == {}
    assert found(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)), images(16)) == {}
    assert found(nn.Sequential(nn.Conv2d(3, 4, 1), BatchNorm(4).eval()), images(16)) == {}
    positions = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))
    assert found(positions, torch.randn(16, 5, 3)) == {}  # the norm's channels are another axis
    assert "redundant_bias" in found(positions, torch.randn(16, 3))
    assert "redundant_bias" in found(positions)  # without a batch, (N, C)


class Branching(nn.Module):
    """The bias reaches the output beside the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y) + y


def test_a_bias_that_goes_elsewhere_too_has_an_effect() -> None:
    assert found(Branching(), images(16)) == {}


def test_weight_decay_on_norms() -> None:
    model = conv(nn.BatchNorm2d)
    guilty = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=1e-4)
    finding = found(model, optimizer=guilty)["decayed_norms"]
    assert (finding.layers, finding.severity) == (("1",), "note")
    plain = {*bnlight.norm_parameters(model)}
    groups = [
        {"params": [p for p in model.parameters() if p not in plain]},
        {"params": [*plain], "weight_decay": 0.0},
    ]
    assert found(model, optimizer=torch.optim.SGD(groups, lr=0.1, weight_decay=1e-4)) == {}
    assert found(model, optimizer=torch.optim.Adam(model.parameters())) == {}
    assert "decayed_norms" in found(
        model, optimizer=[torch.optim.Adam(plain), torch.optim.AdamW(model.parameters())]
    )


def test_a_last_batch_of_one() -> None:
    rows = nn.Sequential(nn.Flatten(), nn.Linear(48, 4, bias=False), nn.BatchNorm1d(4))
    pixels = conv(nn.BatchNorm2d)
    guilty = DataLoader(data(33), batch_size=16, shuffle=True)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        [rows(x) for x, _ in guilty]
    assert "stops the training" in found(rows, loader=guilty)["last_batch"].problem
    assert "normalized by itself" in found(pixels, loader=guilty)["last_batch"].problem
    for innocent in (
        DataLoader(data(33), batch_size=16, shuffle=True, drop_last=True),
        DataLoader(data(32), batch_size=16, shuffle=True),
        DataLoader(data(34), batch_size=16, shuffle=True),
    ):
        assert found(rows, loader=innocent) == {}
    assert "last_batch" not in found(conv(GroupNorm), loader=guilty)
    assert "last_batch" not in found(rows, batch=images(16, 4), loader=DataLoader(data(3), batch_size=1))


def test_the_last_batch_of_a_rank() -> None:
    pixels, whole = conv(nn.BatchNorm2d), data(65)
    assert "last_batch" in found(pixels, loader=DataLoader(whole, batch_size=32, shuffle=True))
    sampler = DistributedSampler(whole, num_replicas=2, rank=0)  # 33 each
    assert "last_batch" in found(pixels, loader=DataLoader(whole, batch_size=32, sampler=sampler), devices=2)
    assert "last_batch" in found(pixels, loader=DataLoader(whole, batch_size=32, shuffle=True), devices=2)
    assert "last_batch" not in found(
        pixels, loader=DataLoader(whole, batch_size=31, sampler=sampler), devices=2
    )


def sorted_data(number: int, classes: int) -> TensorDataset:
    return TensorDataset(images(number, 4), torch.arange(number) * classes // number)


class Unlabelled(torch.utils.data.Dataset):
    """Hides its labels, so that only the batches show them."""

    def __init__(self, inner: TensorDataset) -> None:
        self.inner = inner

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> Any:
        return self.inner[index]


def test_batches_sorted_by_class() -> None:
    model = conv(nn.BatchNorm2d)
    for classes in (2, 10):
        guilty = sorted_data(320, classes)
        finding = found(model, loader=DataLoader(guilty, batch_size=16))["class_sorted"]
        assert "shuffle=True" in finding.remedy
        assert found(model, loader=DataLoader(guilty, batch_size=16, shuffle=True)) == {}
        assert found(conv(GroupNorm), loader=DataLoader(guilty, batch_size=16)) == {}
    assert "class_sorted" in found(model, loader=DataLoader(Unlabelled(sorted_data(320, 10)), batch_size=16))


@pytest.mark.parametrize("classes", [1, 2, 3, 10, 100])
@pytest.mark.parametrize("size", [8, 16, 64])
def test_shuffled_batches_are_never_called_sorted(classes: int, size: int) -> None:
    model = conv(nn.BatchNorm2d)
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        shares = torch.rand(classes, generator=generator) ** 3 + 1e-3  # of very unequal classes
        labels = torch.multinomial(shares, 40 * size, replacement=True, generator=generator)
        whole = TensorDataset(images(len(labels), 1), labels)
        for each in (whole, Unlabelled(whole)):
            loader = DataLoader(each, batch_size=size, shuffle=True, generator=generator)
            assert "class_sorted" not in found(model, images(16), loader=loader)


def test_what_is_no_class_is_not_counted() -> None:
    model = conv(nn.BatchNorm2d)
    for labels in (torch.rand(64), torch.zeros(64, 4, 4).long(), torch.arange(64)):
        whole = TensorDataset(images(64, 4), labels)
        assert found(model, loader=DataLoader(whole, batch_size=16)) == {}


def test_classes_by_chance_are_those_of_a_simulation() -> None:
    share = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    draws = torch.multinomial(share, 6 * 20_000, replacement=True).view(-1, 6)
    counts = torch.stack([(draws == c).any(1) for c in range(4)]).sum(0).double()
    mean, variance = distinct_by_chance(share, 6)
    assert mean == pytest.approx(float(counts.mean()), rel=0.01)
    assert variance == pytest.approx(float(counts.var()), rel=0.05)


INNOCENT = {
    "cnn": lambda norm: (CNN((3, 8, 8), 5, norm, widths=(8,)), (16, 3, 8, 8)),
    "resnet": lambda norm: (ResNet((3, 8, 8), 5, norm, depth=8), (16, 3, 8, 8)),
    "mlp": lambda norm: (MLP((6,), 5, norm), (16, 6)),
}


@pytest.mark.parametrize("name", INNOCENT)
@pytest.mark.parametrize("norm", sorted(set(NORMS) - {"instance", "batch_instance", "frn"}))
def test_our_networks_are_found_healthy(name: str, norm: str) -> None:
    model, shape = INNOCENT[name](NORMS[norm])
    decayed = set(model.parameters()) - {*bnlight.norm_parameters(model)}
    optimizer = torch.optim.SGD(
        [{"params": [*decayed]}, {"params": [*bnlight.norm_parameters(model)], "weight_decay": 0}],
        lr=0.1,
        weight_decay=1e-4,
    )
    assert found(model, torch.randn(shape), optimizer=optimizer) == {}


def test_our_data_are_found_healthy() -> None:
    data = Digits(batch_size=16)
    data.setup()
    assert found(CNN((1, 8, 8), 10, nn.BatchNorm2d, widths=(8,)), loader=data.train_dataloader()).keys() <= {
        "redundant_bias"
    }


@pytest.mark.parametrize("name", sorted(set(ZOO) - {"lazy"}))
def test_looking_at_the_zoo_changes_nothing(name: str) -> None:
    model, x = ZOO[name]()
    state = {key: (t._version, t.clone()) for key, t in model.state_dict().items()}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    modes = [m.training for m in model.modules()]
    numbers = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    findings = diagnose(model, x, loader=DataLoader(TensorDataset(x, torch.arange(len(x))), shuffle=True))
    assert "forward" not in {finding.check for finding in findings}
    assert all(
        t._version == v and torch.equal(t, old)
        for t, (v, old) in zip(model.state_dict().values(), state.values(), strict=True)
    )
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert modes == [m.training for m in model.modules()]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(numbers[0], torch.get_rng_state())
    assert numbers[1] == random.getstate()
    assert (numbers[2] == np.random.get_state()[1]).all()


def test_users_hooks_are_not_called() -> None:
    model, seen = conv(nn.BatchNorm2d), []
    model[1].register_forward_hook(lambda *_: seen.append(1))
    diagnose(model, images(16))
    assert seen == []


def test_a_forward_that_fails_is_said_and_what_was_seen_counts() -> None:
    model = nn.Sequential(conv(nn.BatchNorm2d), nn.Linear(3, 3))
    findings = found(model, images(4))
    assert "RuntimeError" in findings["forward"].problem
    assert findings["forward"].severity == "note"
    assert findings["few_values"].layers == ("0.1",)
    assert "forward=lambda" in found(model, {"x": images(4)})["forward"].problem
    assert "few_values" in found(
        conv(nn.BatchNorm2d), {"x": images(4)}, forward=lambda m, batch: m(batch["x"])
    )


def test_the_diagnosis_prints_warnings_first_and_every_layer_in_words() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)) for _ in range(6)))
    diagnosis = diagnose(model, images(2))
    assert [finding.severity for finding in diagnosis] == ["warning", "note"]
    assert len(diagnosis.warnings) == 1
    printed = str(diagnosis)
    assert printed.startswith("warning  few_values\n  what   batch statistics of 2 samples")
    assert "remedy Use larger batches" in printed
    assert max(map(len, printed.splitlines())) <= 100
    assert "(in 0.1, 1.1, 2.1 and 3 more)" in str(diagnosis[0])
    assert str(diagnose(conv(GroupNorm), images(2))) == "Nothing found."


def test_the_example_runs() -> None:
    result = doctest.testmod(doctor)
    assert result.attempted
    assert result.failed == 0


def test_what_is_synchronized_already_is_not_told_to_be_and_renorm_not_to_take_other_statistics() -> None:
    model = bnlight.sync_norm(conv(BatchNorm))
    finding = found(model, images(2), devices=2)["few_values"]
    assert "4 samples" in finding.problem
    assert "sync" not in finding.remedy
    dropped = nn.Sequential(nn.Dropout(0.5), BatchRenorm(3)).train()
    assert "precise_statistics" not in found(dropped, images(16))["dropout_before"].remedy
    dropped = nn.Sequential(nn.Dropout(0.5), BatchNorm(3)).train()
    assert "precise_statistics" in found(dropped, images(16))["dropout_before"].remedy
