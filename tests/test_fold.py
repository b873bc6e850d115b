"""fold_norm computes in evaluation what the model does, without its norms; torch's own fusions as a comparison."""

import copy
import doctest
import pickle
import warnings
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from folding import error, norms_of, trained
from torch import Tensor, nn
from torch.nn.parallel import DataParallel
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from zoo import ZOO, BasicBlock

from bnlight.models import CNN, MLP, ResNet
from bnlight.norm import BatchNorm, BatchRenorm, FullNorm, MeanOnlyBatchNorm, Norm
from bnlight.surgery import fold, fold_norm, freeze_norm, sync_norm
from bnlight.surgery.parameters import TORCH_NORMS

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, of torch.jit
    from torch.fx.experimental.optimization import fuse


def state_of(model: nn.Module) -> tuple[Any, ...]:
    tensors = {key: (id(t), t._version, t.clone()) for key, t in model.state_dict(keep_vars=True).items()}
    return tensors, [(m, type(m), m.training, dict(m._modules)) for m in model.modules()]


def same(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    tensors = all(
        a[:2] == b[:2] and torch.equal(a[2], b[2])
        for a, b in zip(one[0].values(), other[0].values(), strict=True)
    )
    return tensors and one[1] == other[1]


@pytest.mark.parametrize("name", sorted(set(ZOO) - {"lazy"}))
def test_the_zoo_computes_what_it_did_and_stays_as_it_was(name: str) -> None:
    model, x = ZOO[name]()
    model.train()
    before, random = state_of(model), torch.get_rng_state()
    folded = fold_norm(model)
    assert same(before, state_of(model))
    assert torch.equal(random, torch.get_rng_state())
    limit = {torch.bfloat16: 2e-2, torch.float32: 1e-6, torch.float64: 1e-14}[x.dtype]
    assert error(model, folded, x) < limit
    paths = {path for path, m in model.named_modules() if isinstance(m, (Norm, *TORCH_NORMS))}
    assert {*folded.fold_report.folded, *folded.fold_report.kept} == paths
    for path in folded.fold_report.folded:
        assert isinstance(folded.get_submodule(path), nn.Identity)


@pytest.mark.parametrize(
    "name", ["torchvision_resnet", "unet", "mlp", "conv1d", "conv3d", "half", "parametrized"]
)
def test_what_can_be_folded_leaves_no_norm(name: str) -> None:
    assert norms_of(fold_norm(ZOO[name]()[0])) == []


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, BatchNorm, BatchRenorm, FullNorm, MeanOnlyBatchNorm])
@pytest.mark.parametrize(
    "build",
    [
        lambda norm: CNN((3, 8, 8), 5, norm, widths=(8, 16), dropout=0.1),
        lambda norm: ResNet((3, 8, 8), 5, norm, depth=8),
        lambda norm: ResNet((3, 32, 32), 5, norm, depth=18, width=4, style="imagenet"),
        lambda norm: ResNet((3, 32, 32), 5, norm, depth=50, width=2, style="imagenet"),
    ],
    ids=["cnn", "resnet8", "resnet18", "resnet50"],
)
def test_our_convolutional_networks_fold_completely(norm: Any, build: Any) -> None:
    model = trained(build(norm))
    folded = fold_norm(model)
    assert norms_of(folded) == []
    x = (
        torch.randn(4, 3, 32, 32)
        if "imagenet" in str(model) or len(norms_of(model)) > 8
        else torch.randn(4, 3, 8, 8)
    )
    assert error(model.double(), folded.double(), x.double()) < 1e-6


@pytest.mark.parametrize("placement", ["before", "after"])
@pytest.mark.parametrize("norm", [nn.BatchNorm1d, BatchNorm, BatchRenorm])
def test_our_mlp_folds_completely_wherever_its_norms_stand(norm: Any, placement: str) -> None:
    model = trained(MLP((6,), 3, norm, placement=placement, dropout=0.2, normalize_input=True))
    folded = fold_norm(model)
    assert norms_of(folded) == []
    assert error(model, folded, torch.randn(5, 6)) < 1e-6


LAYERS = {
    f"{kind.__name__}{options}": (kind, rank, options)
    for rank, kinds in enumerate(
        [
            (nn.Conv1d, nn.ConvTranspose1d),
            (nn.Conv2d, nn.ConvTranspose2d),
            (nn.Conv3d, nn.ConvTranspose3d),
        ],
        1,
    )
    for kind in kinds
    for options in (
        {},
        {"groups": 2, "stride": 2},
        {"dilation": 2, "bias": False, "padding": 1},
        {"groups": 4},
    )
}
NORM_OF_RANK = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


@pytest.mark.parametrize("name", LAYERS)
def test_every_convolution_takes_the_norm_behind_it(name: str) -> None:
    kind, rank, options = LAYERS[name]
    x = torch.randn(2, 4, *[7] * rank)
    for norm in (NORM_OF_RANK[rank], BatchNorm, nn.SyncBatchNorm):
        model = trained(nn.Sequential(kind(4, 8, 3, **options), norm(8)))
        folded = fold_norm(model)
        assert folded.fold_report.folded == {"1": "0"}
        assert error(model, folded, x) < 1e-6


@pytest.mark.parametrize(
    "name", [name for name in LAYERS if "Transpose" not in name and "padding" not in name]
)
def test_every_convolution_without_padding_takes_the_norm_before_it(name: str) -> None:
    kind, rank, options = LAYERS[name]
    model = trained(nn.Sequential(BatchNorm(4), kind(4, 8, 3, **options), NORM_OF_RANK[rank](8)))
    folded = fold_norm(model)
    assert folded.fold_report.folded == {"0": "1", "2": "1"}
    assert error(model, folded, torch.randn(2, 4, *[7] * rank)) < 1e-6


def test_a_norm_before_zero_padding_stays_and_before_other_padding_does_not() -> None:
    x = torch.randn(2, 4, 6, 6)
    zeros = trained(nn.Sequential(BatchNorm(4), nn.Conv2d(4, 8, 3, padding=1)))
    assert "pads with zeros" in fold_norm(zeros).fold_report.kept["0"]
    for padding in (1, "same"):
        mirrored = trained(
            nn.Sequential(BatchNorm(4), nn.Conv2d(4, 8, 3, padding=padding, padding_mode="reflect"))
        )
        assert fold_norm(mirrored).fold_report.folded == {"0": "1"}
        assert error(mirrored, fold_norm(mirrored), x) < 1e-6
    transposed = trained(nn.Sequential(BatchNorm(4), nn.ConvTranspose2d(4, 8, 3)))
    assert "transposed" in fold_norm(transposed).fold_report.kept["0"]


def test_a_transposed_convolution_with_groups_is_right_where_torch_fails() -> None:
    model = trained(nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)))
    x = torch.randn(2, 4, 5, 5)
    with pytest.raises(RuntimeError, match="must match the size"):
        fuse_conv_bn_eval(model[0], model[1], transpose=True)
    assert nn.BatchNorm2d in map(type, fuse(model).modules())  # fx leaves it
    assert error(model, fold_norm(model), x) < 1e-6


def test_batch_norm_behind_linear_with_positions_is_refused_where_torch_is_wrong() -> None:
    model = trained(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)))
    rows, positions = torch.randn(7, 4), torch.randn(2, 5, 4)  # (N, L, F) with L = F: axis 1 is L
    assert error(model, fuse_linear_bn_eval(model[0], model[1]), positions) > 0.1
    folded = fold_norm(model)
    assert error(model, folded, rows) < 1e-6
    with pytest.raises(ValueError, match=r"'1', BatchNorm1d.*input \(N, C\), and got \(2, 5, 5\)"):
        folded(positions)
    assert error(model, fold_norm(model, exclude="1"), positions) == 0
    other = trained(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(5)))
    assert "5 channels, Linear 6" in fold_norm(other).fold_report.kept["1"]
    assert error(other, fold_norm(other), positions) == 0


def test_channels_last_behind_linear_takes_any_rank() -> None:
    model = trained(
        nn.Sequential(nn.Linear(4, 5), BatchNorm(5, channel_dim=-1), BatchNorm(5, channel_dim=-1))
    )
    folded = fold_norm(model)
    assert folded.fold_report.folded == {"1": "0", "2": "0"}
    assert error(model, folded, torch.randn(2, 3, 4)) < 1e-6
    conv = trained(nn.Sequential(nn.Conv2d(4, 5, 1), BatchNorm(5, channel_dim=-1)))
    assert "the last axis" in fold_norm(conv).fold_report.kept["1"]


def test_the_report_is_a_table_and_exclude_names_norms() -> None:
    model = nn.Sequential(
        nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4), nn.ReLU(), nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4)
    )
    assert str(fold_norm(model, exclude=["4"]).fold_report).splitlines() == [
        "1 of 2 norms folded",
        "  1  into 0",
        "  4  stays: excluded",
    ]
    with pytest.raises(ValueError, match="'head' matches none of the layers 1, 4"):
        fold_norm(model, exclude="head")


def test_the_copy_keeps_types_and_stays_in_evaluation() -> None:
    model = trained(BasicBlock(3, 4, 2))
    folded = fold_norm(model)
    assert isinstance(folded, BasicBlock)
    assert {type(m) for m in folded.modules()} <= {type(m) for m in model.modules()} | {
        type(folded),
        nn.Identity,
    }
    assert not any(m.training for m in nn.Sequential(folded, nn.ReLU()).train()[0].modules())
    assert model.train().training


@pytest.mark.parametrize("weight", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_weight_and_bias_are_trained_if_each_was(weight: bool, bias: bool) -> None:
    layer = nn.Linear(3, 3)
    layer.weight.requires_grad, layer.bias.requires_grad = weight, bias
    folded: Any = fold_norm(nn.Sequential(layer, nn.BatchNorm1d(3)))
    assert (folded[0].weight.requires_grad, folded[0].bias.requires_grad) == (weight, bias)


def test_the_copy_pickles_copies_exports_and_compiles(tmp_path: Any) -> None:
    model, x = trained(CNN((3, 8, 8), 5, BatchNorm, widths=(8,))), torch.randn(4, 3, 8, 8)
    folded = fold_norm(model)
    for twin in (pickle.loads(pickle.dumps(folded)), copy.deepcopy(folded)):
        assert torch.equal(twin(x), folded(x))
        assert twin.fold_report == folded.fold_report
        assert not twin.train().training
    exported = torch.export.export(folded, (x,))
    assert "batch_norm" not in str(exported.graph)
    assert torch.allclose(exported.module()(x), folded(x), atol=1e-6)
    compiled = torch.compile(folded, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x), folded(x), atol=1e-6)
    mlp = fold_norm(trained(MLP((6,), 3, nn.BatchNorm1d, depth=1)))  # with the guard of (N, C)
    rows = torch.randn(4, 6)
    assert torch.allclose(torch.export.export(mlp, (rows,)).module()(rows), mlp(rows), atol=1e-6)
    again = fold_norm(folded)
    assert again.fold_report.folded == {}
    assert torch.equal(again(x), folded(x))


def test_the_copy_goes_to_onnx(tmp_path: Any) -> None:
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    folded, x = fold_norm(trained(CNN((3, 8, 8), 5, BatchNorm, widths=(8,)))), torch.randn(4, 3, 8, 8)
    file = tmp_path / "net.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(folded, (x,), file, dynamo=True, verbose=False)
    assert "BatchNormalization" not in {node.op_type for node in onnx.load(file).graph.node}
    session = runtime.InferenceSession(file)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert torch.allclose(torch.from_numpy(found), folded(x), atol=1e-5)


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = MLP((6,), 3, BatchNorm, depth=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def test_synchronized_and_frozen_norms_fold() -> None:
    x = torch.randn(4, 3, 8, 8)
    for norm in (nn.BatchNorm2d, nn.SyncBatchNorm, BatchNorm):
        model = trained(nn.Sequential(nn.Conv2d(3, 5, 3), norm(5)))
        for change in (sync_norm, freeze_norm):
            folded = fold_norm(change(model))
            assert folded.fold_report.kept == {}
            assert error(model, folded, x) < 1e-6


def test_wrapped_and_foreign_models_fold() -> None:
    x = torch.randn(4, 6)
    for model in (Module(), torch.fx.symbolic_trace(trained(MLP((6,), 3, nn.BatchNorm1d, depth=1)))):
        assert norms_of(fold_norm(model)) == []
        assert error(model, fold_norm(model), x) < 1e-6
    inner = trained(MLP((6,), 3, BatchNorm, depth=1))
    assert isinstance(fold_norm(DataParallel(inner)), MLP)
    compiled = fold_norm(torch.compile(inner, backend="eager"))
    assert norms_of(compiled) == []
    assert error(inner, compiled, x) < 1e-6
    parts = torch.compile(trained(nn.BatchNorm1d(6)), backend="eager"), torch.compile(inner, backend="eager")
    model = nn.Sequential(nn.Linear(6, 6), *parts)
    assert norms_of(fold_norm(model)) == []
    assert error(model, fold_norm(model), x) < 1e-6
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(nn.Sequential(nn.ReLU()))
    with pytest.raises(TypeError, match="scripted"):
        fold_norm(scripted)
    with pytest.raises(ValueError, match=r"'0' \(LazyConv2d\) has no values yet"):
        fold_norm(ZOO["lazy"]()[0])
    assert fold_norm(nn.BatchNorm1d(3)).fold_report.kept == {"": "the model is this layer alone"}


def test_the_example_runs() -> None:
    result = doctest.testmod(fold)
    assert result.attempted
    assert result.failed == 0
