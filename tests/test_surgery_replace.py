"""replace_norm puts other norms into a model and loses nothing on the way, or says so and changes nothing."""

import copy
import doctest
import functools
import gc
import pickle
from collections import namedtuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import start
from torch import nn
from torch.nn.utils import parametrize
from zoo import BatchNormReLU, conv_net, hooked, mlp, transformer

from bnlight import freeze_norm, norm_parameters, replace_norm, sync_norm, unfreeze_norm
from bnlight.norm import (
    NORMS,
    BatchInstanceNorm,
    BatchNorm,
    BatchRenorm,
    GroupNorm,
    LayerNorm,
    MeanOnlyBatchNorm,
    NormLSTM,
    RMSNorm,
    from_keras,
)
from bnlight.surgery import replace, replace_report


def one(layer: nn.Module) -> nn.Sequential:
    """A model of one norm."""
    return nn.Sequential(layer)


# What is carried


def test_settings_are_carried_where_they_mean_the_same():
    model = one(nn.BatchNorm2d(8, eps=1e-3, momentum=0.3))
    row = replace_norm(model, "batch").rows[0]
    assert (model[0].eps, model[0].momentum, row.dropped) == (1e-3, 0.3, ())
    row = replace_norm(model, "renorm").rows[0]
    assert (model[0].eps, model[0].momentum) == (1e-3, 0.01)
    assert row.dropped == ("momentum=0.3",)
    assert row.fresh == ("r_max", "d_max")
    replace_norm(model, "batch")
    assert (model[0].eps, model[0].momentum) == (1e-3, 0.1)


def test_the_number_of_groups_and_what_a_layer_norm_is_over_are_carried():
    model = nn.Sequential(nn.GroupNorm(8, 8), nn.LayerNorm(8), nn.BatchNorm1d(8))
    replace_norm(model, "group", include="0")
    replace_norm(model, "layer", exclude="0")
    assert model[0].num_groups == 8
    assert [(m.over, m.channel_dim) for m in model[1:]] == [("channels", -1), ("sample", 1)]
    replace_norm(model, "batch", include="1")
    replace_norm(model, "layer", include="1")
    assert (model[1].over, model[1].channel_dim) == ("channels", -1)
    assert repr(replace_norm(model, "rms") and model[1]) == "RMSNorm(8, eps=1e-05, channel_dim=-1)"
    assert model[2].over == "sample"  # as the layer norm before it


def test_every_setting_of_the_same_class_is_kept_but_those_the_factory_has():
    model = one(BatchRenorm(8, r_max=4, d_max=6, momentum=0.2, small_batch="running"))
    model[0].d_max.fill_(2)  # a schedule is under way
    replace_norm(model, functools.partial(BatchRenorm, r_max=2.0))
    layer = model[0]
    assert (layer.r_max, layer.d_max, layer.momentum, layer.small_batch) == (2, 2, 0.2, "running")
    assert layer.first_bounds == (2, 6)
    model = one(BatchNorm(8, virtual_batch_size=4, jitter=(0.1, 0.1), weight_init=0.5))
    replace_norm(model, "renorm")
    assert (model[0].virtual_batch_size, model[0].jitter, model[0].weight_init) == (4, (0.1, 0.1), 0.5)


@pytest.mark.parametrize("arguments", [{"affine": False}, {"bias": False}, {}], ids=str)
@pytest.mark.parametrize("norm", ["batch", "renorm", "group", "layer", "rms", "frn", "switchable"])
def test_the_affine_parameters_are_the_same_objects_or_as_absent(norm, arguments):
    model = one(nn.BatchNorm2d(8, **arguments))
    weight, bias = model[0].weight, model[0].bias
    replace_norm(model, norm)
    assert model[0].weight is weight
    assert model[0].bias is bias


def test_without_normalization_there_is_no_scale_left():
    model = one(nn.BatchNorm2d(8))
    assert "weight" in replace_norm(model, "none").rows[0].dropped
    assert not [*model.parameters()]
    replace_norm(model, "batch")  # and the next one has a scale again
    assert model[0].weight.shape == (8,)


@pytest.mark.parametrize("norm", ["batch", "renorm", "full", "batch_layer", "batch_instance", "switchable"])
def test_running_statistics_are_the_same_buffers(norm):
    model, x = one(nn.BatchNorm2d(3)), torch.randn(4, 3, 2, 2) + 3
    model(x)
    buffers = [model[0].running_mean, model[0].running_var, model[0].num_batches_tracked]
    replace_norm(model, norm)
    assert [
        getattr(model[0], n) is b
        for n, b in zip(("running_mean", "running_var", "num_batches_tracked"), buffers, strict=True)
    ] == [True] * 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", ["batch", "group", "tanh", functools.partial(nn.GroupNorm, 2)])
def test_dtype_and_device_are_carried(norm, dtype):
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)).to(dtype)
    replace_norm(model, norm)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model(torch.randn(2, 3, 4, 4, dtype=dtype)).dtype == dtype
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8, affine=False)).to("meta")
    replace_norm(model, norm)
    assert {t.device.type for t in model.state_dict().values()} == {"meta"}


def test_a_model_with_lazy_layers_and_norms_without_tensors_is_replaced():
    model = nn.Sequential(nn.LazyConv2d(8, 1), nn.InstanceNorm2d(8))
    replace_norm(model, "batch")
    assert model(torch.randn(2, 3, 4, 4)).shape == (2, 8, 4, 4)


def test_another_dtype_is_not_the_same_layer():
    model = one(BatchNorm(8))
    replace_norm(model, functools.partial(BatchNorm, dtype=torch.float64))
    assert (model[0].weight.dtype, model[0].running_mean.dtype) == (torch.float64, torch.float64)
    assert not replace_norm(model, functools.partial(BatchNorm, dtype=torch.float64)).replaced


def test_the_averages_of_torchs_instance_norm_are_dropped_and_said_to_be():
    model = one(nn.InstanceNorm2d(3, affine=True, track_running_stats=True))
    model(torch.randn(2, 3, 4, 4))
    row = replace_norm(model, "instance").rows[0]
    assert row.dropped == ("running_mean", "running_var", "num_batches_tracked")
    assert "running_mean" not in replace_norm(model, "batch").rows[0].carried
    assert torch.equal(model[0].running_mean, torch.zeros(3))


def test_half_statistics_become_float32():
    model = one(nn.BatchNorm2d(8).to(torch.bfloat16))
    replace_norm(model, "batch")
    assert (model[0].weight.dtype, model[0].running_var.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("norm", ["batch_instance", "tanh"])
def test_mode_and_requires_grad_are_carried_to_what_is_new_too(norm):
    model = conv_net(nn.BatchNorm2d)
    model.norm1.eval().requires_grad_(False)
    replace_norm(model, norm)
    assert (model.norm1.training, model.norm2.training) == (False, True)
    assert {p.requires_grad for p in model.norm1.parameters()} == {False}
    assert {p.requires_grad for p in model.norm2.parameters()} == {True}


def test_every_hook_still_works_and_can_still_be_removed():
    model, seen = one(nn.BatchNorm1d(3)), []
    layer = model[0]

    def note(name, result=None):
        return lambda *args, **kwargs: seen.append((name, args[0])) or result

    handles = [
        layer.register_forward_pre_hook(note("pre")),
        layer.register_forward_pre_hook(note("pre kwargs"), with_kwargs=True),
        layer.register_forward_hook(note("forward")),
        layer.register_forward_hook(note("always"), with_kwargs=True, always_call=True),
        layer.register_full_backward_pre_hook(note("backward pre")),
        layer.register_full_backward_hook(note("backward")),
        layer.register_state_dict_pre_hook(note("state")),
        layer.register_state_dict_post_hook(note("state post")),
        layer.register_load_state_dict_pre_hook(note("load pre")),
        layer.register_load_state_dict_post_hook(note("load")),
    ]
    row = replace_norm(model, "renorm").rows[0]
    assert "10 hooks" in row.carried
    del layer
    gc.collect()  # a hook on loading holds its layer weakly
    model(torch.randn(4, 3, requires_grad=True)).sum().backward()
    model.load_state_dict(model.state_dict())
    assert {name for name, _ in seen} == {
        *("pre", "pre kwargs", "forward", "always", "backward pre", "backward"),
        *("state", "state post", "load pre", "load"),
    }
    assert {layer for _, layer in seen} == {model[0]}
    for handle in handles:
        handle.remove()
    seen.clear()
    model(torch.randn(4, 3, requires_grad=True)).sum().backward()
    model.load_state_dict(model.state_dict())
    assert not seen


def test_torchs_converter_loses_hooks_and_sharing_where_ours_keeps_them():
    def build():
        model = hooked()
        model.same = model.norm1
        model.add_module("again", model.norm1)
        return model

    stock = nn.SyncBatchNorm.convert_sync_batchnorm(build())
    assert not stock.norm1._forward_hooks
    assert type(stock.again) is nn.BatchNorm2d
    ours = build()
    replace_norm(ours, "batch")
    assert len(ours.norm1._forward_hooks) == 2
    assert ours.again is ours.norm1 is ours.same


def test_a_parametrized_weight_is_computed_as_before_from_the_same_parameter():
    class Doubled(nn.Module):
        def forward(self, value):
            return 2 * value

    model = one(nn.BatchNorm2d(4))
    parametrize.register_parametrization(model[0], "weight", Doubled())
    original, keys = model[0].parametrizations.weight.original, [*model.state_dict()]
    row = replace_norm(model, "group").rows[0]
    assert "weight (parametrized)" in row.carried
    assert model[0].parametrizations.weight.original is original
    assert torch.equal(model[0].weight, 2 * original)
    assert sorted(model.state_dict()) == sorted(k for k in keys if "running" not in k and "num" not in k)
    row = replace_norm(model, "none").rows[0]
    assert "weight (parametrized)" in row.dropped


def test_looking_at_a_parametrization_does_not_run_it():
    class Counting(nn.Module):
        calls = 0

        def forward(self, value):
            Counting.calls += 1
            return value

    model = one(nn.BatchNorm2d(4))
    parametrize.register_parametrization(model[0], "weight", Counting())
    Counting.calls = 0
    replace_norm(model, "group")
    assert Counting.calls == 0


def test_attributes_that_somebody_has_set_are_carried():
    model = one(nn.BatchNorm2d(4))
    model[0].stage = 3
    assert "stage" in replace_norm(model, "group").rows[0].carried
    assert model[0].stage == 3


def test_a_frozen_norm_stays_frozen_and_can_be_thawed():
    model = freeze_norm(conv_net(nn.BatchNorm2d))
    replace_norm(model, "batch_instance")
    model.train()
    before, x = copy.deepcopy(model.norm1.state_dict()), torch.randn(2, 3, 4, 4)
    model(x)
    assert not model.norm1.training
    assert not any(p.requires_grad for p in model.norm1.parameters())
    torch.testing.assert_close(model.norm1.state_dict(), before, rtol=0, atol=0)
    unfreeze_norm(model)
    assert type(model.norm1) is BatchInstanceNorm
    assert model.norm1.training
    assert all(p.requires_grad for p in model.norm1.parameters())


@pytest.mark.parametrize("build", [nn.BatchNorm2d, BatchNorm])
def test_a_synchronized_norm_stays_synchronized(build):
    model = sync_norm(conv_net(build), timeout=7)
    replace_norm(model, "renorm")
    assert [(m.process_group, m.meeting.path, m.meeting.timeout) for m in (model.norm1, model.norm2)] == [
        ("world", "norm1", 7),
        ("world", "norm2", 7),
    ]
    replace_norm(model, functools.partial(nn.BatchNorm2d))
    assert model.norm1.process_group == "world"
    assert "process group" in replace_norm(model, "group").rows[0].dropped


@pytest.mark.parametrize("again", [False, True])
def test_torchs_synchronized_norm_becomes_one_of_ours(again):
    model = nn.SyncBatchNorm.convert_sync_batchnorm(conv_net(nn.BatchNorm2d))
    if again:
        sync_norm(model)
        freeze_norm(model)
        assert not isinstance(model.norm1, nn.SyncBatchNorm)  # sync_norm says why
    assert len(replace_norm(copy.deepcopy(model), "batch", include=nn.SyncBatchNorm).replaced) == 2
    assert "process group" in replace_norm(model, "batch").rows[0].carried
    assert model.norm2.process_group == "world"
    assert model.norm2.meeting.layer == 1
    assert type(unfreeze_norm(model).norm1) is BatchNorm


def in_step(x):
    """The outputs on this rank of a synchronized network, one of whose norms was replaced."""
    torch.manual_seed(0)
    model = sync_norm(conv_net(nn.BatchNorm2d))
    replace_norm(model, "batch_instance", include="norm2")
    rank = torch.distributed.get_rank()
    y = model(x[rank::2])
    return y.detach(), model.norm1.running_mean, model.norm2.running_mean


def test_synchronized_norms_old_and_new_meet_in_step(tmp_path):
    x = torch.randn(6, 3, 4, 4)
    with start(2, tmp_path) as ranks:
        first, second = ranks.run(in_step, x)
    torch.manual_seed(0)
    model = conv_net(nn.BatchNorm2d)
    replace_norm(model, "batch_instance", include="norm2")
    y = model(x)
    torch.testing.assert_close(torch.stack([first[0], second[0]], 1).flatten(0, 1), y)
    for mine, theirs in zip(first[1:], (model.norm1.running_mean, model.norm2.running_mean), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_shared_layer_stays_one_layer_also_in_lists_and_attributes():
    model = conv_net(nn.BatchNorm2d)
    model.norm2 = model.norm1
    model.by_list, model.by_name, model.pair = [model.norm1, 3], {"a": model.norm1}, (model.norm1, "b")
    object.__setattr__(model, "bare", model.norm1)
    report = replace_norm(model, "group")
    new = model.norm1
    assert type(new) is GroupNorm
    assert all(new is other for other in (model.norm2, model.by_list[0], model.by_name["a"], model.pair[0]))
    assert model.__dict__["bare"] is new
    assert [(row.path, row.shared_with) for row in report] == [("norm1", ""), ("norm2", "norm1")]
    assert str(report).startswith("replaced 1 of 1 norms: 1 BatchNorm2d by GroupNorm\n")
    assert "the same layer as norm1" in str(report)


def test_the_new_layer_is_also_in_nested_lists_dicts_tuples_sets_and_methods():
    Pair = namedtuple("Pair", "layer other")
    model = conv_net(nn.BatchNorm2d)
    old = model.norm1
    model.deep = {"x": (old, 3), "y": [{"z": [old]}], "p": Pair(old, 1)}
    model.deep["self"] = model.deep
    model.few, model.call = {old, 1}, old.forward
    replace_norm(model, "group")
    new = model.norm1
    assert model.deep["x"] == (new, 3)
    assert model.deep["y"] == [{"z": [new]}]
    assert model.deep["p"] == Pair(new, 1)
    assert model.few == {new, 1}
    assert model.call.__self__ is new
    assert old not in model.modules()


def test_shared_parameters_stay_shared_even_in_another_dtype():
    model = conv_net(nn.BatchNorm2d)
    model.norm2.weight = model.norm1.weight
    replace_norm(model, functools.partial(GroupNorm, dtype=torch.float64))
    assert model.norm2.weight is model.norm1.weight
    assert model.norm1.weight.dtype == torch.float64
    assert model.norm1.bias is not model.norm2.bias


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
        model = one(nn.BatchNorm2d(8, eps=1e-3))
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
    model = sync_norm(one(nn.BatchNorm2d(4)).eval())
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
    model = one(from_keras({"epsilon": 1e-3, "momentum": 0.9}, 4))
    momentum = model[0].momentum
    replace_norm(model, "batch_instance")
    assert (model[0].eps, model[0].momentum, model[0].channel_dim) == (1e-3, momentum, -1)


def test_mean_only_batch_norm_gives_its_mean_but_not_its_eps():
    model = one(MeanOnlyBatchNorm(4))
    bias, mean = model[0].bias, model[0].running_mean
    replace_norm(model, "batch")
    assert (model[0].eps, model[0].bias is bias, model[0].running_mean is mean) == (1e-5, True, True)
    assert model[0].weight is not None


@given(channels=st.integers(1, 512), norm=st.sampled_from(sorted(NORMS)), dimensions=st.integers(1, 3))
@settings(max_examples=150, deadline=None)
@pytest.mark.filterwarnings("ignore:.*each group has one value")
def test_every_norm_is_built_for_any_number_of_channels(channels, norm, dimensions):
    batch = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dimensions - 1]
    model = one(batch(channels))
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

    model, x = one(LayerNorm2d(6)), torch.randn(2, 6, 3, 3)
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

    model = one(Mine(4))
    replace_norm(model, "batch")
    assert (model[0].eps, model[0].momentum) == (1e-3, 0.03)
    with pytest.raises(ValueError, match="Extra would lose its count"):
        replace_norm(one(Extra(4)), "batch")
    model = one(nn.BatchNorm2d(4))
    model[0].forward = lambda x: x
    with pytest.raises(ValueError, match=r"BatchNorm2d would lose its forward\(\) of the instance"):
        replace_norm(model, "batch")
    model = one(BatchNormReLU(4))
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


# Optimizers


def names_in(optimizer, model):
    names = {p: name for name, p in model.named_parameters()}
    return [[names[p] for p in group["params"]] for group in optimizer.param_groups]


@pytest.mark.parametrize("named", [False, True])
def test_an_optimizer_follows(named):
    model = mlp(nn.BatchNorm1d)
    plain = {*norm_parameters(model)}
    decayed, rest = {}, {}
    for name, parameter in model.named_parameters():
        (rest if parameter in plain else decayed)[name] = parameter
    groups = [[*group.items()] if named else [*group.values()] for group in (decayed, rest)]
    optimizer = torch.optim.AdamW([{"params": groups[0]}, {"params": groups[1], "weight_decay": 0.0}])
    model(torch.randn(4, 6)).sum().backward()
    optimizer.step()
    weight = model[1].weight
    replace_norm(model, "tanh", optimizer=optimizer)
    assert names_in(optimizer, model) == [
        ["0.weight", "3.weight", "5.weight"],
        ["0.bias", "1.weight", "1.alpha", "1.bias", "3.bias", "4.weight", "4.alpha", "4.bias", "5.bias"],
    ]
    assert weight in optimizer.state
    model(torch.randn(4, 6)).sum().backward()
    optimizer.step()
    assert optimizer.state[model[1].alpha]["step"] == 1
    replace_norm(model, "none", optimizer=optimizer)
    assert names_in(optimizer, model) == [
        ["0.weight", "3.weight", "5.weight"],
        ["0.bias", "3.bias", "5.bias"],
    ]
    assert weight not in optimizer.state
    if named:
        assert [group["param_names"] for group in optimizer.param_groups] == names_in(optimizer, model)
    replace_norm(model, "batch", optimizer=optimizer)  # of no parameters: with the biases, where no norm is
    assert names_in(optimizer, model)[1] == [
        *("0.bias", "3.bias", "5.bias"),
        *("1.weight", "1.bias", "4.weight", "4.bias"),
    ]
    if named:
        assert [group["param_names"] for group in optimizer.param_groups] == names_in(optimizer, model)
    optimizer.step()
    model.load_state_dict(copy.deepcopy(model).state_dict())
    optimizer.load_state_dict(optimizer.state_dict())


def test_several_optimizers_follow_and_what_was_left_out_stays_out():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    first = torch.optim.SGD(model[0].parameters(), lr=0.1)
    second = torch.optim.LBFGS(model[1].parameters())
    report = replace_norm(model, "tanh", optimizer=[first, second])
    assert names_in(first, model) == [["0.weight", "0.alpha", "0.bias"]]
    assert names_in(second, model) == [["1.weight", "1.alpha", "1.bias"]]
    assert second._params is second.param_groups[0]["params"]
    assert not report.notes
    assert replace_norm(nn.Sequential(nn.BatchNorm1d(3)), "tanh").notes


def test_an_optimizer_gets_the_copies_that_another_dtype_needs():
    model = conv_net(nn.BatchNorm2d)
    model.norm2.weight = model.norm1.weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = names_in(optimizer, model)
    replace_norm(model, functools.partial(GroupNorm, dtype=torch.float64), optimizer=optimizer)
    assert names_in(optimizer, model) == before


# Models that are more than modules


def test_the_fast_path_of_torchs_transformer_would_compute_another_norm():
    model, x = transformer().eval(), torch.randn(2, 5, 8)
    with torch.no_grad():
        for layer in model.layers:
            layer.norm1.bias.fill_(0.5)
    stock = copy.deepcopy(model)
    for layer in stock.layers:
        layer.norm1 = NORMS["rms"](8, eps=1e-5, channel_dim=-1)
        layer.norm2 = NORMS["rms"](8, eps=1e-5, channel_dim=-1)

    def fast_and_slow(model):
        with torch.no_grad():
            fast = model(x)
            torch.backends.mha.set_fastpath_enabled(False)
            try:
                return fast, model(x)
            finally:
                torch.backends.mha.set_fastpath_enabled(True)

    fast, slow = fast_and_slow(stock)
    assert (fast - slow).abs().max() > 0.1  # put in by hand, torch normalizes by the old formula
    for norm in ("rms", "batch", "tanh", "none", "layer"):
        ours = copy.deepcopy(model)
        report = replace_norm(ours, norm)
        fast, slow = fast_and_slow(ours)
        torch.testing.assert_close(fast, slow)
        assert bool(report.notes) == (norm != "layer")
        mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
        with torch.no_grad():
            assert ours(x, src_key_padding_mask=mask).isfinite()[~mask].all()


def test_nested_tensors_of_torchs_encoder_stay_away_from_other_norms():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 1).eval()
    assert model.use_nested_tensor
    replace_norm(model, "rms")
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        assert model(torch.randn(2, 5, 8), src_key_padding_mask=mask).shape == (2, 5, 8)


def test_a_compiled_model_is_replaced_inside():
    torch._dynamo.reset()
    model = conv_net(nn.BatchNorm2d).eval()
    x = torch.randn(2, 3, 4, 4)
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    report = replace_norm(compiled, functools.partial(LayerNorm, eps=1e-3), include="norm1")
    assert [row.path for row in report] == ["norm1", "norm2"]
    assert type(model.norm1) is LayerNorm
    torch.testing.assert_close(compiled(x), model(x))
    with pytest.raises(ValueError, match="itself a norm"):
        replace_norm(torch.compile(nn.BatchNorm2d(3), backend="eager"), "group")


def test_a_norm_that_is_compiled_itself_is_replaced():
    torch._dynamo.reset()
    layer = nn.BatchNorm2d(3)
    model = nn.Sequential(torch.compile(layer, backend="eager")).eval()
    x = torch.randn(2, 3, 4, 4)
    keys = [*model.state_dict()]
    assert torch.equal(model(x), layer(x))
    assert [row.path for row in replace_norm(model, "instance").replaced] == ["0"]
    torch.testing.assert_close(model(x), nn.functional.instance_norm(x))
    assert [*model.state_dict()] == [key for key in keys if key.endswith(("weight", "bias"))]


def wrapped(rank_file):
    model = nn.parallel.DistributedDataParallel(conv_net(nn.BatchNorm2d))
    report = replace_norm(model, "batch")
    assert [row.path for row in report] == ["norm1", "norm2"]
    model(torch.randn(2, 3, 4, 4)).sum().backward()
    same = all(p.grad is not None for p in model.parameters())
    with pytest.raises(ValueError, match="DistributedDataParallel would not notice"):
        replace_norm(model, "tanh")
    return same, type(model.module.norm1) is BatchNorm


def test_under_ddp_the_same_parameters_train_on_and_others_are_refused(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert wrapped(tmp_path) == (True, True)
    finally:
        torch.distributed.destroy_process_group()


def test_a_sharded_model_is_refused(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = conv_net(nn.BatchNorm2d)
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match="is sharded over processes"):
            replace_norm(model, "group")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("file", [replace, replace_report])
def test_the_examples_run(file):
    assert doctest.testmod(file).failed == 0
