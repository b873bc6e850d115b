"""What replace_norm carries from the old norms to the new: settings, tensors, hooks, sharing, attributes, mode."""

import copy
import functools
import gc
from collections import namedtuple

import pytest
import torch
from ranks import start
from torch import nn
from torch.nn.utils import parametrize
from zoo import conv_net, hooked

from bnlight import freeze_norm, replace_norm, sync_norm, unfreeze_norm
from bnlight.norm import BatchInstanceNorm, BatchNorm, BatchRenorm, GroupNorm


def test_settings_are_carried_where_they_mean_the_same():
    model = nn.Sequential(nn.BatchNorm2d(8, eps=1e-3, momentum=0.3))
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
    model = nn.Sequential(BatchRenorm(8, r_max=4, d_max=6, momentum=0.2, small_batch="running"))
    model[0].d_max.fill_(2)  # a schedule is under way
    replace_norm(model, functools.partial(BatchRenorm, r_max=2.0))
    layer = model[0]
    assert (layer.r_max, layer.d_max, layer.momentum, layer.small_batch) == (2, 2, 0.2, "running")
    assert layer.first_bounds == (2, 6)
    model = nn.Sequential(BatchNorm(8, virtual_batch_size=4, jitter=(0.1, 0.1), weight_init=0.5))
    replace_norm(model, "renorm")
    assert (model[0].virtual_batch_size, model[0].jitter, model[0].weight_init) == (4, (0.1, 0.1), 0.5)


@pytest.mark.parametrize("arguments", [{"affine": False}, {"bias": False}, {}], ids=str)
@pytest.mark.parametrize("norm", ["batch", "renorm", "group", "layer", "rms", "frn", "switchable"])
def test_the_affine_parameters_are_the_same_objects_or_as_absent(norm, arguments):
    model = nn.Sequential(nn.BatchNorm2d(8, **arguments))
    weight, bias = model[0].weight, model[0].bias
    replace_norm(model, norm)
    assert model[0].weight is weight
    assert model[0].bias is bias


def test_without_normalization_there_is_no_scale_left():
    model = nn.Sequential(nn.BatchNorm2d(8))
    assert "weight" in replace_norm(model, "none").rows[0].dropped
    assert not [*model.parameters()]
    replace_norm(model, "batch")  # and the next one has a scale again
    assert model[0].weight.shape == (8,)


@pytest.mark.parametrize("norm", ["batch", "renorm", "full", "batch_layer", "batch_instance", "switchable"])
def test_running_statistics_are_the_same_buffers(norm):
    model, x = nn.Sequential(nn.BatchNorm2d(3)), torch.randn(4, 3, 2, 2) + 3
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
    model = nn.Sequential(BatchNorm(8))
    replace_norm(model, functools.partial(BatchNorm, dtype=torch.float64))
    assert (model[0].weight.dtype, model[0].running_mean.dtype) == (torch.float64, torch.float64)
    assert not replace_norm(model, functools.partial(BatchNorm, dtype=torch.float64)).replaced


def test_the_averages_of_torchs_instance_norm_are_dropped_and_said_to_be():
    model = nn.Sequential(nn.InstanceNorm2d(3, affine=True, track_running_stats=True))
    model(torch.randn(2, 3, 4, 4))
    row = replace_norm(model, "instance").rows[0]
    assert row.dropped == ("running_mean", "running_var", "num_batches_tracked")
    assert "running_mean" not in replace_norm(model, "batch").rows[0].carried
    assert torch.equal(model[0].running_mean, torch.zeros(3))


def test_half_statistics_become_float32():
    model = nn.Sequential(nn.BatchNorm2d(8).to(torch.bfloat16))
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
    model, seen = nn.Sequential(nn.BatchNorm1d(3)), []
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

    model = nn.Sequential(nn.BatchNorm2d(4))
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

    model = nn.Sequential(nn.BatchNorm2d(4))
    parametrize.register_parametrization(model[0], "weight", Counting())
    Counting.calls = 0
    replace_norm(model, "group")
    assert Counting.calls == 0


def test_attributes_that_somebody_has_set_are_carried():
    model = nn.Sequential(nn.BatchNorm2d(4))
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
