"""The arithmetic behind the layers: moments of a batch, and normalization by them.

Everything works per channel (axis 1) of a tensor `(N, C)` or `(N, C, *)`. Virtual batches, a mask and
per-sample statistics are ways to arrange `x` before these functions, not other functions: a group of samples,
or one sample's group of channels, becomes a channel of its own.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bnlight.norm.first_order import first_order
from bnlight.norm.layout import in_all_axes, in_few_axes, keep_layout

_backward = torch.ops.aten.native_batch_norm_backward.default
_update_stats: Any = torch.batch_norm_update_stats  # its type stub lacks two arguments


class Moments(NamedTuple):
    """Mean, biased variance and number of values of each channel; the number is an int if all have it.

    `samples` says how many samples the values come from, one number for all channels.
    """

    mean: Tensor
    var: Tensor
    number: Tensor | int
    samples: Tensor | int


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 values, float32 for all others: an average in half precision stops moving."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def converted(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x.to(dtype)`, whose call alone costs a small layer a hundredth of its step, only where it is needed."""
    return x if x.dtype == dtype else x.to(dtype)


def per_channel(values: Tensor, like: Tensor) -> Tensor:
    """View `(C,)` so that it broadcasts over `like`, `(N, C, *)`."""
    return values.view(-1, *[1] * (like.dim() - 2))


def transforming() -> bool:
    """Whether a transformation of `torch.func`, as vmap, is at work."""
    return torch._C._are_functorch_transforms_active()


def can_read_values() -> bool:
    """Whether Python may depend on a tensor's values: not in a compiled graph, nor under vmap."""
    return not (torch.compiler.is_compiling() or transforming())


def follow(average: Tensor, target: Tensor, rate: float | Tensor) -> None:
    """`average += rate * (target - average)`, in place."""
    if transforming():  # which know lerp, but not in place
        average.copy_(torch.lerp(average, target, rate))
    else:
        average.lerp_(target, rate)


@torch.library.custom_op("bnlight::snapshot", mutates_args=())
def _snapshot(x: Tensor) -> Tensor:
    return x.clone()


_snapshot.register_fake(torch.empty_like)


def snapshot(x: Tensor) -> Tensor:
    """A copy of `x` that a later update in place does not reach, for a compiled graph.

    Eager mode has its results before the update. A compiled graph may compute them again in the backward,
    after it, and from a clone too: the gradients are silently wrong. It never repeats an operation that it
    does not know.
    """
    copy: Tensor = _snapshot(x)
    return copy


def moments(x: Tensor, valid: Tensor | None = None) -> Moments:
    """Moments of each channel over the values where `valid`, of x's shape, is True; not differentiable.

    Where `valid` is False `x` must be zero. A channel without values has mean 0 and variance 0.
    """
    total = x.numel() // x.size(1)
    if total == 0:
        mean = torch.zeros(x.size(1), dtype=statistics_dtype(x.dtype), device=x.device)
        return Moments(mean, mean, 0, 0)
    if valid is None:
        mean, var = _mean_var(x)
        return Moments(mean, var, total, x.size(0))
    dtype = statistics_dtype(x.dtype)
    number = _sum(valid, dtype)
    mean = _sum(x, dtype) / number.clamp(min=1)
    # Padding placed at the mean adds nothing to the sum of squares.
    _, var = _mean_var(torch.where(valid, x, per_channel(mean, x)))
    samples = valid.flatten(1).any(1).sum()
    return Moments(mean, var * (total / number.clamp(min=1)), number, samples)


def _sum(x: Tensor, dtype: torch.dtype) -> Tensor:
    if x.dim() > 2 and x.is_contiguous():
        return x.flatten(2).sum(2, dtype=dtype).sum(0)  # several times faster than one sum over (0, 2, ...)
    return x.sum([axis for axis in range(x.dim()) if axis != 1], dtype=dtype)


def _mean_var(x: Tensor) -> tuple[Tensor, Tensor]:
    dtype = statistics_dtype(x.dtype)
    mean: Tensor
    var: Tensor
    if _sums_in_vectors(x, dtype):
        # torch's forward kernel sums planes value by value, its backward kernel in vectors: with x for the
        # gradient it returns sum((x - mean) * x), the centred sum of squares, in half the time.
        mean = x.flatten(2).mean(2).mean(0)
        var, _ = channel_sums(x, x, mean, torch.full_like(mean, x.size(1) / x.numel()))
        # The rounding of the mean enters this sum times the mean itself, which must not be far from zero.
        if float(torch.addcmul(var, mean, mean, value=-1 / 16).min()) >= 0:
            return mean, var
    if x.device.type in ("cpu", "cuda") and can_read_values():
        # Without full-precision averages to update, the kernel would return bf16 statistics for bf16 input.
        unused = None if x.dtype == dtype else torch.empty(x.size(1), dtype=dtype, device=x.device)
        mean, var = _update_stats(x, unused, unused, 0.0)
        return mean, var
    axes = [axis for axis in range(x.dim()) if axis != 1]
    var, mean = torch.var_mean(x.to(dtype), axes, correction=0)
    return mean, var


def channel_sums(dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor) -> tuple[Tensor, Tensor]:
    """The sums of `dy * (x - mean) * invstd` and of `dy` over each channel."""
    needed = [False, True, True]
    _, dweight, dbias = _backward(dy, x, None, None, None, mean, invstd, True, 0.0, needed)
    return dweight, dbias


def _sums_in_vectors(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether the way over the backward kernel is the faster one, and its guard can read values."""
    return (
        x.dim() > 2
        and can_read_values()
        and x.numel() > 20_000  # below, the forward kernel takes less time than the additional operations
        and x.dtype == dtype
        and x.is_contiguous()
        and x.device.type == "cpu"
    )


class Plan(NamedTuple):
    """What normalizes a batch, constants for the gradient: per channel, in the statistics' dtype.

    `share` says how much each value counts in the statistics: `1 / number` where only that many values are
    valid or some lie on other ranks, 0 where the statistics are constants, None when every value counts.
    `correction` is `(r, d)`; None means 1 and 0.
    """

    mean: Tensor
    var: Tensor
    share: Tensor | None = None
    correction: tuple[Tensor, Tensor] | None = None


WayBack = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""From this batch's gradients with respect to mean and variance to those that its values receive."""


def normalized(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """`(x - mean) / sqrt(var + eps) * weight + bias` in one elementwise pass."""
    if x.numel() == 0:
        return x.clone()  # the kernel divides by the number of values
    return torch.native_batch_norm(x, weight, bias, mean, var, False, 0.0, eps)[0]


def corrected(weight: Tensor, bias: Tensor, r: Tensor | None, d: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weight and bias with the correction in them, so that it costs nothing per element.

    `(xhat * r + d) * weight + bias = xhat * (weight * r) + (bias + weight * d)`
    """
    return (weight, bias) if r is None or d is None else (weight * r, torch.addcmul(bias, weight, d))


def uncorrected(dweight: Tensor, dbias: Tensor, r: Tensor | None, d: Tensor | None) -> tuple[Tensor, Tensor]:
    """The gradients of weight and bias, `(C,)`, from those of the corrected ones, `(C,)` or `(K, C)`."""
    if r is not None and d is not None:
        dweight = torch.addcmul(dbias * d, dweight, r)
    return (dweight, dbias) if dbias.dim() == 1 else (dweight.sum(0), dbias.sum(0))


def through_statistics(
    scale: Tensor,
    invstd: Tensor,
    share: Tensor | float,
    dweight: Tensor,
    dbias: Tensor,
    way_back: WayBack | None,
) -> tuple[Tensor, Tensor]:
    """Slope and shift of what a value receives because it moves the statistics, `(x - mean) * slope + shift`."""
    less = scale.neg()
    dmean, dvar = less * dbias, less * invstd * dweight  # so far twice the gradient of the variance
    if way_back is not None:
        dmean, dvar = way_back(dmean, dvar / 2)
        dvar = dvar + dvar
    return share * dvar, share * dmean


class _Normalize(torch.autograd.Function):
    """One elementwise pass forward and one native call backward; see `normalize`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        plan: Plan,
        eps: float,
        way_back: WayBack | None,
    ) -> Tensor:
        ctx.shape = plan.mean.shape
        weight, bias, mean, var, share, r, d = _of_rows(weight, bias, plan)
        ctx.save_for_backward(x, weight, mean, var, share, r, d)
        ctx.eps, ctx.way_back = eps, way_back
        return normalized(x, weight, bias, mean, var, eps)

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var, share, r, d = ctx.saved_tensors
        dy, eps = keep_layout(dy, x), ctx.eps
        invstd = (var + eps).rsqrt_()
        if share is None:
            needed = [ctx.needs_input_grad[0], True, True]
            dx, dweight, dbias = _backward(dy, x, weight, None, None, mean, invstd, True, eps, needed)
        else:
            # As if the statistics were constants, and one more elementwise pass for their part.
            scale, exact = weight * invstd, x.dtype == mean.dtype and not transforming()
            if x.numel() == 0:
                dx, dweight, dbias = dy, torch.zeros_like(mean), torch.zeros_like(mean)
            else:
                needed = [not exact, True, True]
                dx, dweight, dbias = _backward(dy, x, weight, mean, var, mean, invstd, False, eps, needed)
            slope, shift = through_statistics(scale, invstd, share, dweight, dbias, ctx.way_back)
            part = normalized(x, slope / invstd, shift, mean, var, eps)
            dx = part.addcmul_(dy, per_channel(scale, dy)) if exact else dx.add_(part)
        if len(ctx.shape) > 1:
            dweight, dbias = dweight.view(ctx.shape), dbias.view(ctx.shape)
        return dx, *uncorrected(dweight, dbias, r, d), None, None, None


def _of_rows(weight: Tensor, bias: Tensor, plan: Plan) -> tuple[Any, ...]:
    """Corrected weight and bias, mean, var and share as the kernels take them, `(K * C,)` for K groups; r and d."""
    mean, var, share, correction = plan
    r, d = correction or (None, None)
    weight, bias = corrected(weight, bias, r, d)
    if mean.dim() == 1:
        return weight, bias, mean, var, share, r, d
    weight, bias = weight.expand(mean.shape).reshape(-1), bias.expand(mean.shape).reshape(-1)
    share = None if share is None else share.expand(mean.shape).reshape(-1)
    return weight, bias, mean.reshape(-1), var.reshape(-1), share, r, d


class _Transformable(_Normalize):
    """`_Normalize` as `torch.func` wants it, which would cost every call a tenth of a small layer's step."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> Tensor:
        return _Normalize.forward(_Forgetful(), *arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, plan, ctx.eps, ctx.way_back = inputs
        ctx.shape = plan.mean.shape
        weight, _, mean, var, share, r, d = _of_rows(weight, bias, plan)
        ctx.save_for_backward(x, weight, mean, var, share, r, d)


class _Forgetful:
    def save_for_backward(self, *tensors: Tensor | None) -> None: ...


def normalize(
    x: Tensor, weight: Tensor, bias: Tensor, plan: Plan, eps: float, way_back: WayBack | None = None
) -> Tensor:
    """`((x - mean) / sqrt(var + eps) * r + d) * weight + bias` per channel, by the plan's constants.

    The gradient of `x` includes its way through the statistics, by `way_back` where they are not this
    batch's alone (only with a `share`). First order only. All per-channel tensors have the statistics' dtype;
    a plan `(K, C)` is one for K groups of C channels, K * C in `x`, which share weight and bias.
    """
    function = _Transformable if transforming() else _Normalize
    y = function.apply(in_few_axes(x), weight, bias, plan, eps, way_back)  # type: ignore[no-untyped-call]
    return in_all_axes(y, x)
