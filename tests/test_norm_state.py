"""State dicts, copies, compilation, the table of names, and the examples in the docstrings."""

import copy
import doctest
import importlib
import inspect
import pkgutil

import pytest
import torch
from torch import nn

import bnlight.norm
from bnlight.norm import NORMS, BatchNorm, BatchRenorm, GroupNorm, LayerNorm, Norm

TORCH = {2: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


@pytest.fixture(params=NORMS)
def layer(request) -> Norm:
    return NORMS[request.param](8, affine=True)


def trained(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    module(torch.randn(5, 8, 3, 3) * 2 + 1)
    return module


def test_the_table_of_names_is_complete():
    order = "batch renorm full batch_layer batch_instance switchable layer group instance rms frn tanh none"
    assert [*NORMS] == order.split()
    assert {"NORMS", "Norm", *(layer_type.__name__ for layer_type in NORMS.values())} <= {
        *bnlight.norm.__all__
    }


def test_every_layer_takes_the_shared_arguments_and_has_parameters_of_its_channels(layer):
    parameters = inspect.signature(type(layer)).parameters
    assert next(iter(parameters)) == "num_features"
    assert {"eps", "affine", "bias", "channel_dim", "device", "dtype"} <= {*parameters}
    assert all(p.kind == p.KEYWORD_ONLY for p in [*parameters.values()][1:])
    assert layer.weight.shape == layer.bias.shape == (8,)
    assert type(layer)(8, affine=True, bias=False).bias is None
    bare = type(layer)(8, affine=False)
    assert bare.weight is bare.bias is None


def test_the_repr_is_the_call_that_makes_the_layer():
    assert repr(BatchNorm(8)) == "BatchNorm(8)"
    assert repr(BatchNorm(8, momentum=None, bias=False)) == "BatchNorm(8, momentum=None, bias=False)"
    assert repr(BatchRenorm(8, d_max=0.1)) == "BatchRenorm(8, d_max=0.1)"
    assert repr(BatchRenorm(8, device="meta")) == "BatchRenorm(8)"
    assert repr(GroupNorm(8, num_groups=4, affine=False)) == "GroupNorm(8, num_groups=4, affine=False)"
    assert (
        repr(LayerNorm(8, over="channels", channel_dim=-1)) == "LayerNorm(8, over='channels', channel_dim=-1)"
    )


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}], ids=str)
@pytest.mark.parametrize("rank", TORCH)
def test_a_torch_batch_norm_state_dict_loads_strictly_and_back(rank, options):
    torchs = TORCH[rank](8, **options)
    torchs(torch.randn(6, 8, *[2] * (rank - 2)))
    mine = BatchNorm(8, **options)
    mine.load_state_dict(torchs.state_dict(), strict=True)
    torchs.load_state_dict(mine.state_dict(), strict=True)
    assert {*mine.state_dict()} == {*torchs.state_dict()}


def test_a_torch_state_dict_loads_into_batch_renorm_and_keeps_its_bounds():
    torchs = nn.Sequential(nn.BatchNorm2d(8))
    torchs(torch.randn(6, 8, 2, 2))
    mine = nn.Sequential(BatchRenorm(8, r_max=2.0, d_max=1.0))
    mine.load_state_dict(torchs.state_dict(), strict=True)
    assert torch.equal(mine[0].running_mean, torchs[0].running_mean)
    assert (mine[0].r_max, mine[0].d_max) == (2.0, 1.0)
    assert torch.equal(mine.eval()(torch.ones(1, 8, 2, 2)), torchs.eval()(torch.ones(1, 8, 2, 2)))


def test_the_live_bounds_survive_a_checkpoint_and_half_a_state_is_an_error():
    scheduled = BatchRenorm(8)
    scheduled.r_max.fill_(1.5)
    resumed = BatchRenorm(8)
    resumed.load_state_dict(scheduled.state_dict())
    assert resumed.r_max == 1.5
    state = scheduled.state_dict()
    del state["d_max"]
    with pytest.raises(RuntimeError, match="d_max"):
        resumed.load_state_dict(state)
    with pytest.raises(RuntimeError, match="running_mean"):
        resumed.load_state_dict({})


def test_a_state_dict_from_before_torch_counted_batches_loads():
    state = nn.BatchNorm1d(8).state_dict()
    del state["num_batches_tracked"]
    state._metadata[""]["version"] = 1
    for layer in (BatchNorm(8), BatchRenorm(8)):
        layer.load_state_dict(state, strict=True)
    state._metadata[""]["version"] = 2
    with pytest.raises(RuntimeError, match="num_batches_tracked"):
        BatchNorm(8).load_state_dict(state, strict=True)


def test_running_statistics_can_be_reset():
    layer = trained(BatchNorm(8))
    layer.reset_running_stats()
    fresh = BatchNorm(8)
    assert all(torch.equal(a, b) for a, b in zip(layer.buffers(), fresh.buffers(), strict=True))


def test_a_bias_before_the_layer_is_redundant_exactly_where_cancels_bias_says_so(layer):
    layer.double()
    x, shift = torch.randn(5, 8, 3, 3, dtype=torch.float64), torch.randn(8, 1, 1, dtype=torch.float64)
    if isinstance(layer, BatchRenorm):
        layer.d_max.fill_(0)
    twin = copy.deepcopy(layer)
    same = torch.allclose(layer(x), twin(x + shift))
    assert same == layer.cancels_bias


# torch.compile itself instantiates the autograd.Function it traces.
COMPILES = pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated:DeprecationWarning")


@COMPILES
def test_compiled_masks_raise_on_no_value_and_use_the_running_statistics():
    torch._dynamo.reset()
    layer = BatchNorm(2)
    mask = torch.tensor([[True, False], [False, False]])
    x = torch.randn(2, 2, 2)
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x, mask)
    torch.testing.assert_close(y[0, :, 0], x[0, :, 0] / (1 + layer.eps) ** 0.5)
    assert torch.equal(layer.running_mean, torch.zeros(2))


@pytest.mark.parametrize("module", [m.name for m in pkgutil.iter_modules(bnlight.norm.__path__)])
def test_the_examples_in_the_docstrings_run(module):
    assert doctest.testmod(importlib.import_module(f"bnlight.norm.{module}")).failed == 0


@pytest.mark.parametrize("name", NORMS)
def test_every_layer_has_an_example(name):
    assert ">>>" in NORMS[name].__doc__
