"""Layers that train by their running averages, where those have not converged: the network has learned with them."""

import warnings

from torch import nn

from bnlight.norm import BatchRenorm, FullNorm

REMEMBERED = 0.05
"""Share of the initial values in the averages from which on they have not converged."""


class UnconvergedAverages(UserWarning):
    """The network has learned with running averages that are not the data's statistics."""


def trains_by_averages(layer: nn.Module) -> bool:
    """Whether training normalizes by the running averages, as evaluation does."""
    return isinstance(layer, FullNorm) or (
        isinstance(layer, BatchRenorm) and not (layer.r_max == 1 and layer.d_max == 0)
    )


def remembered(layer: nn.Module, more: int = 0) -> float:
    """Weight of the initial values in the averages that a layer has trained by, `(1 - momentum)**batches`.

    With `more`: that it will have trained by after so many more batches.

    0 for one that has not trained, that trains by its batches, or whose averages began as plain ones.
    """
    if not isinstance(layer, BatchRenorm | FullNorm) or not trains_by_averages(layer):
        return 0.0
    batches = more + (0 if layer.num_batches_tracked is None else int(layer.num_batches_tracked))
    if batches == 0 or layer.momentum is None or layer.counts_batches():
        return 0.0
    return float((1 - layer.momentum) ** batches)


def warn_of_unconverged(name: str, layers: dict[str, nn.Module], way_out: str) -> None:
    """Say to the caller of the public function `name` which layers' averages remember their initial values."""
    shares = {path: share for path, layer in layers.items() if (share := remembered(layer)) > REMEMBERED}
    if not shares:
        return
    first = next(iter(shares))
    layer = layers[first]
    more = f" and {len(shares) - 1} more" if len(shares) > 1 else ""
    warnings.warn(
        f"{name}: '{first}'{more} ({type(layer).__name__}) train by running averages, and after "
        f"{layer.num_batches_tracked} batches with momentum {layer.momentum:g} those are still {shares[first]:.0%} "
        "their initial values. The network has learned with them; by the data's own statistics it may lose most of its "
        f"accuracy, also on unshifted data. {way_out}",
        UnconvergedAverages,
        stacklevel=3,
    )
