"""An error says which layer saw what, what it expected, and the way out."""

import pytest
import torch

from bnlight.norm import NORMS, BatchNorm, BatchRenorm, GroupNorm, InstanceNorm, LayerNorm

CONSTRUCTORS = {
    "num_features": (lambda: BatchNorm(0), r"num_features must be at least 1, got 0"),
    "eps": (lambda: LayerNorm(4, eps=-1), r"eps must not be negative, got -1"),
    "channel_dim": (lambda: BatchNorm(4, channel_dim=2), r"channel_dim must be 1 .* or -1 .*, got 2"),
    "momentum": (lambda: BatchNorm(4, momentum=1.5), r"momentum must be in \[0, 1\] or None, got 1.5.*Keras"),
    "virtual": (
        lambda: BatchNorm(4, virtual_batch_size=0),
        r"virtual_batch_size must be at least 1 or None, got 0",
    ),
    "small": (lambda: BatchNorm(4, small_batch="skip"), r"'error' or 'running', got 'skip'"),
    "untracked": (
        lambda: BatchNorm(4, small_batch="running", track_running_stats=False),
        r"small_batch='running' needs track_running_stats=True",
    ),
    "r_max": (lambda: BatchRenorm(4, r_max=0.5), r"expected r_max >= 1 and d_max >= 0, got r_max=0.5"),
    "d_max": (lambda: BatchRenorm(4, d_max=-1), r"expected r_max >= 1 and d_max >= 0, got .*d_max=-1"),
    "groups": (
        lambda: GroupNorm(12, num_groups=5),
        r"num_groups=5 does not divide num_features=12; use one of \[1, 2, 3, 4, 6, 12\]",
    ),
    "over": (lambda: LayerNorm(4, over="batch"), r"over must be 'sample' or 'channels', got 'batch'"),
}


@pytest.mark.parametrize(("make", "message"), CONSTRUCTORS.values(), ids=CONSTRUCTORS)
def test_a_wrong_argument_is_refused_at_construction(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", NORMS)
def test_a_wrong_number_of_channels_names_both_and_the_ways_out(name):
    layer = NORMS[name](8)
    message = (
        r"expected 8 channels on axis 1 .*, got 5 in .*\(2, 5, 8\)\. Set num_features=5, or channel_dim=-1"
    )
    with pytest.raises(ValueError, match=message) as error:
        layer(torch.randn(2, 5, 8))
    assert repr(layer) in str(error.value)


@pytest.mark.parametrize("name", NORMS)
def test_an_unbatched_input_is_refused(name):
    with pytest.raises(ValueError, match=r"got shape \(8,\); add a batch axis"):
        NORMS[name](8)(torch.randn(8))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_values_that_are_not_floating_point_are_refused(dtype):
    with pytest.raises(TypeError, match=r"expected floating point input, got torch\.\w+; .*x\.float\(\)"):
        BatchNorm(4)(torch.ones(3, 4, dtype=dtype))


@pytest.mark.parametrize("channel_dim", [1, -1])
@pytest.mark.parametrize("name", NORMS)
def test_a_mask_of_a_wrong_shape_or_dtype_is_refused(name, channel_dim):
    layer = NORMS[name](8, channel_dim=channel_dim)
    x = torch.randn(2, 8, 5) if channel_dim == 1 else torch.randn(2, 5, 8)
    with pytest.raises(ValueError, match=r"mask of shape \(2, 5\), .* got \(2,\); mask.expand"):
        layer(x, mask=torch.ones(2, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"bool mask \(True = valid\), got torch.float32; use mask.bool"):
        layer(x, mask=torch.ones(2, 5))


@pytest.mark.parametrize(
    ("options", "shape"),
    [({}, (1, 4)), ({}, (1, 4, 1, 1)), ({"virtual_batch_size": 1}, (6, 4)), ({"channel_dim": -1}, (1, 1, 4))],
    ids=str,
)
@pytest.mark.parametrize("layer_type", [BatchNorm, BatchRenorm])
def test_one_value_per_channel_names_the_layer_the_shape_and_the_ways_out(layer_type, options, shape):
    layer = layer_type(4, **options)
    with pytest.raises(ValueError, match="one value per channel") as error:
        layer(torch.randn(shape))
    for part in (repr(layer), str(shape), "larger batch", "drop_last", "small_batch='running'", "GroupNorm"):
        assert part in str(error.value)
    assert ("virtual batch," in str(error.value)) == ("virtual_batch_size" in options)
    assert layer.num_batches_tracked == 0
    layer.eval()(torch.randn(shape))


def test_evaluation_without_running_statistics_refuses_one_value_too():
    with pytest.raises(ValueError, match="one value per channel"):
        BatchNorm(4, track_running_stats=False).eval()(torch.randn(1, 4))


def test_instance_norm_refuses_input_without_positions():
    with pytest.raises(
        ValueError, match=r"got shape \(3, 4\), one value per channel and sample; use LayerNorm"
    ):
        InstanceNorm(4)(torch.randn(3, 4))


def test_batch_renorm_has_no_option_to_drop_the_running_statistics_it_needs():
    with pytest.raises(TypeError, match="track_running_stats"):
        BatchRenorm(4, track_running_stats=False)
