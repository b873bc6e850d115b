"""Every layer compiled, exported, in ONNX and under torch.func: the numbers of the plain call."""

import copy
import shutil
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from norm_table import CHANNELS, ROWS, TRAINING, Row, assert_close, batch, pure, step
from torch import Tensor, nn
from torch.export import Dim
from torch.func import functional_call, grad, stack_module_state, vmap

from bnlight.norm import (
    NORMS,
    FullNorm,
    Norm,
)

# torch.compile itself instantiates the autograd.Function it traces.
COMPILES = pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated:DeprecationWarning")

REFUSED = "first derivatives only", "implement the jvp function", "torch.func cannot do"


@pytest.fixture(params=ROWS)
def row(request: pytest.FixtureRequest) -> Row:
    return ROWS[request.param]


def trained(row: Row, seed: int = 0, **options: Any) -> Norm:
    """The layer after one batch, with other parameters for each seed."""
    layer = row.make(**options)
    for parameter in layer.parameters():
        parameter.data.add_(0.1 * seed)
    dtype = options.get("dtype", torch.float64)
    layer(batch(6, CHANNELS, 3, 2, seed=seed, dtype=dtype).movedim(1, layer.channel_dim))
    return layer


def mask_like(x: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(x.size(0), *x.shape[2:], generator=generator) < 0.8


class Family(nn.Module):
    """All layers side by side, so that one graph holds them all."""

    def __init__(self, training: bool, rows: dict[str, Row], **options: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList([trained(row, **options) for row in rows.values()])
        self.train(training)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return torch.stack([layer(x, mask) for layer in self.layers])


@COMPILES
def test_one_compiled_graph_of_training_serves_every_batch_size(row):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain = trained(row, dtype=torch.float32)  # torch loses what a graph writes to a float64 scalar
    layer = copy.deepcopy(plain)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")

    def any_size(x: Tensor) -> Tensor:
        torch._dynamo.mark_dynamic(x, 0)
        return compiled(x)

    for n in (6, 8, 10):
        x = batch(n, CHANNELS, 3, 2, seed=n, dtype=torch.float32)
        found, expected = step(any_size, layer, x), step(plain, plain, x)
        if not row.options.get("jitter"):  # a compiled graph draws other numbers
            assert_close(found, expected, 1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def assert_compiles(
    names: Iterable[str],
    training: bool,
    masked: bool,
    channel_dim: int = 1,
    backend: str = "aot_eager",
) -> None:
    torch._dynamo.reset()
    plain = Family(
        training, {name: ROWS[name] for name in names}, dtype=torch.float32, channel_dim=channel_dim
    )
    family = copy.deepcopy(plain)
    compiled = torch.compile(family, fullgraph=True, backend=backend)
    for seed in range(2):
        x = batch(6, CHANNELS, 3, 2, seed=seed, dtype=torch.float32)
        mask = (mask_like(x),) if masked else ()
        x = x.movedim(1, channel_dim).contiguous()
        assert_close(step(compiled, family, x, *mask), step(plain, plain, x, *mask), 1e-4)


@COMPILES
def test_evaluation_compiles_to_one_graph():
    alike = [name for name, row in ROWS.items() if row.by_batch and name not in NORMS]
    assert_compiles([name for name in ROWS if name not in alike], training=False, masked=False)


@COMPILES
@pytest.mark.parametrize("training", TRAINING)
def test_with_a_mask_and_channels_on_the_last_axis_it_compiles_to_one_graph(training):
    assert_compiles([*NORMS, "batch, virtual", "renorm, virtual", "layer, over channels"], training, True, -1)


@COMPILES
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch's own
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_computes_the_same():
    assert_compiles(["renorm", "rms"], True, True, backend="inductor")


@pytest.mark.parametrize("masked", [False, True])
def test_an_exported_evaluation_serves_every_size(row, masked):
    layer = trained(row).eval()
    n, h = Dim("n", min=2), Dim("h", min=2)
    height = 3 if row.by_position else 5
    sizes = [{0: n} if row.by_position else {0: n, 2: h}, {0: n} if row.by_position else {0: n, 1: h}]
    x, other = batch(4, CHANNELS, 3, 2), batch(7, CHANNELS, height, 2)
    example, used = ((x, mask_like(x)), (other, mask_like(other))) if masked else ((x,), (other,))
    exported = torch.export.export(layer, example, dynamic_shapes=tuple(sizes[: len(example)]))
    torch.testing.assert_close(exported.module()(*used), layer(*used))


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # torch's own
def test_onnx_computes_the_same_for_every_batch_size():
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    family = Family(False, ROWS, dtype=torch.float32)
    example = batch(4, CHANNELS, 3, 2, dtype=torch.float32)
    program = torch.onnx.export(
        family, (example,), dynamo=True, verbose=False, dynamic_shapes=({0: Dim("n", min=2)},)
    )
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    x = batch(7, CHANNELS, 3, 2, seed=3, dtype=torch.float32)
    (y,) = session.run(None, {"x": x.numpy()})
    for name, found, expected in zip(ROWS, y, family(x).detach(), strict=True):
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5, msg=name)


def members(row: Row, training: bool) -> tuple[list[Norm], dict[str, Tensor], dict[str, Tensor]]:
    layers = [trained(row, seed).train(training) for seed in range(3)]
    return layers, *stack_module_state(layers)


def ensemble(row: Row, function: Callable[..., Any], *state: dict[str, Tensor]) -> Any:
    """`function` of each member's parameters and buffers, at once."""
    if not any(state):
        pytest.skip("no state to stack")
    return vmap(function, randomness="same")(*state)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("training", TRAINING)
def test_an_ensemble_computes_what_its_members_do(row, training, masked):
    layers, parameters, buffers = members(row, training)
    x = batch(4, CHANNELS, 3, 2, seed=5)
    mask = mask_like(x) if masked else None
    before = [{k: b.clone() for k, b in layer.named_buffers()} for layer in layers]

    def output(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return functional_call(layers[0], (parameters, buffers), (x, mask))

    if training and row.layer is FullNorm:
        with pytest.raises(RuntimeError, match=r"torch\.func cannot do"):
            ensemble(row, output, parameters, buffers)
        return
    y = ensemble(row, output, parameters, buffers)
    for layer, own in zip(layers, before, strict=True):
        assert_close(dict(layer.named_buffers()), own, 0)  # theirs are the stacked ones
    expected = torch.stack([layer(x, mask) for layer in layers])
    if not (training and row.options.get("jitter")):
        torch.testing.assert_close(y, expected)
    for name, stacked in buffers.items():
        torch.testing.assert_close(
            stacked, torch.stack([dict(layer.named_buffers())[name] for layer in layers])
        )


@pytest.mark.parametrize("training", TRAINING)
def test_gradients_of_an_ensemble_are_its_members(row, training):
    if training and row.layer is FullNorm:
        pytest.skip("refuses")
    layers, parameters, buffers = members(row, training)
    x = batch(4, CHANNELS, 3, 2, seed=5)

    def loss(x: Tensor, parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return functional_call(layers[0], (parameters, buffers), (x,)).pow(3).sum()

    found = ensemble(row, lambda p, b: grad(loss, (0, 1))(x, p, b), parameters, buffers)
    for k, layer in enumerate(layers):
        z = x.clone().requires_grad_()
        torch.manual_seed(0)
        layer(z).pow(3).sum().backward()
        if not (training and row.options.get("jitter")):
            torch.testing.assert_close(found[0][k], z.grad)
            for name, parameter in layer.named_parameters():
                torch.testing.assert_close(found[1][name][k], parameter.grad)


def test_gradients_of_each_sample_in_evaluation(row):
    layer = trained(row).eval()
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    x = batch(5, CHANNELS, 3, 2, seed=5)

    def loss(x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(layer, parameters, (x[None],)).pow(3).sum()

    found = vmap(grad(loss, (0, 1)), (0, None))(x, parameters)
    for k, sample in enumerate(x):
        expected = grad(loss, (0, 1))(sample, parameters)
        torch.testing.assert_close(found[0][k], expected[0])
        for name, gradient in expected[1].items():
            torch.testing.assert_close(found[1][name][k], gradient)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch's own, in jvp
@pytest.mark.parametrize("training", TRAINING)
def test_hessians_and_jacobian_vector_products_are_right_or_refused(row, training):
    function, _ = pure(row, training)
    parameters = [p.detach() for p in row.make().parameters()]
    x, v = batch(4, CHANNELS, 2), batch(4, CHANNELS, 2, seed=1)

    def gradient(x: Tensor) -> Tensor:
        return grad(lambda z: function(z, *parameters).pow(3).sum())(x)

    def hessian_vector() -> None:
        found = grad(lambda z: (gradient(z) * v).sum())(x)
        near = [gradient(x + h * v) for h in (1e-5, -1e-5)]
        torch.testing.assert_close(found, (near[0] - near[1]) / 2e-5, rtol=1e-4, atol=1e-4)

    def jacobian_vector() -> None:
        _, found = torch.func.jvp(lambda z: function(z, *parameters), (x,), (v,))
        near = [function(x + h * v, *parameters) for h in (1e-6, -1e-6)]
        torch.testing.assert_close(found, (near[0] - near[1]) / 2e-6, rtol=1e-4, atol=1e-4)

    for check in (hessian_vector, jacobian_vector):
        try:
            check()
        except RuntimeError as error:
            if not (training and row.by_batch and any(reason in str(error) for reason in REFUSED)):
                raise
