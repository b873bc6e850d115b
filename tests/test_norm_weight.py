"""Weight normalization and weight standardization: exact, on any model, initialized from data, trained as a job."""

from __future__ import annotations

import copy
import doctest
import json
import math
import os
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
import yaml
from conftest import SMALL
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import bnlight.norm.weight
import bnlight.norm.weight_init
from bnlight.callbacks import InitializeWeightNorm
from bnlight.cli import main
from bnlight.data import Digits
from bnlight.lightning import Classifier
from bnlight.models import CNN, MLP, ResNet
from bnlight.norm import NORMS, initialize_weight_norm, weight_norm, weight_standardization
from bnlight.surgery import norm_parameters

# name: how to build the layer, and the shape of an input
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(5, 4), (6, 5)),
    "linear on steps": (lambda: nn.Linear(5, 4), (6, 3, 5)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), (5, 4, 7)),
    "conv2d, groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), (5, 4, 7, 6)),
    "conv2d without bias": (lambda: nn.Conv2d(4, 6, 3, bias=False), (5, 4, 7, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (4, 2, 4, 5, 4)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 6, 3), (5, 4, 7)),
    "transposed 2d, groups": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), (5, 4, 5, 6)),
    "transposed 3d, groups": (lambda: nn.ConvTranspose3d(6, 3, 2, groups=3), (4, 6, 3, 4, 3)),
}


@pytest.fixture(params=LAYERS)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    """A layer and an input, float64."""
    torch.manual_seed(0)
    build, shape = LAYERS[request.param]
    return build().double(), torch.randn(shape, dtype=torch.float64)


def outputs(layer: Any, weight: Tensor) -> list[Tensor]:
    """For each output channel, in order, the weights that it is a sum with, found channel by channel."""
    if not isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        return [row.flatten() for row in weight]
    inputs, each = weight.size(0) // layer.groups, weight.size(1)
    return [
        weight[group * inputs : (group + 1) * inputs, i].flatten()
        for group in range(layer.groups)
        for i in range(each)
    ]


def originals(layer: nn.Module) -> tuple[Tensor, Tensor]:
    made: Any = layer.parametrizations["weight"]  # type: ignore[index]
    return made.original0, made.original1


# --- weight normalization


def test_weight_norm_changes_no_output_and_each_length_is_one_output_channels(case):
    layer, x = case
    before, y = layer.weight.detach().clone(), layer(x)
    assert weight_norm(layer) is layer
    torch.testing.assert_close(layer(x), y, rtol=1e-13, atol=1e-13)
    g, v = originals(layer)
    assert torch.equal(v, before)
    norms = torch.stack([row.norm() for row in outputs(layer, before)])
    torch.testing.assert_close(g.flatten(), norms, rtol=1e-14, atol=0)
    with torch.no_grad():  # one length doubled doubles one channel of the weight
        g.view(-1)[2] *= 2
    scaled = [after.norm() / norm for after, norm in zip(outputs(layer, layer.weight), norms, strict=True)]
    torch.testing.assert_close(torch.stack(scaled), torch.ones_like(norms).index_fill(0, torch.tensor(2), 2))


def test_the_gradients_are_those_of_the_paper(case):
    layer, x = case
    plain = copy.deepcopy(layer)
    g, v = originals(weight_norm(layer))
    with torch.no_grad():
        g.mul_(torch.rand_like(g) + 0.5)
        plain.weight.copy_(layer.weight)
    dg, dv = torch.autograd.grad(layer(x).pow(3).sum(), [g, v])
    (dw,) = torch.autograd.grad(plain(x).pow(3).sum(), [plain.weight])
    rows = [outputs(layer, tensor) for tensor in (dw, v.detach(), dv)]
    for dw_i, v_i, dv_i, g_i, dg_i in zip(*rows, g.flatten(), dg.flatten(), strict=True):
        torch.testing.assert_close(dg_i, dw_i @ v_i / v_i.norm(), rtol=1e-10, atol=1e-10)
        expected = g_i / v_i.norm() * dw_i - g_i * dg_i / v_i.norm() ** 2 * v_i
        torch.testing.assert_close(dv_i, expected, rtol=1e-10, atol=1e-10)


def test_it_is_torchs_parametrization_and_loads_from_it_and_from_the_older_one():
    ours, torchs = nn.Linear(3, 2), nn.Linear(3, 2)
    weight_norm(ours)
    parametrizations.weight_norm(torchs)
    ours.load_state_dict(torchs.state_dict(), strict=True)
    assert torch.equal(ours.weight, torchs.weight)
    old = {"bias": torchs.bias, "weight_g": originals(torchs)[0] * 2, "weight_v": originals(torchs)[1]}
    ours.load_state_dict(old, strict=True)
    torch.testing.assert_close(ours.weight, torchs.weight * 2)


def test_removal_makes_the_present_weight_a_parameter_again():
    for change in (weight_norm, weight_standardization):
        layer = change(nn.Conv2d(2, 3, 3))
        present = layer.weight.detach().clone()
        parametrize.remove_parametrizations(layer, "weight")
        assert type(layer) is nn.Conv2d
        assert torch.equal(layer.weight, present)
        assert [name for name, _ in layer.named_parameters()] in (["weight", "bias"], ["bias", "weight"])


# --- weight standardization


def test_a_standardized_weight_is_the_formula_of_each_output_channel(case):
    layer, x = case
    before = layer.weight.detach().clone()
    weight_standardization(layer, eps=1e-3, linear=True)
    for raw, made in zip(outputs(layer, before), outputs(layer, layer.weight.detach()), strict=True):
        centred = raw - raw.mean()
        torch.testing.assert_close(
            made, centred / (centred.square().mean() + 1e-3).sqrt(), rtol=1e-12, atol=1e-12
        )
    assert layer(x).isfinite().all()


def test_it_is_timms_form_with_timms_eps_and_the_authors_up_to_the_unbiased_factor():
    layer = nn.Conv2d(8, 6, 3).double()
    raw = layer.weight.detach().clone()
    made = weight_standardization(layer).weight
    flat = raw.reshape(1, 6, -1)
    timm = F.batch_norm(flat, None, None, training=True, momentum=0.0, eps=1e-6).reshape_as(raw)
    torch.testing.assert_close(made, timm, rtol=1e-12, atol=1e-12)
    centred = raw - raw.mean(dim=(1, 2, 3), keepdim=True)
    authors = centred / (centred.flatten(1).std(dim=1).view(-1, 1, 1, 1) + 1e-5)
    torch.testing.assert_close(made * math.sqrt(71 / 72), authors, rtol=1e-3, atol=0)


def test_large_means_and_equal_weights_are_standardized_without_damage():
    layer = nn.Conv2d(16, 4, 3, bias=False)
    with torch.no_grad():
        layer.weight.add_(100.0)
        layer.weight[0] = 3.0
    exact = weight_standardization(copy.deepcopy(layer).double()).weight
    weight = weight_standardization(layer).weight
    torch.testing.assert_close(weight, exact.float(), rtol=1e-3, atol=1e-3)
    assert torch.equal(weight[0], torch.zeros_like(weight[0]))
    weight.sum().backward()
    assert layer.parametrizations["weight"].original.grad.isfinite().all()


def test_the_parameter_stays_the_same_so_an_optimizer_stays_valid():
    layer = nn.Conv1d(2, 3, 3)
    weight = layer.weight
    assert weight_standardization(layer).parametrizations["weight"].original is weight


def test_linear_layers_are_standardized_only_on_request():
    def network():
        return CNN((1, 8, 8), 10, NORMS["group"])

    plain = weight_standardization(network())
    assert not parametrize.is_parametrized(plain.classifier)
    assert parametrize.is_parametrized(weight_standardization(network(), linear=True).classifier)
    hidden = weight_standardization(network(), linear=True, exclude="classifier")
    assert not parametrize.is_parametrized(hidden.classifier)


# --- both, on whole models

BOTH = pytest.mark.parametrize("change", [weight_norm, weight_standardization])


def network(norm: str = "none", **options: Any) -> CNN:
    torch.manual_seed(1)
    return CNN((1, 8, 8), 10, NORMS[norm], widths=(4, 8), depth=1, **options)


def parametrized(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if parametrize.is_parametrized(module)]


@BOTH
def test_a_state_dict_goes_back_into_a_model_built_alike(change):
    one, other = change(network()), change(network())
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.add_(torch.randn_like(parameter))
    names = {name.rsplit(".", 1)[1] for name in one.state_dict() if "parametrizations" in name}
    assert names == ({"original0", "original1"} if change is weight_norm else {"original"})
    other.load_state_dict(one.state_dict(), strict=True)
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(one(x), other(x))


@BOTH
def test_a_copy_is_independent_and_pickling_is_refused_by_torch(change):
    model = change(network())
    twin = copy.deepcopy(model)
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(model(x), twin(x))
    for parameter in twin.parameters():
        nn.init.ones_(parameter)
    assert not torch.equal(model(x), twin(x))
    with pytest.raises(RuntimeError, match="state_dict"):
        torch.save(model, os.devnull)


@BOTH
@pytest.mark.parametrize("layer", [lambda: nn.Conv2d(4, 6, 3), lambda: nn.ConvTranspose2d(4, 6, 3, groups=2)])
def test_it_compiles_whole_and_exports_in_evaluation(change, layer):
    model = nn.Sequential(change(layer()), nn.ReLU())
    x = torch.randn(2, 4, 8, 8)
    y = model(x)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    compiled(x).square().sum().backward()
    y.square().sum().backward()
    torch.testing.assert_close(compiled(x), y)
    grads = [[p.grad for p in m.parameters()] for m in (model, compiled)]
    torch.testing.assert_close(*grads)
    exported = torch.export.export(model.eval(), (x,))
    torch.testing.assert_close(exported.module()(x), y)


@BOTH
def test_precision_training_flags_and_frozen_weights_are_kept(change):
    layer = nn.Conv2d(4, 6, 3, dtype=torch.bfloat16).eval()
    layer.weight.requires_grad_(False)
    change(layer)
    assert not layer.training
    assert layer.weight.dtype == torch.bfloat16
    assert [p.requires_grad for p in layer.parametrizations.parameters()] == [False] * (
        2 if change is weight_norm else 1
    )
    assert change(nn.Conv2d(4, 6, 3, device="meta")).weight.is_meta


def test_include_and_exclude_choose_layers_by_path():
    every = ["features.0", "features.4", "classifier"]
    assert parametrized(weight_norm(network())) == every
    assert parametrized(weight_norm(network(), include="features.*")) == every[:2]
    assert parametrized(weight_norm(network(), exclude=["classifier", "*.4"])) == every[:1]
    assert parametrized(weight_norm(network(), include=("*",), exclude="f*")) == every[2:]
    with pytest.raises(ValueError, match=r"'classifer' matches none of the layers features.0, .*classifier"):
        weight_norm(network(), exclude="classifer")
    with pytest.raises(ValueError, match="leave no layer"):
        weight_norm(network(), exclude="*")


def lazy() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.LazyConv2d(2, 3))


def zeroed() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 3, 3))
    nn.init.zeros_(model[1].weight[2])
    return model


def hooked() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.utils.spectral_norm(nn.Conv2d(1, 2, 3)))


@pytest.mark.parametrize(
    ("change", "model", "said"),
    [
        (weight_norm, lambda: nn.ReLU(), "ReLU has neither Linear layer nor convolution"),
        (weight_standardization, lambda: nn.Linear(2, 2), "has no convolution; linear=True"),
        (weight_norm, lazy, r"1 \(LazyConv2d.*run one batch"),
        (
            weight_norm,
            lambda: nn.Sequential(nn.Linear(2, 2), weight_norm(nn.Linear(2, 2))),
            "1 .*computed from",
        ),
        (
            weight_norm,
            lambda: weight_standardization(nn.Conv1d(2, 2, 2)),
            "the layer .*remove_parametrizations",
        ),
        (weight_norm, hooked, "1 .*computed from others already"),
        (weight_norm, zeroed, r"1 \(Conv2d.*the first is 2\)"),
        (weight_standardization, lambda: nn.Conv2d(4, 4, 1, groups=4), "one weight per output"),
        (lambda model: weight_standardization(model, eps=-1.0), lambda: nn.Conv1d(2, 2, 2), "eps"),
    ],
)
def test_what_cannot_be_reparametrized_is_refused_in_words_and_left_alone(change, model, said):
    model = model()
    before = list(model.state_dict())
    with pytest.raises(ValueError, match=said):
        change(model)
    assert list(model.state_dict()) == before


@BOTH
def test_modules_and_weights_that_are_shared_stay_shared(change):
    conv, other = nn.Conv1d(2, 2, 3, padding=1), nn.Conv1d(2, 2, 3, padding=1)
    other.weight = conv.weight
    model = change(nn.Sequential(conv, nn.ReLU(), other, conv))
    assert torch.equal(conv.weight, other.weight)
    torch.optim.SGD(model.parameters(), lr=0.1).zero_grad()
    model(torch.randn(4, 2, 5)).square().sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert torch.equal(conv.weight, other.weight)
    assert len([*model.parameters()]) == 2 + (2 if change is weight_norm else 1)


def test_a_weight_shared_with_a_module_that_keeps_it_is_refused():
    model = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5)})
    model["head"].weight = model["embed"].weight
    with pytest.raises(ValueError, match=r"head \(Linear.*embed.weight"):
        weight_norm(model)
    down, up = nn.Conv1d(3, 3, 2), nn.ConvTranspose1d(3, 3, 2)
    up.weight = down.weight  # the same numbers, but other outputs
    with pytest.raises(ValueError, match="same way"):
        weight_norm(nn.Sequential(down, up))


def test_lengths_are_not_decayed_and_directions_are():
    model = weight_norm(nn.Sequential(nn.Linear(3, 4), nn.ConvTranspose1d(4, 4, 2, groups=2)))
    chosen = {id(parameter) for parameter in norm_parameters(model)}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in chosen}
    assert names == {f"{i}.{kind}" for i in "01" for kind in ("bias", "parametrizations.weight.original0")}
    standardized = weight_standardization(nn.Conv1d(2, 2, 2))
    assert [*norm_parameters(standardized)] == [standardized.bias]


# --- data-dependent initialization


@pytest.mark.parametrize("build", [MLP, CNN, lambda *a, **o: ResNet(*a, depth=8, **o)])
def test_every_layers_output_has_mean_0_and_variance_1_in_the_next_forward(build):
    model = weight_norm(build((1, 8, 8), 10, NORMS["none"]).double())
    x = torch.randn(32, 1, 8, 8, dtype=torch.float64) * 3 + 1
    assert initialize_weight_norm(model, (x, "labels")) is model
    seen: list[Tensor] = []
    for module in model.modules():
        if parametrize.is_parametrized(module):
            module.register_forward_hook(lambda module, args, output: seen.append(output))
    model(x)
    assert len(seen) == len(parametrized(model)) >= 4
    for t in seen:
        variance, mean = torch.var_mean(t.transpose(0, 1).flatten(1), 1, correction=0)
        torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-12, rtol=0)
        torch.testing.assert_close(variance, torch.ones_like(mean), atol=1e-11, rtol=0)


def test_length_and_bias_are_those_of_the_paper(case):
    layer, x = case
    v = layer.weight.detach().clone()
    weight_norm(layer)
    unit = copy.deepcopy(layer)
    with torch.no_grad():
        originals(unit)[0].fill_(1)
        if unit.bias is not None:
            unit.bias.zero_()
        t = unit(x)
        originals(layer)[0].fill_(0)  # what it was before does not matter
    axis = t.dim() - 1 if isinstance(layer, nn.Linear) else 1
    variance, mean = torch.var_mean(t.movedim(axis, 0).flatten(1), 1, correction=0)
    initialize_weight_norm(layer, x)
    g, direction = originals(layer)
    torch.testing.assert_close(g.flatten(), variance.rsqrt())
    assert torch.equal(direction, v)
    if layer.bias is not None:
        torch.testing.assert_close(layer.bias, -mean * variance.rsqrt())


def test_unbatched_input_and_a_forward_of_ones_own():
    conv = weight_norm(nn.Conv1d(2, 3, 2).double())
    x = torch.randn(2, 50, dtype=torch.float64)
    initialize_weight_norm(conv, {"x": x}, forward=lambda batch: conv(batch["x"]))
    torch.testing.assert_close(conv(x).mean(dim=1), torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(conv(x).square().mean(dim=1), torch.ones(3, dtype=torch.float64))


def test_a_layer_called_twice_is_initialized_at_its_first_call():
    layer = weight_norm(nn.Linear(3, 3).double())
    x = torch.randn(20, 3, dtype=torch.float64)
    initialize_weight_norm(nn.Sequential(layer, nn.ReLU(), layer), x)
    torch.testing.assert_close(torch.var(layer(x), 0, correction=0), torch.ones(3, dtype=torch.float64))


def test_running_statistics_move_by_one_forward_in_training_and_not_in_evaluation():
    for training in (True, False):
        model = weight_norm(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))).train(
            training
        )
        initialize_weight_norm(model, torch.randn(9, 3))
        assert model.training == training
        assert int(model[1].num_batches_tracked) == training
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_dead_outputs_and_layers_not_called_keep_what_they_have_and_are_named():
    model = nn.ModuleDict({"used": nn.Linear(3, 2), "idle": nn.Linear(3, 2)})
    weight_norm(model)
    with torch.no_grad():
        originals(model["used"])[1][0] = torch.tensor([1.0, 0.0, 0.0])
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(10, 3)
    x[:, 0] = 7.0  # so the first output is the same throughout
    with (
        pytest.warns(UserWarning, match=r"1 of 2 outputs of used \(.*same throughout"),
        pytest.warns(UserWarning, match=r"did not call idle \("),
    ):
        initialize_weight_norm(model, x, forward=model["used"])
    after = model.state_dict()
    for name, value in after.items():
        assert torch.equal(value[0], before[name][0]), name
        if "idle" in name:
            assert torch.equal(value, before[name])
    assert after["used.bias"][1] != before["used.bias"][1]


@pytest.mark.parametrize(
    ("x", "said"),
    [
        (torch.randn(1, 3), r"0 \(.*shape \(1, 4\), less than two values"),
        (torch.full((5, 3), math.nan), "not finite"),
        (torch.randn(5, 4), "mat1 and mat2"),
    ],
)
def test_an_error_leaves_the_model_as_it_was(x, said):
    model = weight_norm(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises((ValueError, RuntimeError), match=said):
        initialize_weight_norm(model, x)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_an_error_in_a_later_layer_undoes_the_earlier_ones():
    def fail(batch):
        model[0](batch)
        raise RuntimeError("as asked")

    model = weight_norm(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="as asked"):
        initialize_weight_norm(model, torch.randn(8, 3), forward=fail)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_without_weight_norm_is_refused():
    with pytest.raises(ValueError, match=r"call weight_norm\(model\) first"):
        initialize_weight_norm(weight_standardization(network()), torch.randn(2, 1, 8, 8))


@pytest.mark.parametrize("module", [bnlight.norm.weight, bnlight.norm.weight_init])
def test_the_examples_run(module):
    found = doctest.testmod(module)
    assert found.attempted
    assert not found.failed


# --- jobs

FEW = [f"+trainer.limit_{stage}_batches=2" for stage in ("train", "val", "test")]
INITIALIZED = ["callbacks=[default,initialize_weight_norm]"]
PLAIN = [argument for argument in SMALL if not argument.startswith("model")]


def job_of(project: Path) -> Path:
    (job,) = (path for path in (project / "outputs" / "train").iterdir() if path.is_dir())
    return job


@pytest.mark.parametrize(
    "arguments",
    [
        [
            "weight=weight_norm",
            "model=mlp",
            "model.depth=1",
            *INITIALIZED,
            "trainer.precision=bf16-true",
        ],
        ["weight=weight_norm", "model=cnn", "model.widths=[4,4]", *INITIALIZED],
        ["weight=weight_norm", "model=resnet", "model.depth=8", "model.width=4", "weight.exclude=classifier"],
        ["weight=weight_standardization", "norm=group", "model=resnet", "model.depth=8", "model.width=4"],
    ],
)
def test_it_trains_from_the_command_line_and_its_checkpoints_load(
    project: Path, arguments: list[str]
) -> None:
    assert main(["train", *PLAIN, *FEW, "norm=none", *arguments]) == 0
    path = job_of(project) / "checkpoints" / "best.ckpt"
    torch.load(path, weights_only=True)
    module = Classifier.load_from_checkpoint(path).eval()
    assert parametrized(module.model)
    assert ("classifier" in parametrized(module.model)) == (
        "weight=weight_norm" in arguments and "weight.exclude=classifier" not in arguments
    )
    assert module(torch.zeros(2, 1, 8, 8, dtype=module.dtype)).shape == (2, 10)


def test_the_weight_is_part_of_a_jobs_identity(project: Path) -> None:
    options = [[], ["weight=weight_norm"], ["weight=weight_norm", *INITIALIZED]]
    for option in options:
        assert main(["train", *SMALL, *FEW, "norm=none", *option]) == 0
    jobs = [path.parent for path in project.glob("outputs/train/*/result.json")]
    assert len(jobs) == len(options)
    chosen = [yaml.safe_load((job / "config.yaml").read_text())["job"]["choices"]["weight"] for job in jobs]
    assert sorted(chosen) == ["none", "weight_norm", "weight_norm"]


def test_an_unknown_option_lists_the_choices_and_a_model_without_convolutions_says_what_to_do(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *SMALL, "weight=weight_nrom"]) == 2
    assert "weight_standardization" in capsys.readouterr().err
    assert main(["train", *SMALL, *INITIALIZED]) == 1
    assert "weight=weight_norm" in capsys.readouterr().out
    assert main(["train", *SMALL, "weight=weight_standardization"]) == 1
    assert "MLP has no convolution; linear=True" in capsys.readouterr().out


class Spy(InitializeWeightNorm):
    """Notes the steps before which the first layer's length changes, and its outputs' variance then."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, float]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        layer = pl_module.model.features[1]
        before = originals(layer)[0].detach().clone()
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if not torch.equal(originals(layer)[0], before):
            variance = layer(batch[0].flatten(1)).var(0, correction=0).mean().item()
            self.seen.append((trainer.global_step, variance))


def test_the_first_batch_initializes_a_training_and_a_resumed_one_is_left_alone(tmp_path: Path) -> None:
    def fit(epochs: int, checkpoint: Path | None) -> list[tuple[int, float]]:
        model = weight_norm(MLP((1, 8, 8), 10, NORMS["none"], width=8, depth=1))
        module = Classifier(model, 10, partial(torch.optim.SGD, lr=0.1))
        spy = Spy()
        trainer = pl.Trainer(
            max_epochs=epochs, callbacks=[spy], accelerator="cpu", default_root_dir=tmp_path, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            num_sanity_val_steps=0, accumulate_grad_batches=4,
        )  # fmt: skip
        trainer.fit(module, datamodule=Digits(seed=0), ckpt_path=checkpoint)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return spy.seen

    ((step, variance),) = fit(1, None)
    assert step == 0
    assert variance == pytest.approx(1, abs=1e-4)
    assert fit(2, tmp_path / "last.ckpt") == []


# A data module that notes the variance of the first layer's outputs in the first step (the initialization's own
# forward comes before it), and at the end of training a checksum of each parameter.
MINE = """
import json, os, pathlib
from bnlight.data import Digits

class Data(Digits):
    def setup(self, stage):
        super().setup(stage)
        if stage == "fit":
            self.variances = []
            self.trainer.lightning_module.model.features[1].register_forward_hook(self.note)

    def note(self, layer, args, output):
        self.variances.append(output.var(0, correction=0).mean().item())

    def teardown(self, stage):
        if stage == "fit":
            sums = [p.detach().double().sum().item() for p in self.trainer.lightning_module.parameters()]
            seen = {"variance": self.variances[1], "sums": sums}
            pathlib.Path(f"seen-{os.environ['RANK']}.json").write_text(json.dumps(seen))
"""


def test_two_ranks_start_from_rank_0s_batch_and_stay_equal(
    project: Path, bnlight: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    (project / "mine.py").write_text(MINE)
    arguments = [*SMALL, "trainer=ddp", "trainer.accelerator=cpu", "data=custom", "data._target_=mine.Data"]
    done = bnlight("train", *arguments, "norm=none", "weight=weight_norm", *INITIALIZED)
    assert done.returncode == 0, done.stdout + done.stderr
    zero, one = (json.loads((project / f"seen-{rank}.json").read_text()) for rank in (0, 1))
    assert zero["sums"] == one["sums"]
    assert zero["variance"] == pytest.approx(1, abs=1e-4)
    assert one["variance"] != pytest.approx(1, abs=1e-4)
