"""What fold_norm leaves, since folding it would compute something else; torch's own fusions as a comparison."""

import warnings
from typing import Any

import pytest
import torch
from folding import error, trained
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.fusion import fuse_conv_bn_eval

import bnlight
from bnlight.norm import BatchLayerNorm, BatchNorm, NoNorm, weight_norm, weight_standardization
from bnlight.surgery import fold_norm

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, of torch.jit
    from torch.fx.experimental.optimization import fuse


class Twice(nn.Module):
    """One convolution, called in two places; `order` says what is done with it."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.conv, self.norm, self.other = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        match self.order:
            case "norm and not":
                return self.norm(self.conv(x)) + self.conv(x)
            case "two norms":
                return self.other(self.conv(self.norm(self.conv(x))))
            case "one output":
                y = self.conv(x)
                return self.norm(y) + y
            case "as a pair":
                return self.norm(self.conv(self.norm(self.conv(x))))
        raise AssertionError


@pytest.mark.parametrize("order", ["norm and not", "two norms"])
def test_shared_layers_stay_where_torch_is_wrong(order: str) -> None:
    model, x = trained(Twice(order)), torch.randn(2, 4, 3, 3)
    assert error(model, fuse(model), x) > 0.1
    folded = fold_norm(model)
    assert folded.fold_report.folded == {}
    assert error(model, folded, x) == 0


def test_an_output_that_goes_elsewhere_keeps_its_norm_and_a_pair_that_is_shared_folds() -> None:
    x = torch.randn(2, 4, 3, 3)
    assert "goes elsewhere" in fold_norm(trained(Twice("one output"))).fold_report.kept["norm"]
    pair = trained(Twice("as a pair"))
    assert fold_norm(pair).fold_report.folded == {"norm": "conv"}
    assert error(pair, fold_norm(pair), x) < 1e-6


class NormAndReLU(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class PaddedConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.pad(x, (1, 1, 1, 1), value=1.0)).abs()


class SameNorm(nn.BatchNorm2d):
    """A subclass that changes nothing about evaluation."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.constant_(self.weight, 0.5)


def test_behaviour_of_subclasses_is_kept_where_torch_loses_it() -> None:
    x = torch.randn(2, 4, 3, 3)
    model = trained(nn.Sequential(nn.Conv2d(4, 4, 1), NormAndReLU(4)))
    assert error(model, fuse_conv_bn_eval(model[0], model[1]), x) > 0.1
    assert error(model, fold_norm(model), x) == 0
    assert fold_norm(model).fold_report.kept == {"1": "NormAndReLU has a forward of its own"}
    model = trained(nn.Sequential(PaddedConv(4, 4, 1), nn.BatchNorm2d(4)))
    assert error(model, fold_norm(model), x) == 0
    assert "'0' is a PaddedConv" in fold_norm(model).fold_report.kept["1"]
    model = trained(nn.Sequential(nn.Conv2d(4, 4, 1), SameNorm(4)))
    assert fold_norm(model).fold_report.folded == {"1": "0"}


@pytest.mark.parametrize("place", ["0", "1", "outer.0"])
def test_hooks_see_and_change_what_they_did(place: str) -> None:
    seen: list[Tensor] = []
    inner = nn.Sequential(nn.Conv2d(4, 4, 1))
    model = trained(nn.Sequential(inner if "." in place else inner[0], nn.BatchNorm2d(4)))
    x = torch.randn(2, 4, 3, 3)

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        seen.append(output)
        return output * 2

    model[int(place[-1])].register_forward_hook(hook)
    folded = fold_norm(model)
    assert seen == []  # tracing has not called it
    assert folded.fold_report.folded == {}
    assert error(model, folded, x) == 0
    if place == "0":
        assert error(model, fuse(model), x) > 0.1


def test_a_hook_on_the_container_of_both_does_not_mind() -> None:
    model = trained(nn.Sequential(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)), nn.ReLU()))
    model[0].register_forward_hook(lambda module, args, output: output + 1)
    model[0].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    assert fold_norm(model).fold_report.folded == {"0.1": "0.0"}
    assert error(model, fold_norm(model), torch.randn(2, 4, 3, 3)) < 1e-6


class Branching(nn.Module):
    """Asks for values in the middle; `body` is called as a whole, `parts` are not."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.parts = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        y = self.conv(x)
        if y.mean() > 0:
            return self.norm(y)
        for part in self.parts:
            y = part(y) + y
        return y


def test_what_depends_on_data_is_left_and_the_rest_is_folded() -> None:
    model = trained(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), Branching()))
    with pytest.raises(torch.fx.proxy.TraceError):
        fuse(model)
    folded = fold_norm(model)
    report = folded.fold_report
    assert report.folded == {"1": "0", "2.body.1": "2.body.0"}
    assert "'2' cannot be traced (TraceError" in report.kept["2.norm"]
    assert "takes parts apart" in report.kept["2.parts.1"]
    for _ in range(4):
        assert error(model, folded, torch.randn(1, 4, 2, 2)) < 1e-6


class Optional(nn.Module):
    """Masked or not, with or without its norm, as its caller says."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(4, 4, 1), BatchNorm(4)
        self.first, self.second = nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.norm(self.conv(x), mask)
        if mask is None:
            return self.second(self.first(x))
        return self.second(self.first(x) * 2)


def test_what_an_optional_argument_changes_is_not_folded() -> None:
    model, x = trained(Optional()), torch.randn(2, 4, 5)
    folded = fold_norm(model)
    assert folded.fold_report.folded == {}
    assert "more than its input" in folded.fold_report.kept["norm"]
    assert error(model, folded, x, mask=torch.rand(2, 5) > 0.5) == 0


class Reader(nn.Module):
    """Uses its layer's weight, or only asks for a shape, besides calling it."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4)
        self.what = what

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.what == "weight":
            return self.norm(y) + self.conv.weight.sum()
        if self.what == "statistics":
            return self.norm(y) + self.norm.running_mean.sum()
        return self.norm(y).reshape(y.size(0), y.shape[1], -1)


def test_parameters_that_are_used_elsewhere_stay_and_a_shape_is_no_use() -> None:
    x = torch.randn(2, 4, 5)
    for what in ("weight", "statistics"):
        model = trained(Reader(what))
        assert "used outside of it" in fold_norm(model).fold_report.kept["norm"]
        assert error(model, fold_norm(model), x) == 0
    model = trained(Reader("shape"))
    assert fold_norm(model).fold_report.folded == {"norm": "conv"}
    assert error(model, fold_norm(model), x) < 1e-6


def spectral(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return torch.nn.utils.spectral_norm(layer)


def old_weight_norm(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return torch.nn.utils.weight_norm(layer)


@pytest.mark.parametrize(
    "compute",
    [
        weight_norm,
        weight_standardization,
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        old_weight_norm,
        spectral,
    ],
    ids=["ours", "standardization", "weight_norm", "spectral_norm", "old weight_norm", "old spectral_norm"],
)
def test_computed_weights_become_plain_ones_in_the_copy_only(compute: Any) -> None:
    model = trained(nn.Sequential(compute(nn.Conv2d(4, 4, 3)), nn.BatchNorm2d(4)))
    x = torch.randn(2, 4, 5, 5)
    expected = model(x)
    folded = fold_norm(model)
    assert folded.fold_report.folded == {"1": "0"}
    assert type(folded[0]) is nn.Conv2d
    assert [name for name, _ in folded.named_parameters()] == ["0.bias", "0.weight"] or set(
        folded.state_dict()
    ) == {
        "0.weight",
        "0.bias",
    }
    assert torch.equal(model(x), expected)
    assert parametrize.is_parametrized(model[0]) or model[0]._forward_pre_hooks
    assert error(model, folded, x) < 1e-6


def test_layers_that_share_a_weight_get_one_each() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.ReLU())
    model[2].weight = model[0].weight
    folded = fold_norm(trained(model))
    assert torch.equal(folded[2].weight, model[2].weight)
    assert not torch.equal(folded[0].weight, model[0].weight)
    assert error(model, folded, torch.randn(2, 4, 3, 3)) < 1e-6


def test_norms_that_look_at_the_input_in_evaluation_stay() -> None:
    corrected = nn.Sequential(nn.Conv1d(3, 4, 1), BatchNorm(4)).eval()
    bnlight.correct_inference(corrected, 0.3)
    tracked = nn.Sequential(nn.Conv1d(3, 4, 1), nn.InstanceNorm1d(4, affine=True, track_running_stats=True))
    for model, folds in (
        (corrected, False),
        (nn.Sequential(nn.Conv1d(3, 4, 1), BatchLayerNorm(4)), False),
        (nn.Sequential(nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4, track_running_stats=False)), False),
        (nn.Sequential(nn.Conv1d(3, 4, 1), nn.InstanceNorm1d(4)), False),
        (trained(tracked), True),
        (trained(nn.Sequential(nn.Conv1d(3, 4, 1), NoNorm(4, affine=True))), True),
    ):
        folded = fold_norm(model)
        assert len(folded.fold_report.folded) == folds
        assert error(model, folded, torch.randn(2, 3, 5)) < 1e-6
