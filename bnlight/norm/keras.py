"""Builds a layer from the config of a Keras `BatchNormalization`."""

from collections.abc import Callable, Mapping
from math import inf
from typing import Any

import torch
from torch import Tensor, nn

from bnlight.norm.base import Device
from bnlight.norm.batchnorm import BatchNorm
from bnlight.norm.renorm import BatchRenorm

Config = Mapping[str, Any]
Fill = float | Callable[[Tensor], Tensor]
"""A constant, or a function that fills a tensor in place with random values."""

DEFAULTS: dict[str, Any] = {
    "axis": -1,
    "momentum": 0.99,
    "epsilon": 1e-3,
    "center": True,
    "scale": True,
    "beta_initializer": "zeros",
    "gamma_initializer": "ones",
    "moving_mean_initializer": "zeros",
    "moving_variance_initializer": "ones",
    "beta_regularizer": None,
    "gamma_regularizer": None,
    "beta_constraint": None,
    "gamma_constraint": None,
    "activity_regularizer": None,
    "synchronized": False,
    "renorm": False,
    "renorm_clipping": None,
    "renorm_momentum": 0.99,
    "virtual_batch_size": None,
    "adjustment": None,
    "trainable": True,
    "dtype": None,
    "name": None,
    "fused": None,
}
"""Keras's own, for keys that a config leaves out. `name` and `fused` have no bearing on the layer."""

INITIALIZERS: dict[str, dict[str, float]] = {
    "zeros": {},
    "ones": {},
    "constant": {"value": 0.0},
    "randomnormal": {"mean": 0.0, "stddev": 0.05},
    "truncatednormal": {"mean": 0.0, "stddev": 0.05},
    "randomuniform": {"minval": -0.05, "maxval": 0.05},
}
"""Those of Keras that are understood, with their options and Keras's defaults."""

DTYPES: dict[str | None, torch.dtype | None] = {
    **{name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64")},
    "mixed_float16": torch.float32,  # that of the parameters
    "mixed_bfloat16": torch.float32,
    None: None,
}

_PENALTY = "add bnlight.surgery.norm_penalty to the loss, or the callback PenalizeNorm to the Trainer"
_CONSTRAINT = (
    "call bnlight.surgery.constrain_norm after each step of the optimizer, or use the callback ConstrainNorm"
)
REFUSED = {
    "beta_regularizer": _PENALTY,
    "gamma_regularizer": f"{_PENALTY}; target=0 pulls to 0, as Keras's",
    "beta_constraint": _CONSTRAINT,
    "gamma_constraint": _CONSTRAINT,
    "activity_regularizer": "add the penalty of the layer's output to the loss",
    "adjustment": "it is a function; a random scale and shift is BatchNorm(..., jitter=(scale, shift))",
}
"""What no layer takes, and what to do instead."""


def from_keras(
    config: Config, num_features: int | None = None, *, device: Device = None
) -> BatchNorm | BatchRenorm:
    """The layer that a Keras `BatchNormalization` of this config is: `BatchNorm`, with `renorm` `BatchRenorm`.

    All has Keras's meaning and defaults: `momentum` m is 1 - m here, `epsilon` is 1e-3, the channels are on the
    last axis (`channel_dim=-1`), bounds missing in `renorm_clipping` are 0 and infinity. Outputs in training, and
    in evaluation by the same moving averages, are Keras's. The moving variance is not: Keras averages the batch's
    biased variance, `BatchNorm` the unbiased one, larger by n / (n - 1) for n values per channel, as tf-keras's
    fused kernel does. `BatchRenorm` averages what Keras does. Besides,

    - `center=True, scale=False` is a weight of 1 with `requires_grad=False`;
    - `synchronized=True` sets `layer.process_group = "world"`, as does the class `SyncBatchNormalization`;
    - `mixed_float16` and `mixed_bfloat16` are float32 parameters: half precision is then autocast's;
    - random initial values come from torch's generator, once: `reset_parameters` sets 1 and 0.

    Args:
        config: `layer.get_config()` of Keras 2 (tf-keras) or 3, or the dict around it with `class_name`, `config`
            and `build_config`. Trained values are not in it: gamma is `weight`, beta `bias`, moving_mean
            `running_mean`, moving_variance `running_var`.
        num_features: number of channels; None takes it from the input shape, where the config has one.
        device: where the layer is made.

    Raises ValueError that lists all it cannot honour, and why: regularizers, constraints, `adjustment`,
    `trainable=False`, an axis that is neither the last nor 1, renorm with two momenta or with virtual batches,
    other initializers than constants, normal, truncated normal and uniform without a seed, unknown keys.

    Source: Keras 3.15, `keras.layers.BatchNormalization`, and tf-keras 2 of the same name.

    >>> from_keras({"axis": 1, "momentum": 0.9, "gamma_initializer": "zeros"}, num_features=8)
    BatchNorm(8, eps=0.001, weight_init=0.0)
    """
    config, shape, problems = _unwrapped(config)
    keras = {**DEFAULTS, **config}
    problems += [f"{key} is no argument of BatchNormalization" for key in config if key not in DEFAULTS]
    problems += [f"{key}={keras[key]!r}: {advice}" for key, advice in REFUSED.items() if keras[key]]
    problems += _contradictions(keras)
    channel_dim = _channel_dim(keras["axis"], shape, problems)
    features = _features(num_features, channel_dim, shape, problems)
    dtype = _dtype(keras["dtype"], problems)
    fills = {key: _fill(keras[key], key, problems) for key in DEFAULTS if key.endswith("_initializer")}
    if problems:
        raise ValueError("from_keras cannot honour this config:\n" + "\n".join(f"- {p}" for p in problems))

    center, scale = keras["center"], keras["scale"]
    gamma = fills["gamma_initializer"] if scale else 1.0
    beta = fills["beta_initializer"]
    options: dict[str, Any] = {
        "eps": keras["epsilon"],
        "momentum": round(1 - keras["momentum"], 12),
        "affine": center or scale,
        "bias": center,
        "weight_init": gamma if isinstance(gamma, float) else 1.0,
        "bias_init": beta if isinstance(beta, float) else 0.0,
        "channel_dim": channel_dim,
        "virtual_batch_size": keras["virtual_batch_size"],
        "device": device,
        "dtype": dtype,
    }
    layer: BatchNorm | BatchRenorm
    if keras["renorm"]:
        clip = _clipping(keras)
        layer = BatchRenorm(features, r_min=clip["rmin"], r_max=clip["rmax"], d_max=clip["dmax"], **options)
    else:
        layer = BatchNorm(features, **options)
    _fill_in(layer, gamma, beta, fills["moving_mean_initializer"], fills["moving_variance_initializer"])
    if layer.weight is not None and not scale:
        layer.weight.requires_grad_(False)
    if keras["synchronized"]:
        layer.process_group = "world"
    return layer


def _unwrapped(config: Config) -> tuple[dict[str, Any], list[int | None] | None, list[str]]:
    """The arguments alone, the input's shape where it is known, and what is wrong with the class."""
    problems, shape, arguments = [], None, dict(config)
    if "class_name" in config:
        name = config["class_name"]
        arguments = dict(config.get("config") or {})
        shape = (config.get("build_config") or {}).get("input_shape")
        if name == "SyncBatchNormalization":
            arguments["synchronized"] = True
        elif name != "BatchNormalization":
            problems.append(f"class_name={name!r}: expected 'BatchNormalization'")
    for key in ("input_shape", "batch_input_shape", "batch_shape"):
        value = arguments.pop(key, None)
        if shape is None and value is not None:
            shape = [None, *value] if key == "input_shape" else value  # which has no batch axis
    return arguments, None if shape is None else [*shape], problems


def _contradictions(keras: Config) -> list[str]:
    problems = [
        f"{key}={keras[key]!r}: expected a number of {bounds}"
        for key, high, bounds in (("momentum", 1, "0 to 1"), ("epsilon", inf, "at least 0"))
        if not (isinstance(keras[key], int | float) and 0 <= keras[key] <= high)
    ]
    if not keras["trainable"]:
        problems.append(
            "trainable=False: in Keras it means evaluation, too; build it with trainable=True, "
            "then call layer.eval() and layer.requires_grad_(False)"
        )
    if keras["renorm"]:
        if keras["renorm_momentum"] != keras["momentum"]:
            problems.append(
                f"renorm_momentum={keras['renorm_momentum']} and momentum={keras['momentum']}: BatchRenorm has "
                "one set of averages, for training and evaluation; make them equal"
            )
        if keras["virtual_batch_size"] is not None:
            problems.append(
                "renorm with virtual_batch_size: Keras corrects each virtual batch by the mean of all, BatchRenorm "
                "by its own statistics, as the paper; build BatchRenorm(..., virtual_batch_size=...) for that"
            )
        if unknown := sorted((keras["renorm_clipping"] or {}).keys() - {"rmin", "rmax", "dmax"}):
            problems.append(f"renorm_clipping has {unknown}: expected rmin, rmax and dmax")
        clip = _clipping(keras)
        if not (0 <= clip["rmin"] <= 1 <= clip["rmax"] and clip["dmax"] >= 0):
            problems.append(
                f"renorm_clipping={keras['renorm_clipping']}: expected rmin <= 1 <= rmax and dmax >= 0"
            )
    return problems


def _clipping(keras: Config) -> dict[str, float]:
    given = {key: value for key, value in (keras["renorm_clipping"] or {}).items() if value is not None}
    return {"rmin": 0.0, "rmax": inf, "dmax": inf, **given}


def _channel_dim(axis: Any, shape: list[int | None] | None, problems: list[str]) -> int:
    """1 or -1; `axis` is an int, or a list of one in a layer that tf-keras has built."""
    axes = [*axis] if isinstance(axis, list | tuple) else [axis]
    if axes in ([1], [-1]):
        return int(axes[0])
    if len(axes) == 1 and shape is not None:
        position = axes[0] % len(shape)
        if position in (1, len(shape) - 1):
            return 1 if position == 1 else -1
    elif len(axes) == 1:
        problems.append(f"axis={axis}, of an unknown number of axes: if it is the last, set it to -1")
        return -1
    problems.append(f"axis={axis}: the channels must be on axis 1 or on the last")
    return -1


def _features(
    given: int | None, channel_dim: int, shape: list[int | None] | None, problems: list[str]
) -> int:
    known = None if shape is None else shape[channel_dim]
    if given is not None and given < 1:
        problems.append(f"num_features={given} is not a number of channels")
    elif given is None and known is None:
        problems.append("the number of channels is not in it: give from_keras(config, num_features=...)")
    elif given is not None and known is not None and given != known:
        problems.append(
            f"num_features={given}, but its input shape {tuple(shape or ())} has {known} channels"
        )
    return given or known or 1


def _dtype(policy: Any, problems: list[str]) -> torch.dtype | None:
    name = (policy.get("config") or {}).get("name") if isinstance(policy, Mapping) else policy
    if name not in DTYPES:
        problems.append(f"dtype={name!r}: expected {', '.join(str(known) for known in DTYPES if known)}")
    return DTYPES.get(name)


def _fill(initializer: Any, key: str, problems: list[str]) -> Fill:
    """What an initializer's name, or dict with `class_name` and `config`, does to a tensor."""
    if isinstance(initializer, Mapping):
        name, given = initializer.get("class_name"), dict(initializer.get("config") or {})
    else:
        name, given = initializer, {}
    kind = {"zero": "zeros", "one": "ones", "normal": "randomnormal", "uniform": "randomuniform"}.get(
        short := str(name).lower().replace("_", ""), short
    )
    given.pop("dtype", None)
    if given.pop("seed", None) is not None:
        problems.append(f"{key} has a seed: Keras's random numbers are not torch's; use torch.manual_seed")
    if kind not in INITIALIZERS:
        problems.append(
            f"{key}={name!r}: expected zeros, ones, constant, or random normal, uniform or truncated"
        )
        return 0.0
    options = INITIALIZERS[kind] | given
    strange = [o for o, v in options.items() if o not in INITIALIZERS[kind] or not isinstance(v, int | float)]
    if strange:
        problems.append(
            f"{key}={name!r} with { ({o: options[o] for o in strange}) }: expected numbers for "
            f"{[*INITIALIZERS[kind]]}"
        )
        return 0.0
    match kind:
        case "randomnormal":
            mean, std = options["mean"], options["stddev"]
            return lambda tensor: nn.init.normal_(tensor, mean, std)
        case "truncatednormal":
            mean, std = options["mean"], options["stddev"]
            return lambda tensor: nn.init.trunc_normal_(tensor, mean, std, mean - 2 * std, mean + 2 * std)
        case "randomuniform":
            low, high = options["minval"], options["maxval"]
            return lambda tensor: nn.init.uniform_(tensor, low, high)
    return {"zeros": 0.0, "ones": 1.0}.get(kind, float(options.get("value", 0)))


@torch.no_grad()
def _fill_in(layer: BatchNorm | BatchRenorm, gamma: Fill, beta: Fill, mean: Fill, var: Fill) -> None:
    tensors = (layer.weight, layer.bias, layer.running_mean, layer.running_var)
    for tensor, fill in zip(tensors, (gamma, beta, mean, var), strict=True):
        if tensor is not None:
            nn.init.constant_(tensor, fill) if isinstance(fill, float) else fill(tensor)
    if isinstance(layer, BatchRenorm):
        # Keras starts its moving standard deviation at the root of this variance, without epsilon.
        assert layer.running_var is not None
        layer.running_var.sub_(layer.eps).clamp_(min=0)
