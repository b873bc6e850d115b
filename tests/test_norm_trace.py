"""torch.fx and what builds on it: every layer is one node of the graph, as torch's layers are."""

import copy
import pickle

import pytest
import torch
from norm_table import CHANNELS, ROWS, batch
from torch import Tensor, fx, nn
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

from bnlight import sync_norm
from bnlight.norm import NORMS, BatchNorm, NormLSTM, weight_norm, weight_standardization


class Net(nn.Module):
    """A network with a norm that takes a mask."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, CHANNELS, 3, dtype=torch.float64)
        self.block = nn.ModuleDict({"norm": norm})

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.conv(x)
        return self.block["norm"](x).relu() if mask is None else self.block["norm"](x, mask=mask).relu()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ROWS)
def test_a_traced_network_has_each_layer_as_a_node_and_trains_and_evaluates_as_before(name, masked):
    net = weight_standardization(Net(ROWS[name].make()))
    known, inputs = copy.deepcopy(net), [batch(4, 3, 5, 6)]
    inputs += [torch.rand(4, 3, 4) > 0.3] * masked
    traced = fx.symbolic_trace(net, concrete_args=None if masked else {"mask": None})
    assert "block.norm" in {str(n.target) for n in traced.graph.nodes if n.op == "call_module"}
    for training in (True, False):
        found = []
        for model in (traced, known):
            torch.manual_seed(0)
            # A graph keeps the argument that it was traced without.
            found.append(model.train(training)(*inputs, *[None] * (model is traced and not masked)))
        assert torch.equal(*found)
    assert {*traced.state_dict()} == {*net.state_dict()}
    copied = copy.deepcopy(traced)
    assert type(copied.get_submodule("block.norm")) is ROWS[name].layer


def test_a_traced_network_can_be_pickled_compiled_and_exported():
    net = nn.Sequential(nn.Conv2d(3, CHANNELS, 3), BatchNorm(CHANNELS), nn.ReLU()).double()
    traced, x = fx.symbolic_trace(net).eval(), batch(4, 3, 5, 6)
    y = traced(x)
    assert torch.equal(pickle.loads(pickle.dumps(traced))(x), y)
    torch.testing.assert_close(torch.compile(traced, backend="aot_eager", fullgraph=True)(x), y)
    torch.testing.assert_close(torch.export.export(traced, (x,)).module()(x), y)


def test_recurrent_synchronized_and_weight_normalized_layers_are_nodes_too():
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = NormLSTM(3, 4, norm="layer")

        def forward(self, x: Tensor) -> Tensor:
            output, (h, _) = self.lstm(x)
            return output + h

    net, x = Recurrent(), torch.randn(5, 2, 3)
    assert torch.equal(fx.symbolic_trace(net)(x), net(x))
    net, x = weight_norm(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), BatchNorm(4))), torch.randn(5, 3)
    sync_norm(net)
    nodes = [node.op for node in fx.symbolic_trace(net).graph.nodes]
    assert nodes == ["placeholder", "call_module", "call_module", "call_module", "output"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.ao's own
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", NORMS)
def test_quantization_by_graphs_leaves_the_layers_as_they_are(name):
    net = nn.Sequential(nn.Conv2d(3, CHANNELS, 3), NORMS[name](CHANNELS), nn.ReLU()).eval()
    x = torch.randn(2, 3, 8, 8)
    prepared = prepare_fx(copy.deepcopy(net), get_default_qconfig_mapping(), (x,))
    prepared(x)
    assert type(prepared.get_submodule("1")) is NORMS[name]
    torch.testing.assert_close(convert_fx(prepared)(x), net(x), rtol=0.2, atol=0.2)


def test_torchvisions_feature_extractor_finds_the_layers():
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    net = nn.Sequential(nn.Conv2d(3, CHANNELS, 3), BatchNorm(CHANNELS), nn.ReLU())
    features = extraction.create_feature_extractor(net, {"1": "norm"})(x := torch.randn(2, 3, 8, 8))
    assert torch.equal(features["norm"], net[:2](x))
