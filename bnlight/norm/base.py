"""What every layer shares: its arguments, affine parameters, input checks, axis order and mask."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, ClassVar, Self, TypedDict, get_args

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from bnlight.norm.core import converted, statistics_dtype
from bnlight.norm.layout import canonical

Device = torch.device | str | int | None


class Placement(TypedDict, total=False):
    """Arguments of every layer whose default is the same in all; `Norm` explains them."""

    bias: bool
    weight_init: float
    bias_init: float
    channel_dim: int
    device: Device
    dtype: torch.dtype | None


class Affine(Placement, total=False):
    """`Placement`, for the layers that have a weight by default."""

    affine: bool


class Shared(Affine, total=False):
    """`Affine`, for the layers with the common eps."""

    eps: float


def new_statistic(fill: float, shape: tuple[int, ...], placement: Placement) -> Tensor:
    """A buffer for statistics, filled, on the device and in the precision that a layer is made with."""
    dtype = statistics_dtype(placement.get("dtype") or torch.get_default_dtype())
    return torch.full(shape, fill, device=placement.get("device"), dtype=dtype)


def new_parameter(fill: float, shape: tuple[int, ...], placement: Placement) -> nn.Parameter:
    """A parameter, filled, on the device and of the dtype that a layer is made with."""
    return nn.Parameter(
        torch.full(shape, float(fill), device=placement.get("device"), dtype=placement.get("dtype"))
    )


def chosen_arguments(factory: Callable[..., nn.Module]) -> set[str]:
    """Names of the arguments that a partial fixes by choice.

    Who writes functools.partial means all of them. A config file lists all of a layer's arguments: in what Hydra
    makes of it, a partial of its own, only those count that differ from their defaults.
    """
    keywords: dict[str, Any] = getattr(factory, "keywords", {})
    if type(factory) is functools.partial or not keywords:
        return {*keywords}
    try:
        parameters = inspect.signature(getattr(factory, "func", factory)).parameters
    except (TypeError, ValueError):  # written in C
        return {*keywords}
    return {
        name
        for name, value in keywords.items()
        if name not in parameters or parameters[name].default != value
    }


def traced(layer: nn.Module, x: Any, **options: Any) -> Any:
    """`layer(x)` as one node of the graph that torch.fx is tracing; None where it is not, or traces the layer alone."""
    if not isinstance(x, Proxy) or x.tracer.root is layer:  # type: ignore[attr-defined]
        return None
    given = {name: value for name, value in options.items() if value is not None}
    path = x.tracer.path_of_module(layer)  # type: ignore[attr-defined]
    return x.tracer.create_proxy("call_module", path, (x,), given)


class Norm(nn.Module):
    """Base of the layers: `normalize(x, valid)` is all that a subclass writes.

    `x` is `(N, C)` or `(N, C, *)` with `channel_dim=1`, `(N, C)` or `(N, *, C)` with `channel_dim=-1`. `mask`
    is bool, of x's shape without the channel axis, True where `x` is valid. The result has x's shape, dtype
    and memory layout and is 0 where the mask is False; what `x` holds there reaches no result and no
    gradient.

    `weight` and `bias`, `(num_features,)`, start at `weight_init` and `bias_init`; `affine=False` means
    neither, `bias=False` no bias. They follow the module's dtype. Buffers stay float32 (float64 after
    `.double()`) in half-precision modules.

    Raises ValueError for a wrong number of channels, rank or mask shape, and TypeError if `x` is not floating
    point or the mask not bool.
    """

    __signature__: ClassVar[inspect.Signature]

    cancels_bias: ClassVar[bool] = False
    """Whether a bias added just before this layer has no effect."""

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init_subclass__(cls) -> None:
        """Show the arguments that a layer passes on, `**shared: Unpack[Shared]`, in its signature."""
        super().__init_subclass__()
        if "__init__" not in vars(cls):  # it has its base's
            return
        try:
            signature = inspect.signature(cls.__init__, eval_str=True)
        except NameError:  # an annotation that exists for type checkers only
            signature = inspect.signature(cls.__init__)
        own = dict(signature.parameters)
        del own["self"]
        passed_on = [p for p in own.values() if p.kind == p.VAR_KEYWORD and get_args(p.annotation)]
        for parameter in passed_on:
            del own[parameter.name]
            names = get_args(parameter.annotation)[0].__annotations__
            inherited = inspect.signature(cls.__mro__[1]).parameters
            own |= {name: p for name, p in inherited.items() if name in names and name not in own}
        cls.__signature__ = signature.replace(parameters=[*own.values()])

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        affine: bool = True,
        bias: bool = True,
        weight_init: float = 1.0,
        bias_init: float = 0.0,
        channel_dim: int = 1,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if num_features < 1:
            raise ValueError(f"{name}: num_features must be at least 1, got {num_features}")
        if eps < 0:
            raise ValueError(f"{name}: eps must not be negative, got {eps}")
        if channel_dim not in (1, -1):
            raise ValueError(f"{name}: channel_dim must be 1 (N, C, *) or -1 (N, *, C), got {channel_dim}")
        self.num_features = num_features
        self.eps = eps
        self.affine = affine
        self.weight_init = weight_init
        self.bias_init = bias_init
        self.channel_dim = channel_dim
        for parameter, wanted in (("weight", affine), ("bias", affine and bias)):
            empty = torch.empty(num_features, device=device, dtype=dtype) if wanted else None
            self.register_parameter(parameter, None if empty is None else nn.Parameter(empty))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set weight and bias to their initial values."""
        if self.weight is not None:
            nn.init.constant_(self.weight, self.weight_init)
        if self.bias is not None:
            nn.init.constant_(self.bias, self.bias_init)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        node: Tensor | None = traced(self, x, mask=mask)
        if node is not None:
            return node
        self._check(x, mask)
        shape, last = x.shape, self.channel_dim == -1 and x.dim() > 2
        if last:
            # (N, *, C) is (N, C, positions, 1) in channels last: a view, in a layout torch's kernels know.
            x = x.flatten(1, -2).unsqueeze(2).permute(0, 3, 1, 2)
        if 1 in x.shape:
            x = canonical(x)
        if mask is None:
            y = self.normalize(x, None)
        else:
            valid = mask.reshape(x.size(0), 1, *x.shape[2:])
            # torch.where, unlike masked_fill, keeps the memory layout.
            y = torch.where(valid, self.normalize(torch.where(valid, x, 0), valid), 0)
        return y.permute(0, 2, 3, 1).reshape(shape) if last else y

    def normalize(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """The layer's formula for `x`, `(N, C)` or `(N, C, *)`, zero where `valid`, `(N, 1, *)`, is False."""
        raise NotImplementedError

    def full_affine(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and bias in the dtype of x's statistics, 1 and 0 where the layer has none."""
        dtype, size = statistics_dtype(x.dtype), self.num_features
        weight, bias = self.weight, self.bias
        return (
            torch.ones(size, device=x.device, dtype=dtype) if weight is None else converted(weight, dtype),
            torch.zeros(size, device=x.device, dtype=dtype) if bias is None else converted(bias, dtype),
        )

    def _check(self, x: Tensor, mask: Tensor | None) -> None:
        axes = "(N, C) or (N, C, *)" if self.channel_dim == 1 else "(N, C) or (N, *, C)"
        if x.dim() < 2:
            raise ValueError(
                f"{self}: expected input {axes}, got shape {tuple(x.shape)}; add a batch axis with x[None]"
            )
        channels = x.size(self.channel_dim)
        if channels != self.num_features:
            raise ValueError(
                f"{self}: expected {self.num_features} channels on axis {self.channel_dim} of {axes}, "
                f"got {channels} in shape {tuple(x.shape)}. Set num_features={channels}, or channel_dim="
                f"{-self.channel_dim} if the channels are on the other axis"
            )
        if not x.is_floating_point():
            raise TypeError(
                f"{self}: expected floating point input, got {x.dtype}; convert it with x.float()"
            )
        if mask is None:
            return
        seen = tuple(x.shape)
        expected = seen[:1] + seen[2:] if self.channel_dim == 1 else seen[:-1]
        if tuple(mask.shape) != expected:
            raise ValueError(
                f"{self}: expected a mask of shape {expected}, the input's without its channel axis, got "
                f"{tuple(mask.shape)}; mask.expand() repeats it along an axis"
            )
        if mask.dtype != torch.bool:
            raise TypeError(f"{self}: expected a bool mask (True = valid), got {mask.dtype}; use mask.bool()")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # .half() and .to(torch.bfloat16) are meant for parameters; statistics keep their values.
        statistics = {k: b for k, b in self._buffers.items() if b is not None and b.is_floating_point()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in statistics.items():
            after = self._buffers[name]
            if after is not None and after.dtype not in (torch.float32, torch.float64):
                self._buffers[name] = before.to(after.device, torch.float32)
        return self

    def extra_repr(self) -> str:
        shown = [str(self.num_features)]
        for name, argument in inspect.signature(type(self)).parameters.items():
            if name in ("num_features", "device", "dtype"):
                continue
            value = getattr(self, name, argument.default)
            if name == "bias":
                value = value is not None or not self.affine
            elif isinstance(value, Tensor):
                known = not value.is_meta and type(value) in (Tensor, nn.Parameter)
                value = float(f"{value.item():g}") if known else argument.default
            if value != argument.default:
                shown.append(f"{name}={value!r}")
        return ", ".join(shown)
