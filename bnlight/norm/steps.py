"""One normalization for each step of a sequence."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnlight.norm.base import chosen_arguments
from bnlight.norm.batch import BatchStatistics
from bnlight.norm.sample import NoNorm

NormFactory = Callable[..., nn.Module]


class StepNorm(nn.Module):
    """A norm for each step of a sequence; all steps have the same parameters.

    Layers with batch statistics have averages of their own in each of `max_length` steps, and the last of them
    serves the steps beyond; of the others one layer serves all. `options` go to the layer as far as it takes
    them. A state dict has the parameters once, at step 0. See `bnlight.norm.NormLSTM`.
    """

    def __init__(
        self, norm: str | NormFactory, num_features: int, max_length: int | None, **options: Any
    ) -> None:
        super().__init__()
        probe = _layer(norm, num_features, options, {})
        of_batch = _uses_batch(probe)
        if of_batch and (max_length is None or max_length < 1):
            raise ValueError(
                f"NormLSTM: {type(probe).__name__} keeps statistics for each step, so it needs max_length of at least "
                f"1, got {max_length}. Give the length of the longest training sequence, or use a norm without "
                "batch statistics such as norm='layer'"
            )
        defaults = {"small_batch": "running", "weight_init": 0.1} if of_batch else {}
        number = max_length if of_batch and max_length else 1
        layers = [_layer(norm, num_features, options, defaults) for _ in range(number)]
        for name, parameter in layers[0].named_parameters():
            owner, _, leaf = name.rpartition(".")
            for layer in layers[1:]:
                setattr(layer.get_submodule(owner), leaf, parameter)
        self.steps = nn.ModuleList(layers)

    @property
    def of_batch(self) -> bool:
        """Whether the samples of a step make its statistics, so that each step needs a call of its own."""
        return _uses_batch(self.steps[0])

    @property
    def synchronized(self) -> bool:
        """Whether other ranks wait for this one at every step, also at one that none of its sequences reach."""
        first = self.steps[0]
        return first.training and getattr(first, "process_group", None) is not None

    def reset_parameters(self) -> None:
        """Set the layers' parameters to their initial values, where the layers can do that."""
        reset = getattr(self.steps[0], "reset_parameters", None)
        if reset is not None:
            reset()

    def forward(self, x: Tensor, step: int) -> Tensor:
        """Normalize the samples of one step, `(N, C)`."""
        layer = self.steps[min(step, len(self.steps) - 1)]
        y: Tensor = layer(x) if len(x) else _of_nothing(layer, x)
        return y

    def all_steps(self, x: Tensor, sizes: list[int]) -> list[Tensor]:
        """Normalize the samples of each step, `(sum(sizes), C)`, which lie one step after the other."""
        if not self.of_batch:
            x = self(x, 0)
        parts = [*torch.split(x, sizes)]
        return [self(part, step) for step, part in enumerate(parts)] if self.of_batch else parts

    @torch.no_grad()
    def extend(self, sizes: list[int]) -> None:
        """After a training batch: give steps that never had one the averages of the last step that had.

        `sizes` are the numbers of samples in the batch's steps, never growing. Steps with enough of them had a
        batch, and their buffers must stay as they are: autograd may have saved them.
        """
        layers: list[Any] = [*self.steps]
        first = sum(size > getattr(layers[0], "too_few", 1) for size in sizes)
        frozen = not layers[0].training
        if frozen or first >= len(layers) or getattr(layers[0], "num_batches_tracked", None) is None:
            return
        counts = torch.stack([layer.num_batches_tracked for layer in layers])
        steps = torch.arange(len(layers), device=counts.device)
        source = torch.where(counts > 0, steps, 0).cummax(0).values[first:]
        for name, buffer in layers[0].named_buffers():
            if buffer.is_floating_point():
                averages = [layer.get_buffer(name) for layer in layers]
                torch._foreach_copy_(averages[first:], [*torch.stack(averages)[source].unbind()])

    def state_dict(self, *args: Any, **options: Any) -> dict[str, Any]:  # type: ignore[override]
        """As every module's, without the parameters' copies at the steps after the first."""
        state: dict[str, Any] = super().state_dict(*args, **options)
        for name in self._copies(options.get("prefix", "")):
            del state[name]
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        start = f"{prefix}steps."
        found = {key.removeprefix(start).split(".")[0] for key in state_dict if key.startswith(start)}
        if found and len(found) != len(self.steps):
            raise RuntimeError(
                f"{prefix[:-1]}: the state dict has statistics for {len(found)} steps, this layer for "
                f"{len(self.steps)}. Build NormLSTM with max_length={len(found)} to load it; sequences may be "
                "longer than that"
            )
        for copy, name in self._copies(prefix).items():
            if name in state_dict:
                state_dict[copy] = state_dict[name]
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _copies(self, prefix: str) -> dict[str, str]:
        """Names of the parameters at the steps after the first, and their names at the first."""
        names = [name for name, _ in self.steps[0].named_parameters()]
        start = f"{prefix}steps."
        return {
            f"{start}{step}.{name}": f"{start}0.{name}"
            for step in range(1, len(self.steps))
            for name in names
        }


def step_norm(norm: str | NormFactory | None, *args: Any, **options: Any) -> StepNorm | None:
    """A StepNorm, or None where the norm is none."""
    made = None if norm is None else StepNorm(norm, *args, **options)
    return None if made is None or (type(made.steps[0]) is NoNorm and not made.steps[0].affine) else made


def _layer(
    norm: str | NormFactory, channels: int, options: dict[str, Any], defaults: dict[str, Any]
) -> nn.Module:
    """The norm of one step, given what it takes of the options, and of the defaults that it does not fix itself."""
    if isinstance(norm, str):
        from bnlight.norm import NORMS

        if norm not in NORMS:
            raise ValueError(
                f"NormLSTM: unknown norm {norm!r}; use one of {[*NORMS]}, or a factory norm(channels)"
            )
        norm = NORMS[norm]
    taken, fixed = inspect.signature(norm).parameters, chosen_arguments(norm)
    wanted = {name: value for name, value in defaults.items() if name not in fixed}
    wanted |= {name: value for name, value in options.items() if value is not None}
    return norm(channels, **{name: value for name, value in wanted.items() if name in taken})


def _uses_batch(layer: nn.Module) -> bool:
    return isinstance(layer, BatchStatistics | _BatchNorm) or next(layer.buffers(), None) is not None


def _of_nothing(layer: nn.Module, x: Tensor) -> Tensor:
    """`layer(x)` for no samples, counted as a batch only if those of other ranks moved the averages."""
    mean, tracked = getattr(layer, "running_mean", None), getattr(layer, "num_batches_tracked", None)
    before = None if mean is None or tracked is None else (mean.clone(), tracked.clone())
    y: Tensor = layer(x)
    if before is not None and mean is not None and tracked is not None:
        tracked.copy_(torch.where((mean == before[0]).all(), before[1], tracked))
    return y
