"""replace_norm puts other norms into a model: which layers it takes, what makes the new ones; or it changes nothing."""

import copy
import doctest
import functools
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from zoo import BatchNormReLU

from bnlight import replace_norm, sync_norm
from bnlight.norm import NORMS, BatchNorm, GroupNorm, MeanOnlyBatchNorm, NormLSTM, RMSNorm, from_keras
from bnlight.surgery import replace, replace_report

# What makes the new layers


def test_a_factory_is_a_class_a_partial_or_a_function():
    def build(channels, eps=1.0):
        return nn.GroupNorm(channels // 2, channels, eps=eps)

    for norm, eps, groups in (
        (functools.partial(nn.GroupNorm, 8), 1e-3, 8),
        (functools.partial(nn.GroupNorm, 8, eps=1e-2), 1e-2, 8),
        (lambda channels: nn.GroupNorm(4, channels), 1e-5, 4),
        (build, 1e-3, 4),
        (functools.partial(GroupNorm, num_groups=2), 1e-3, 2),
        (functools.partial(GroupNorm, num_groups=2, bias=True), 1e-3, 2),
    ):
        model = nn.Sequential(nn.BatchNorm2d(8, eps=1e-3))
        weight, bias = model[0].weight, model[0].bias
        row = replace_norm(model, norm).rows[0]
        assert model[0].bias is bias
        assert (model[0].eps, model[0].num_groups) == (eps, groups)
        assert model[0].weight is weight
        assert ("eps" in row.carried) == (eps == 1e-3)
        assert ("eps=0.001" in row.dropped) == (eps != 1e-3)


def test_a_factory_learns_where_the_channels_are():
    model = nn.Sequential(nn.LayerNorm(8), nn.BatchNorm2d(8))
    replace_norm(model, functools.partial(RMSNorm))
    assert [m.channel_dim for m in model] == [-1, 1]
    with pytest.raises(
        ValueError, match=r"'0' \(LayerNorm\) has its channels on axis -1, but GroupNorm on axis 1"
    ):
        replace_norm(nn.Sequential(nn.LayerNorm(8)), functools.partial(nn.GroupNorm, 2))
    model = nn.Sequential(nn.LayerNorm(8, eps=1e-3), nn.BatchNorm1d(8))
    replace_norm(model, nn.RMSNorm)
    assert [type(m) for m in model] == [nn.RMSNorm] * 2
    assert model[0].eps == 1e-3


class NormAct(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm, self.act = BatchNorm(channels), nn.ReLU()

    def forward(self, x):
        return self.act(self.norm(x))


@pytest.mark.parametrize("norm", [NormAct, lambda channels: nn.Sequential(BatchNorm(channels), nn.ReLU())])
def test_a_module_with_a_norm_inside_takes_its_place_once(norm):
    model = sync_norm(nn.Sequential(nn.BatchNorm2d(4)).eval())
    weight, mean = model[0].weight, model[0].running_mean
    row = replace_norm(model, norm).rows[0]
    inner = next(m for m in model.modules() if isinstance(m, BatchNorm))
    assert (inner.weight is weight, inner.running_mean is mean, inner.training) == (True, True, False)
    assert inner.process_group == "world"
    assert row.fresh == ()
    layers = [*model.modules()]
    for other in (norm, "group"):
        assert not replace_norm(copy.deepcopy(model), other).replaced
    assert [*model.modules()] == layers


def test_keras_layers_are_replaced_too():
    model = nn.Sequential(from_keras({"epsilon": 1e-3, "momentum": 0.9}, 4))
    momentum = model[0].momentum
    replace_norm(model, "batch_instance")
    assert (model[0].eps, model[0].momentum, model[0].channel_dim) == (1e-3, momentum, -1)


def test_mean_only_batch_norm_gives_its_mean_but_not_its_eps():
    model = nn.Sequential(MeanOnlyBatchNorm(4))
    bias, mean = model[0].bias, model[0].running_mean
    replace_norm(model, "batch")
    assert (model[0].eps, model[0].bias is bias, model[0].running_mean is mean) == (1e-5, True, True)
    assert model[0].weight is not None


@given(channels=st.integers(1, 512), norm=st.sampled_from(sorted(NORMS)), dimensions=st.integers(1, 3))
@settings(max_examples=150, deadline=None)
@pytest.mark.filterwarnings("ignore:.*each group has one value")
def test_every_norm_is_built_for_any_number_of_channels(channels, norm, dimensions):
    batch = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dimensions - 1]
    model = nn.Sequential(batch(channels))
    weight = model[0].weight
    replace_norm(model, norm)
    x = torch.randn(3, channels, *[2] * dimensions)
    y = model.eval()(x)
    assert y.shape == x.shape
    assert y.isfinite().all()
    assert norm == "none" or model[0].weight is weight


# Which layers


def test_layers_are_chosen_by_path_class_or_function():
    def kinds(**choice):
        model = nn.ModuleDict(
            {"a": nn.Sequential(nn.BatchNorm2d(4), nn.GroupNorm(2, 4)), "b": nn.BatchNorm2d(4)}
        )
        replace_norm(model, "rms", **choice)
        return "".join(type(m).__name__[0] for m in (*model["a"], model["b"]))

    assert kinds() == "RRR"
    assert kinds(include="a.*") == "RRB"
    assert kinds(exclude=["a.0", "b"]) == "BRB"
    assert kinds(include=nn.BatchNorm2d) == "RGR"
    assert kinds(include=nn.BatchNorm2d, exclude="b") == "RGB"
    assert kinds(include=lambda path, layer: path == "b" or isinstance(layer, nn.GroupNorm)) == "BRR"
    assert kinds(include=["b", nn.GroupNorm]) == "BRR"
    assert kinds(include=nn.BatchNorm3d) == "BGB"
    with pytest.raises(ValueError, match=r"include: 'c.\*' matches none of the layers a.0, a.1, b"):
        kinds(include=["a.*", "c.*"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's, of its own scripts
def test_the_report_says_why_layers_are_left():
    model = nn.ModuleDict(
        {
            "planes": nn.LayerNorm([4, 4]),
            "out": nn.BatchNorm2d(4),
            "switched": nn.BatchNorm2d(4),
            "act": BatchNormReLU(4),
            "own": GroupNorm(4),
            "scripted": torch.jit.script(nn.BatchNorm2d(4)),
            "conv": nn.Conv2d(3, 4, 1),
            "lstm": NormLSTM(3, 4, norm="layer"),
        }
    )
    model["switched"].track_running_stats = False
    report = replace_norm(model, "group", exclude="out", subclasses="skip")
    assert {row.path: row.reason for row in report} == {
        "planes": "it normalizes over 2 axes, (4, 4)",
        "out": "not chosen",
        "switched": "its track_running_stats was switched off later: it evaluates by averages that it does not move",
        "act": "forward(), act would be lost",
        "own": "it is so already",
        "scripted": "it is scripted",
        "lstm": "its steps are built for their norm: make another NormLSTM(norm=...)",
    }
    assert not report.replaced
    assert len(report.left) == len(report) == 7
    assert str(report).startswith("replaced 0 of 7 norms\npath")
    assert pickle.loads(pickle.dumps(report)) == report
    assert (
        str(replace_norm(nn.Sequential(nn.Linear(2, 2)), "batch")) == "replaced no norm: the model has none"
    )


def test_a_block_that_is_only_called_a_norm_is_looked_into():
    class PreNormBlock(nn.Sequential):
        def __init__(self):
            super().__init__(nn.BatchNorm2d(4))
            self.gamma = nn.Parameter(torch.ones(4))

    class NormNet(PreNormBlock):
        pass

    model = NormNet()
    model.append(PreNormBlock())
    assert [row.path for row in replace_norm(model, "group").replaced] == ["0", "1.0"]


def test_a_layer_norm_of_images_has_its_channels_on_axis_1():
    class LayerNorm2d(nn.LayerNorm):
        def forward(self, x):
            return super().forward(x.movedim(1, -1)).movedim(-1, 1)

    model, x = nn.Sequential(LayerNorm2d(6)), torch.randn(2, 6, 3, 3)
    before = model(x)
    replace_norm(model, "layer", subclasses="replace")
    assert (model[0].over, model[0].channel_dim) == ("channels", 1)
    torch.testing.assert_close(model(x), before)


def test_subclasses_are_refused_skipped_or_taken_for_their_base():
    model = nn.Sequential(nn.BatchNorm2d(4), BatchNormReLU(4))
    weight = model[1].weight
    with pytest.raises(
        ValueError, match=r"nothing was replaced: BatchNormReLU would lose its forward\(\), act \('1'\)"
    ):
        replace_norm(model, "group")
    assert type(model[0]) is nn.BatchNorm2d
    replace_norm(model, "group", subclasses="skip")
    assert [type(m) for m in model] == [GroupNorm, BatchNormReLU]
    row = replace_norm(model, "group", subclasses="replace").rows[1]
    assert type(model[1]) is GroupNorm
    assert model[1].weight is weight
    assert {"forward()", "act"} <= {*row.dropped}


def test_a_subclass_without_a_behaviour_of_its_own_is_no_obstacle():
    class Mine(nn.BatchNorm2d):
        """Only other defaults."""

        def __init__(self, num_features):
            super().__init__(num_features, eps=1e-3, momentum=0.03)

    class Extra(nn.BatchNorm2d):
        def __init__(self, num_features):
            super().__init__(num_features)
            self.register_buffer("count", torch.zeros(()))

    model = nn.Sequential(Mine(4))
    replace_norm(model, "batch")
    assert (model[0].eps, model[0].momentum) == (1e-3, 0.03)
    with pytest.raises(ValueError, match="Extra would lose its count"):
        replace_norm(nn.Sequential(Extra(4)), "batch")
    model = nn.Sequential(nn.BatchNorm2d(4))
    model[0].forward = lambda x: x
    with pytest.raises(ValueError, match=r"BatchNorm2d would lose its forward\(\) of the instance"):
        replace_norm(model, "batch")
    model = nn.Sequential(BatchNormReLU(4))
    replace_norm(model, BatchNormReLU)  # the new one does the same
    assert type(model[0]) is BatchNormReLU


def test_a_call_that_raises_has_changed_nothing():
    model = nn.Sequential(nn.BatchNorm2d(8), nn.BatchNorm2d(6))
    layers, state = [*model], copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for norm, error, words in (
        (
            functools.partial(GroupNorm, num_groups=4),
            ValueError,
            r"'1' \(BatchNorm2d\): .*num_groups=4 does not divide",
        ),
        ("grup", ValueError, "unknown norm 'grup'; did you mean 'group'.*batch, renorm"),
        (BatchNorm(8), TypeError, r"norm must be a name, or be called as norm\(channels\)"),
        (None, TypeError, "got None"),
        (nn.LazyBatchNorm2d, ValueError, "the factory made a lazy LazyBatchNorm2d"),
        (lambda channels: "no", ValueError, "no layer can be made for '0'.*made a str"),
        (lambda channels, layer=layers[0]: layer, ValueError, "a layer that it had given before"),
    ):
        with pytest.raises(error, match=words):
            replace_norm(model, norm, optimizer=optimizer)
        assert [*model] == layers
        torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    with pytest.raises(ValueError, match="subclasses must be"):
        replace_norm(model, "group", subclasses="drop")
    with pytest.raises(TypeError, match="expected an optimizer"):
        replace_norm(model, "group", optimizer=[optimizer, 3])
    with pytest.raises(ValueError, match="the model is itself a norm, BatchNorm2d"):
        replace_norm(nn.BatchNorm2d(3), "group")


@pytest.mark.parametrize("file", [replace, replace_report])
def test_the_examples_run(file):
    assert doctest.testmod(file).failed == 0
