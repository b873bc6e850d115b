"""replace_norm where more than a module is concerned: optimizers, compiled and wrapped models, fast paths."""

import copy
import functools

import pytest
import torch
from torch import nn
from zoo import conv_net, mlp, transformer

from bnlight import norm_parameters, replace_norm
from bnlight.norm import NORMS, BatchNorm, GroupNorm, LayerNorm

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
