"""The networks: shapes, sizes, where norms and biases are, how they start, what they refuse."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from bnlight.models import ACTIVATIONS, CNN, MLP, ResNet
from bnlight.models.block import Blocks, gain


class AnyBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm for any rank that makes a bias before it redundant, as bnlight's does."""

    cancels_bias = True

    def _check_input_dim(self, input: torch.Tensor) -> None:
        pass


def group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(1, channels)


def no_norm(channels: int) -> nn.Module:
    return nn.Identity()


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "mlp": MLP,
    "cnn": CNN,
    "resnet": lambda *args, **options: ResNet(*args, **{"depth": 8} | options),
}
SHAPES = [(1, 8, 8), (1, 28, 28), (3, 32, 32)]


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("placement", ["before", "after"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("norm", [AnyBatchNorm, group_norm, no_norm])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_maps_images_to_logits_and_trains(
    name: str, norm: Any, shape: tuple[int, ...], placement: str
) -> None:
    model = NETWORKS[name](shape, 7, norm, placement=placement)
    logits = model(torch.randn(5, *shape))
    assert logits.shape == (5, 7)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_an_mlp_takes_plain_features_and_lists_for_shapes() -> None:
    assert MLP([13], 3, no_norm)(torch.randn(4, 13)).shape == (4, 3)
    assert CNN([1, 8, 8], 3, no_norm, widths=[4])(torch.randn(4, 1, 8, 8)).shape == (4, 3)


# torchvision's published numbers of parameters, with 1000 classes
@pytest.mark.parametrize(
    ("depth", "count"), [(18, 11689512), (34, 21797672), (50, 25557032), (101, 44549160), (152, 60192808)]
)
def test_an_imagenet_resnet_has_as_many_parameters_as_torchvisions(depth: int, count: int) -> None:
    with torch.device("meta"):
        model = ResNet((3, 224, 224), 1000, AnyBatchNorm, depth=depth, style="imagenet")
    assert parameters(model) == count


# He et al. 2016, table 6, in millions
@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)])
def test_a_cifar_resnet_has_as_many_parameters_as_in_the_paper(depth: int, millions: float) -> None:
    with torch.device("meta"):
        model = ResNet((3, 32, 32), 10, AnyBatchNorm, depth=depth)
    assert parameters(model) / 1e6 == pytest.approx(millions, abs=0.05 if millions > 1 else 0.005)
    weighted = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(weighted) == depth


def test_a_cifar_resnet_has_no_parameters_in_its_shortcuts() -> None:
    model = ResNet((3, 32, 32), 10, AnyBatchNorm, depth=20)
    assert not [name for name, _ in model.named_parameters() if "shortcut" in name]
    assert parameters(model) == 269722


def biases(model: nn.Module) -> list[bool]:
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    return [layer.bias is not None for layer in layers[:-1]]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_bias_is_dropped_only_where_the_next_layer_is_a_norm_that_cancels_it(name: str) -> None:
    network = NETWORKS[name]
    assert not any(biases(network((1, 8, 8), 3, AnyBatchNorm)))
    assert all(biases(network((1, 8, 8), 3, AnyBatchNorm, placement="after")))
    assert all(biases(network((1, 8, 8), 3, group_norm)))
    assert all(biases(network((1, 8, 8), 3, no_norm)))
    assert network((1, 8, 8), 3, AnyBatchNorm).classifier.bias is not None


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_the_norm_is_before_or_after_the_activation(name: str) -> None:
    for placement, order in (("before", (AnyBatchNorm, nn.Tanh)), ("after", (nn.Tanh, AnyBatchNorm))):
        model = NETWORKS[name]((1, 8, 8), 3, AnyBatchNorm, activation="tanh", placement=placement)
        layers = list(model.features)
        followers = [b for a, b in pairwise(layers) if isinstance(a, nn.Conv2d | nn.Linear)]
        last = [b for a, b in pairwise(layers) if isinstance(a, order[0])]
        assert followers
        assert all(isinstance(layer, order[0]) for layer in followers)
        assert all(isinstance(layer, order[1]) for layer in last)


def test_a_residual_block_follows_its_formula() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 16, 8, 8)
    block = ResNet((1, 8, 8), 3, AnyBatchNorm, depth=8).features[3]
    assert block(x).equal(torch.relu(x + block.branch(x)))
    after = ResNet((1, 8, 8), 3, AnyBatchNorm, depth=8, placement="after").features[3]
    assert after(x).equal(x + after.branch(x))
    kinds = [type(layer).__name__ for layer in after.branch]
    assert kinds == ["Conv2d", "ReLU", "AnyBatchNorm"] * 2
    assert after(x).min() < 0


def test_a_parameter_free_shortcut_subsamples_and_adds_empty_channels() -> None:
    down = ResNet((1, 8, 8), 3, no_norm, depth=8, width=4).features[4]
    x = torch.randn(2, 4, 8, 8)
    shortcut = down.shortcut(x)
    assert shortcut.shape == (2, 8, 4, 4)
    assert shortcut[:, :4].equal(x[:, :, ::2, ::2])
    assert not shortcut[:, 4:].any()


@pytest.mark.parametrize("placement", ["before", "after"])
@pytest.mark.parametrize(("style", "depth"), [("cifar", 14), ("imagenet", 18), ("imagenet", 50)])
def test_zero_init_residual_makes_every_block_start_as_its_shortcut(
    style: str, depth: int, placement: str
) -> None:
    model = ResNet(
        (3, 32, 32),
        10,
        AnyBatchNorm,
        depth=depth,
        width=4,
        style=style,
        zero_init_residual=True,
        placement=placement,
    )
    blocks = [m for m in model.modules() if hasattr(m, "branch")]
    for block in blocks:
        weights = [m.weight for m in block.branch if isinstance(m, AnyBatchNorm)]
        assert not weights[-1].any()
        assert all((weight == 1).all() for weight in weights[:-1])
    assert len(blocks) == {14: 6, 18: 8, 50: 16}[depth]


def test_zero_init_residual_passes_over_norms_without_a_weight() -> None:
    ResNet((3, 32, 32), 10, no_norm, depth=8, zero_init_residual=True)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_seed_gives_the_same_weights_whatever_the_norm_and_its_place(name: str) -> None:
    weights = []
    for norm, placement in ((AnyBatchNorm, "before"), (group_norm, "before"), (no_norm, "after")):
        torch.manual_seed(5)
        model = NETWORKS[name]((1, 8, 8), 3, norm, placement=placement)
        weights.append([m.weight for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)])
    for first, *others in zip(*weights, strict=True):
        assert all(first.equal(other) for other in others)


def test_known_gains_are_found() -> None:
    assert gain(nn.ReLU()) == pytest.approx(2**0.5, abs=1e-6)
    assert gain(nn.Identity()) == pytest.approx(1, abs=1e-6)
    assert gain(nn.LeakyReLU(0.1)) == pytest.approx((2 / 1.01) ** 0.5, abs=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_weights_start_so_that_a_layer_keeps_the_scale_of_the_signal(activation: str) -> None:
    torch.manual_seed(0)
    blocks = Blocks(no_norm, activation, "before")
    layer = blocks.layer(nn.Linear, 1000, 1000)
    out = layer(blocks.act()(torch.randn(200, 1000)))
    assert out.square().mean().sqrt().item() == pytest.approx(1, abs=0.05)
    assert not layer.get_parameter("bias").any()


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "identity"])
def test_a_deep_network_without_norms_starts_with_a_finite_signal(activation: str) -> None:
    torch.manual_seed(0)
    model = MLP((64,), 10, no_norm, activation=activation, width=256, depth=100)
    assert 0.2 < model.features(torch.randn(64, 64)).square().mean().sqrt() < 5


def test_an_mlp_may_have_hundreds_of_layers() -> None:
    model = MLP((1, 8, 8), 10, AnyBatchNorm, width=16, depth=300)
    logits = model(torch.randn(8, 1, 8, 8))
    logits.sum().backward()
    assert logits.isfinite().all()


def test_every_stage_of_a_cnn_halves_the_image() -> None:
    layers = CNN((3, 32, 32), 10, no_norm, widths=(4, 8, 16), depth=3).features
    assert layers[:-1](torch.randn(1, 3, 32, 32)).shape == (1, 16, 4, 4)
    assert len([m for m in layers if isinstance(m, nn.Conv2d)]) == 9


def test_the_raw_input_is_normalized_on_demand() -> None:
    features = MLP((5,), 3, AnyBatchNorm, normalize_input=True).features
    assert isinstance(features[1], AnyBatchNorm)
    assert features[1].num_features == 5
    assert CNN((3, 8, 8), 3, AnyBatchNorm, normalize_input=True).features[0].num_features == 3


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_dropout_stands_behind_every_layer_or_stage(name: str) -> None:
    model = NETWORKS[name]((1, 8, 8), 3, no_norm, dropout=0.25)
    drops = [m.p for m in model.modules() if isinstance(m, nn.Dropout)]
    assert drops == [0.25] * {"mlp": 3, "cnn": 2}[name]
    assert not [m for m in NETWORKS[name]((1, 8, 8), 3, no_norm).modules() if isinstance(m, nn.Dropout)]


def test_networks_are_built_on_the_device_in_force() -> None:
    with torch.device("meta"):
        model = CNN((3, 32, 32), 10, AnyBatchNorm)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: MLP((4,), 2, no_norm, activation="rleu"),
            "unknown activation 'rleu': choose one of relu, leaky",
        ),
        (
            lambda: MLP((4,), 2, no_norm, placement="behind"),
            "unknown placement 'behind'.*'before' or 'after'",
        ),
        (lambda: MLP((4,), 2, no_norm, depth=0), "MLP needs depth >= 1 and width >= 1, got depth=0"),
        (lambda: CNN((1, 8, 8), 2, no_norm, widths=()), "at least one width"),
        (
            lambda: CNN((1, 8, 8), 2, no_norm, widths=(4,) * 4),
            "8x8 are too small for CNN with 4 stages.*16x16",
        ),
        (lambda: CNN((64,), 2, no_norm), r"CNN takes images.*got \(64,\).*use MLP"),
        (lambda: ResNet((3, 32, 32), 2, no_norm, depth=18), r"6n\+2 .*got depth=18"),
        (lambda: ResNet((3, 32, 32), 2, no_norm, depth=2), r"6n\+2 .*got depth=2"),
        (
            lambda: ResNet((3, 32, 32), 2, no_norm, depth=20, style="imagenet"),
            "18, 34, 50, 101, 152; got depth=20",
        ),
        (
            lambda: ResNet((1, 8, 8), 2, no_norm, depth=18, style="imagenet"),
            "8x8 are too small.*style='cifar'",
        ),
        (lambda: ResNet((3, 2, 2), 2, no_norm), "2x2 are too small.*4x4"),
        (lambda: ResNet((3, 32, 32), 2, no_norm, style="tiny"), "unknown style 'tiny'"),
    ],
)
def test_an_impossible_network_is_an_error_with_a_way_out(
    build: Callable[[], nn.Module], message: str
) -> None:
    with pytest.raises(ValueError, match=f"(?i){message}"):
        build()


def test_a_norm_that_is_no_factory_is_an_error() -> None:
    with pytest.raises(TypeError, match=r"norm must be called as norm\(channels\).*got 'batch'"):
        MLP((4,), 2, "batch")  # type: ignore[arg-type]
