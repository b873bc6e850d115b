"""from_keras builds Keras's layer, number for number, and refuses with a reason what it cannot build."""

import math
import os
import warnings

import pytest
import torch
from torch import nn

from bnlight.norm import BatchNorm, BatchRenorm, from_keras

# What keras.layers.BatchNormalization(name="bn").get_config() gives, as Keras 3.15 and tf-keras 2.16 write it.
KERAS_3 = {
    "name": "bn",
    "trainable": True,
    "dtype": {
        "module": "keras",
        "class_name": "DTypePolicy",
        "config": {"name": "float32"},
        "registered_name": None,
    },
    "axis": -1,
    "momentum": 0.99,
    "epsilon": 0.001,
    "center": True,
    "scale": True,
    **{
        key: {"module": "keras.initializers", "class_name": kind, "config": {}, "registered_name": None}
        for key, kind in [
            ("beta_initializer", "Zeros"),
            ("gamma_initializer", "Ones"),
            ("moving_mean_initializer", "Zeros"),
            ("moving_variance_initializer", "Ones"),
        ]
    },
    **dict.fromkeys(["beta_regularizer", "gamma_regularizer", "beta_constraint", "gamma_constraint"]),
    "synchronized": False,
    "renorm": False,
    "renorm_clipping": None,
    "renorm_momentum": 0.99,
}
KERAS_2 = {
    key: {"class_name": value["class_name"], "config": value["config"]}
    if key.endswith("_initializer")
    else value
    for key, value in KERAS_3.items()
    if not key.startswith("renorm") and key != "synchronized"
} | {"dtype": "float32", "axis": [3], "batch_input_shape": (None, 32, 32, 8)}


@pytest.mark.parametrize("config", [{}, KERAS_3, KERAS_2], ids=["empty", "keras 3", "tf-keras"])
def test_a_config_as_keras_writes_it_is_the_layer_with_keras_defaults(config):
    layer = from_keras(config, num_features=8)
    assert repr(layer) == "BatchNorm(8, momentum=0.01, eps=0.001, channel_dim=-1)"
    assert layer.weight.dtype == torch.float32


def test_every_argument_arrives():
    layer = from_keras(
        {
            "axis": 1,
            "momentum": 0.8,
            "epsilon": 1e-4,
            "beta_initializer": {"class_name": "Constant", "config": {"value": 0.5}},
            "gamma_initializer": "zeros",
            "moving_mean_initializer": "ones",
            "moving_variance_initializer": {"class_name": "constant", "config": {"value": 4}},
            "virtual_batch_size": 16,
            "dtype": "float64",
            "fused": False,
        },
        num_features=3,
        device="cpu",
    )
    assert repr(layer) == (
        "BatchNorm(3, momentum=0.2, virtual_batch_size=16, eps=0.0001, weight_init=0.0, bias_init=0.5)"
    )
    assert layer.weight.dtype == layer.running_var.dtype == torch.float64
    assert [t.tolist() for t in (layer.weight, layer.bias, layer.running_mean, layer.running_var)] == [
        [0.0] * 3, [0.5] * 3, [1.0] * 3, [4.0] * 3
    ]  # fmt: skip


def test_center_and_scale_leave_out_what_keras_leaves_out():
    assert from_keras({"center": False}, 4).bias is None
    neither = from_keras({"center": False, "scale": False}, 4)
    assert neither.weight is neither.bias is None
    center = from_keras({"scale": False, "gamma_initializer": "zeros"}, 4)
    assert center.bias.requires_grad
    assert not center.weight.requires_grad
    assert torch.equal(center.weight, torch.ones(4))


@pytest.mark.parametrize(
    ("clipping", "expected"),
    [
        (None, (0.0, math.inf, math.inf)),
        ({"rmax": 3}, (0.0, 3.0, math.inf)),
        ({"rmin": 0.5, "rmax": 2.0, "dmax": 1.0}, (0.5, 2.0, 1.0)),
        ({"dmax": 5.0, "rmin": None}, (0.0, math.inf, 5.0)),
    ],
    ids=str,
)
def test_renorm_has_keras_own_bounds(clipping, expected):
    layer = from_keras({"renorm": True, "renorm_clipping": clipping}, 4)
    assert type(layer) is BatchRenorm
    assert (layer.r_min, layer.r_max.item(), layer.d_max.item()) == expected
    assert layer.momentum == 0.01
    assert layer(torch.randn(8, 4)).isfinite().all()


@pytest.mark.parametrize(
    ("kind", "options", "mean", "std", "limits"),
    [
        ("RandomNormal", {"mean": 2.0, "stddev": 0.5, "seed": None}, 2.0, 0.5, (-1, 5)),
        ("truncated_normal", {"mean": 1.0, "stddev": 0.1}, 1.0, 0.08796, (0.8, 1.2)),
        ("RandomUniform", {"minval": 1.0, "maxval": 3.0}, 2.0, 1 / math.sqrt(3), (1, 3)),
    ],
)
def test_random_initializers_have_keras_distributions(kind, options, mean, std, limits):
    torch.manual_seed(0)
    spec = {"class_name": kind, "config": options}
    layer = from_keras({"gamma_initializer": spec, "moving_mean_initializer": spec}, 20_000)
    for values in (layer.weight, layer.running_mean):
        assert values.mean().item() == pytest.approx(mean, abs=0.02)
        assert values.std().item() == pytest.approx(std, rel=0.02)
        assert limits[0] <= values.min()
        assert values.max() <= limits[1]
    assert torch.equal(layer.bias, torch.zeros(20_000))


@pytest.mark.parametrize(
    ("axis", "shape", "channel_dim", "channels"),
    [
        (-1, (None, 5, 8), -1, 8),
        (2, (None, 5, 8), -1, 8),
        ([2], (None, 5, 8), -1, 8),
        (1, (None, 8, 5), 1, 8),
        (-2, (None, 8, 5), 1, 8),
        (1, (None, 8), 1, 8),
        (-3, (None, 8, 5, 5), 1, 8),
    ],
)
def test_the_axis_and_the_number_of_channels_are_read_from_the_input_shape(
    axis, shape, channel_dim, channels
):
    wrapped = {
        "class_name": "BatchNormalization",
        "config": {"axis": axis},
        "build_config": {"input_shape": shape},
    }
    for config in (wrapped, {"axis": axis, "batch_shape": shape}, {"axis": axis, "input_shape": shape[1:]}):
        layer = from_keras(config)
        assert (layer.channel_dim, layer.num_features) == (channel_dim, channels)


def test_synchronized_layers_are_set_for_all_ranks():
    assert from_keras({"synchronized": True}, 4).process_group == "world"
    assert from_keras({"class_name": "SyncBatchNormalization", "config": {}}, 4).process_group == "world"
    assert from_keras({}, 4).process_group is None


def test_mixed_precision_policies_keep_float32_parameters():
    policy = {"class_name": "Policy", "config": {"name": "mixed_float16"}}
    assert from_keras({"dtype": policy}, 4).weight.dtype == torch.float32
    assert from_keras({"dtype": "bfloat16"}, 4).weight.dtype == torch.bfloat16


L2 = {"class_name": "L2", "config": {"l2": 0.01}}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"beta_regularizer": L2}, r"beta_regularizer=.*norm_penalty.*PenalizeNorm"),
        ({"gamma_regularizer": L2}, r"gamma_regularizer=.*norm_penalty.*target=0"),
        ({"gamma_constraint": "non_neg"}, r"gamma_constraint='non_neg'.*constrain_norm.*ConstrainNorm"),
        ({"beta_constraint": "max_norm"}, r"beta_constraint.*constrain_norm"),
        ({"activity_regularizer": "l2"}, r"activity_regularizer.*loss"),
        ({"adjustment": lambda shape: (1, 0)}, r"adjustment.*jitter=\(scale, shift\)"),
        ({"trainable": False}, r"trainable=False.*layer\.eval\(\)"),
        ({"axis": 3}, r"axis=3, of an unknown number of axes.*-1"),
        (
            {"axis": 2, "batch_shape": [None, 5, 6, 8]},
            r"axis=2: the channels must be on axis 1 or on the last",
        ),
        ({"axis": [1, 2]}, r"axis=\[1, 2\].*axis 1"),
        ({"renorm": True, "momentum": 0.9}, r"renorm_momentum=0\.99 and momentum=0\.9.*equal"),
        ({"renorm": True, "virtual_batch_size": 4}, r"renorm with virtual_batch_size"),
        ({"renorm": True, "renorm_clipping": {"r_max": 3}}, r"renorm_clipping has \['r_max'\]"),
        ({"gamma_initializer": "glorot_uniform"}, r"gamma_initializer='glorot_uniform': expected zeros"),
        ({"beta_initializer": {"class_name": "RandomNormal", "config": {"seed": 1}}}, r"beta_init.* seed"),
        ({"beta_initializer": {"class_name": "Constant", "config": {"value": [1, 2]}}}, r"\[1, 2\].*numbers"),
        ({"beta_initializer": {"class_name": "Zeros", "config": {"value": 2}}}, r"'value': 2"),
        ({"dtype": "int8"}, r"dtype='int8': expected float16"),
        ({"batch_shape": (None, 9)}, r"num_features=8, but .*\(None, 9\) has 9"),
        ({"class_name": "LayerNormalization", "config": {}}, r"class_name='LayerNormalization'"),
        ({"epsilom": 1e-3}, r"epsilom is no argument of BatchNormalization"),
        ({"momentum": None}, r"momentum=None: expected a number of 0 to 1"),
        ({"epsilon": -1}, r"epsilon=-1: expected a number of at least 0"),
        ({"renorm": True, "renorm_clipping": {"rmin": 3}}, r"'rmin': 3.*expected rmin <= 1 <= rmax"),
        ({"dtype": {"class_name": "Policy"}, "beta_initializer": {"config": {}}}, r"beta_initializer=None"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value.split("=")[0][:30],
)
def test_what_it_cannot_honour_is_refused_with_a_reason(config, reason):
    with pytest.raises(ValueError, match=reason):
        from_keras(config, num_features=8)


def test_all_reasons_come_at_once_and_the_number_of_channels_is_asked_for():
    with pytest.raises(ValueError, match=r"cannot honour") as raised:
        from_keras({"momentun": 0.9, "gamma_regularizer": L2, "trainable": False})
    assert len(str(raised.value).splitlines()) == 5
    assert "give from_keras(config, num_features=...)" in str(raised.value)


@pytest.mark.parametrize(
    "unused",
    [
        {"center": False, "beta_regularizer": None},
        {"renorm_clipping": {"rmax": 2}, "renorm_momentum": 0.5},
        {"gamma_regularizer": {}},
    ],
    ids=str,
)
def test_what_has_no_effect_in_keras_has_none_here(unused):
    assert type(from_keras(unused, 4)) is BatchNorm


# Against Keras itself, where it is installed.

CONFIGS = {
    "default": {},
    "first axis": {"axis": 1},
    "slow": {"momentum": 0.5, "epsilon": 0.1},
    "no center": {"center": False},
    "no scale": {"scale": False, "beta_initializer": {"class_name": "Constant", "config": {"value": 0.3}}},
    "initial": {"moving_mean_initializer": "ones", "gamma_initializer": "zeros"},
    "renorm": {"renorm": True},
    "renorm, r_max alone": {"renorm": True, "renorm_clipping": {"rmax": 1.1}},
    "renorm, all bounds": {
        "renorm": True,
        "renorm_clipping": {"rmin": 0.4, "rmax": 1.5, "dmax": 0.5},
        "momentum": 0.8,
        "renorm_momentum": 0.8,
        "epsilon": 0.05,
    },
    "renorm, no scale": {"renorm": True, "scale": False, "momentum": 0.5, "renorm_momentum": 0.5},
}


@pytest.fixture(scope="module")
def keras(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setenv("KERAS_BACKEND", "torch")
        patch.setenv("KERAS_HOME", os.fspath(tmp_path_factory.mktemp("keras")))
        yield pytest.importorskip("keras", reason="Keras is not installed: pip install keras")


def assert_float32_equal(mine: torch.Tensor, theirs: torch.Tensor) -> None:
    """Keras computes the layer in float32, also for float64, and its variance as E[x^2] - E[x]^2."""
    torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("shape", [(6, 3), (4, 3, 5, 3)], ids=str)
@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_training_averages_and_evaluation_are_those_of_keras(keras, options, shape):
    torch.manual_seed(0)
    theirs = keras.layers.BatchNormalization(**options)
    theirs.build(shape)
    mine = from_keras(keras.layers.serialize(theirs))
    initial = mine.running_var.clone()
    for scale in (1.0, 3.0, 0.5, 1.5):
        x = torch.randn(shape) * scale + scale
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        outputs = [mine(inputs[0]), theirs(inputs[1], training=True)]
        for y in outputs:
            (y * torch.linspace(-1, 2, x.numel()).view_as(x)).mean().backward()
        assert_float32_equal(*outputs)
        assert_float32_equal(*(z.grad for z in inputs))
    for name, weight in {"weight": theirs.gamma, "bias": theirs.beta}.items():
        if weight is not None:
            assert_float32_equal(getattr(mine, name).grad, weight.value.grad)
    mean, var = (w.value.detach() for w in (theirs.moving_mean, theirs.moving_variance))
    assert_float32_equal(mine.running_mean, mean)
    if isinstance(mine, BatchNorm):  # the difference that the docstring names
        kept, n = (1 - mine.momentum) ** 4 * initial, x.numel() // 3
        assert_float32_equal(mine.running_var, kept + (var - kept) * n / (n - 1))
        mine.running_var.copy_(var)
    assert_float32_equal(mine.running_var, var)
    assert_float32_equal(mine.eval()(x), theirs(x, training=False))


def test_the_configs_written_here_are_those_that_keras_writes(keras):
    assert keras.layers.BatchNormalization(name="bn").get_config() == KERAS_3


def test_keras_own_initializers_and_policies_are_read(keras):
    theirs = keras.layers.BatchNormalization(
        gamma_initializer=keras.initializers.RandomUniform(0.5, 1.5),
        beta_initializer="random_normal",
        dtype=keras.DTypePolicy("mixed_bfloat16"),
    )
    mine = from_keras(theirs.get_config(), num_features=1000)
    assert 0.5 <= mine.weight.min() < mine.weight.max() <= 1.5
    assert mine.bias.std().item() == pytest.approx(0.05, rel=0.1)
    assert isinstance(mine.weight, nn.Parameter)


def test_no_channels_are_refused():
    with pytest.raises(ValueError, match="num_features=0 is not a number of channels"):
        from_keras({"axis": 1}, num_features=0)
