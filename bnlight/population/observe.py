"""Look at what the layers with batch statistics see, in a pass over batches that leaves the model as it was."""

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from bnlight.norm.batch import BatchStatistics
from bnlight.norm.core import Moments, moments
from bnlight.norm.paths import named_layers
from bnlight.norm.recompute import Calls
from bnlight.norm.sync import Meeting, merged
from bnlight.population.ranks import number_of_ranks, of_all_ranks
from bnlight.surgery.freeze import Frozen

Forward = Callable[[nn.Module, Any], object]


class Pool:
    """Mean, biased variance and number of all values that a layer sees, `(C,)`, in float64 where there is such."""

    def __init__(self, path: str, layer: nn.Module) -> None:
        self.path, self.layer = path, layer
        self._start()

    def _start(self) -> None:
        like = self.running("running_mean")
        kind = torch.float32 if like.device.type == "mps" else torch.float64
        self.shape = like.shape
        self.mean = self.var = self.number = torch.zeros(like.numel(), dtype=kind, device=like.device)
        self.samples = self.skipped = self.mean.new_zeros(())

    def running(self, name: str) -> Tensor:
        """The layer's buffer."""
        return self.layer.get_buffer(name)

    @property
    def reached(self) -> bool:
        """Whether there are enough values for a variance."""
        return bool((self.number > 1).any())

    def unbiased(self) -> Tensor:
        """The unbiased variance."""
        return self.var * (self.number / (self.number - 1).clamp(min=1))

    def moments(self) -> Moments:
        """What has been counted, as one batch."""
        return Moments(self.mean, self.var, self.number, self.samples)

    def add(self, batch: Moments, used: Tensor | None = None) -> None:
        """Count the values of a batch, of those of its groups that are used; none of one that is not finite."""
        if batch.mean.size(-1) != len(self.mean):
            self._start()  # a layer with statistics per position learns their number from its first batch
        number = torch.as_tensor(batch.number, device=batch.mean.device).expand_as(batch.mean)
        finite = (batch.mean + batch.var).isfinite().all()
        self.skipped = self.skipped + ~finite
        samples = torch.as_tensor(batch.samples, device=self.mean.device) * finite
        groups = batch.mean.numel() // batch.mean.size(-1) if samples.dim() == 0 else 1
        self.samples = self.samples + samples.sum() * groups
        mean, var = (torch.where(finite, values, 0) for values in batch[:2])
        new = (mean, var, finite * (number if used is None else number * used))
        old = (self.mean, self.var, self.number)
        rows = [torch.cat([o[None], n.reshape(-1, len(o))]) for o, n in zip(old, new, strict=True)]
        self.mean, self.var, self.number = merged(*rows)

    def take(self, number: Tensor, mean: Tensor, var: Tensor, samples: Tensor, _: Tensor) -> None:
        """Count the values of all ranks, `(ranks, C)`, in place of this one's."""
        together = [values.to(self.mean) for values in merged(mean, var, number)]
        self.mean, self.var, self.number = together
        self.samples = samples.sum().to(self.mean)

    def add_input(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Count the values that a layer is called with: a forward pre-hook."""
        self.add(moments(args[0] if args else kwargs["input"]))


def pooled(
    name: str,
    model: nn.Module,
    layers: dict[str, nn.Module],
    batches: Iterable[Any],
    forward: Forward | None,
    *,
    training: bool,
) -> list[Pool]:
    """What each layer sees in the batches of all ranks: in training its values, else its examples' means.

    ValueError if no rank has a batch.
    """
    number = 0
    with torch.no_grad(), _observed(model, layers, training) as pools:
        for batch in batches:
            if forward is None:
                model(_input(name, model, batch))
            else:
                forward(model, batch)
            number += 1
    if number_of_ranks("world") > 1:
        parts = {p.path: [p.number, p.mean, p.var, p.samples, p.mean.new_tensor(number)] for p in pools}
        for pool, rows in zip(pools, of_all_ranks(name, parts, "world").values(), strict=True):
            pool.take(*rows)
            number = int(rows[-1].sum())
    if number == 0:
        raise ValueError(
            f"{name}: there were no batches to estimate from; an iterator that was used up before has none left"
        )
    return pools


@contextmanager
def _observed(model: nn.Module, layers: dict[str, nn.Module], training: bool) -> Iterator[list[Pool]]:
    """The model in evaluation and the layers' pools, which see what the layers see; then all as it was."""
    tensors = chain(model.parameters(), model.buffers())
    with ExitStack() as back:
        back.enter_context(torch.random.fork_rng({t.device for t in tensors if t.device.type == "cuda"}))
        if "torch._dynamo" in sys.modules:  # what is compiled does not see who looks on
            back.enter_context(torch.compiler.set_stance("force_eager"))
        for module in [module for module in model.modules() if module.training]:
            back.callback(setattr, module, "training", True)
            module.training = False
        yield [_observe(path, layer, training, back) for path, layer in layers.items()]


def _observe(path: str, layer: nn.Module, training: bool, back: ExitStack) -> Pool:
    pool = Pool(path, layer)
    for buffer in layer.buffers():
        back.callback(buffer.copy_, buffer.clone())
    back.callback(layer._buffers.update, dict(layer._buffers))
    if isinstance(layer, BatchStatistics):
        for name in ("observer", "meeting", "jitter", "_calls"):
            back.callback(setattr, layer, name, getattr(layer, name))
        layer.observer, layer.meeting, layer.jitter, layer._calls = pool.add, Meeting(), None, Calls()
        if training:
            back.callback(setattr, layer, "training", False)
            layer.training = True
        else:
            layer.example_weight = layer.example_var = pool.mean.new_zeros(())
    else:
        # Without them torch normalizes by the batch in evaluation too, and by this rank's alone.
        for name in ("running_mean", "running_var"):
            setattr(layer, name, None)
        back.callback(layer.register_forward_pre_hook(pool.add_input, with_kwargs=True).remove)
    return pool


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that evaluate by running averages, by their paths; ValueError for lazy ones without channels."""
    layers: dict[str, nn.Module] = {}
    for path, module in named_layers(model):
        if isinstance(module, BatchStatistics | _BatchNorm) and module.running_mean is not None:
            if is_lazy(module.running_mean):
                raise ValueError(
                    f"'{path}' is a {type(module).__name__} that does not know its number of channels yet: call the "
                    "model with a batch first"
                )
            layers[path] = module
    return layers


def moving_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Those of `layers_of` that are not frozen."""
    return {path: layer for path, layer in layers_of(model).items() if not frozen(layer, model)}


def frozen(layer: nn.Module, model: nn.Module) -> bool:
    """Whether the layer's averages must stay: by `freeze_norm`, or in evaluation mode in a model in training mode."""
    return isinstance(layer, Frozen) or (model.training and not layer.training)


def _input(name: str, model: nn.Module, batch: Any) -> Tensor:
    x = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if not isinstance(x, Tensor):
        raise TypeError(
            f"{name}: expected a batch that is a tensor, or a tuple or list that starts with one, got "
            f"{type(x).__name__}; say what to do with it: forward=lambda model, batch: model(**batch)"
        )
    return x.to(next(chain(model.parameters(), model.buffers())).device)


def warn_of_missed(name: str, pools: list[Pool], stacklevel: int = 3) -> None:
    """Name the layers whose pools have no values, or not all, to the caller of the public function `name`."""
    spoiled = [f"'{pool.path}' ({int(pool.skipped)})" for pool in pools if pool.skipped > 0]
    if spoiled:
        warnings.warn(
            f"{name}: batches with an infinite or NaN mean or variance were left out at {', '.join(spoiled)}; look "
            "for such values in the data, or for a network that overflows",
            stacklevel=stacklevel,
        )
    missed = [f"'{pool.path}'" for pool in pools if not pool.reached]
    if missed:
        warnings.warn(
            f"{name}: no batch with more than one value per channel reached {', '.join(missed)}, which stay as "
            "they were",
            stacklevel=stacklevel,
        )
